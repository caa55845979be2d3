"""Fields that say how the prompt is made and what is told of it, in chats and completions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.server.asgi import client_of, events_of
from tests.server.fakes import FakeEngine, shipped_tokenizer, tokens_of

from pagedkv.server.model import INFILLINGS

pytestmark = pytest.mark.anyio
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ASKED: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "import os"}, CHAT: {"messages": HELLO}}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


async def post(engine: FakeEngine, path: str, body: dict[str, Any], **settings: Any) -> Any:
    async with client_of(engine, **settings) as client:
        return await client.post(path, json=body)


def prompt_of(engine: FakeEngine) -> str:
    text: str = shipped_tokenizer().decode(engine.calls[-1].token_ids, skip_special_tokens=True)
    return text


# What is told of the prompt.


@pytest.mark.parametrize("path", ASKED)
async def test_log_probabilities_of_the_prompt(path: str) -> None:
    engine = FakeEngine()
    answer = (await post(engine, path, {**ASKED[path], "max_tokens": 1, "prompt_logprobs": 1})).json()
    first, *rest = (answer if path == CHAT else answer["choices"][0])["prompt_logprobs"]
    ids = engine.calls[0].token_ids
    assert first is None and len(rest) == len(ids) - 1 and engine.calls[0].params.prompt_logprobs == 1
    for token, entries in zip(ids[1:], rest, strict=True):
        decoded = shipped_tokenizer().decode([token])
        assert entries[str(token)] == {"logprob": -2.5, "rank": 3, "decoded_token": decoded}
        assert entries.keys() == {str(token), "4001"} and entries["4001"]["rank"] == 1
    streamed = await post(engine, path, {**ASKED[path], "prompt_logprobs": 0, "stream": True})
    assert streamed.status_code == 400 and streamed.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(1, 2), (2, 0), (0, 1)])
async def test_an_echo_and_the_prompt_have_their_own_numbers_of_likeliest_tokens(
    logprobs: int, prompt_logprobs: int
) -> None:
    body = {"prompt": "import os", "echo": True, "max_tokens": 0, "logprobs": logprobs}
    engine = FakeEngine()
    (choice,) = (await post(engine, COMPLETIONS, {**body, "prompt_logprobs": prompt_logprobs})).json()["choices"]
    assert engine.calls[0].params.prompt_logprobs == max(logprobs, prompt_logprobs)
    assert [len(entries) for entries in choice["logprobs"]["top_logprobs"][1:]] == [1 + logprobs] * 2
    assert [len(entries) for entries in choice["prompt_logprobs"][1:]] == [1 + prompt_logprobs] * 2


@pytest.mark.parametrize("path", ASKED)
async def test_token_ids(path: str) -> None:
    engine, body = FakeEngine(), {**ASKED[path], "max_tokens": 8, "n": 2, "return_token_ids": True}
    whole = (await post(engine, path, body)).json()
    events = events_of((await post(engine, path, {**body, "stream": True})).text)
    plain = (await post(engine, path, ASKED[path])).text
    ids, written = engine.calls[0].token_ids, list(tokens_of_story(8))
    places = [whole] if path == CHAT else whole["choices"]
    assert [each["prompt_token_ids"] for each in places] == [ids] * len(places)
    assert [choice["token_ids"] for choice in whole["choices"]] == [written] * 2
    pieces = [choice for event in events for choice in event["choices"]]
    for index in range(2):
        mine = [choice for choice in pieces if choice["index"] == index]
        assert sum((choice["token_ids"] for choice in mine), []) == written
    told = [each["prompt_token_ids"] for each in (events if path == CHAT else pieces) if "prompt_token_ids" in each]
    assert told == [ids, ids] and "token_ids" not in plain


def tokens_of_story(count: int) -> tuple[int, ...]:
    from tests.server.fakes import story_tokens

    return story_tokens()[:count]


async def test_token_ids_of_calls_that_are_streamed() -> None:
    says = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    body = {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}], "stream": True}
    answer = await post(FakeEngine(says=says, max_positions=512), CHAT, {**body, "return_token_ids": True})
    ids = [token for event in events_of(answer.text) for token in event["choices"][0].get("token_ids", [])]
    assert tuple(ids) == tokens_of(says)


# How the prompt is made.


@pytest.mark.parametrize("path", ASKED)
async def test_the_end_of_a_prompt(path: str) -> None:
    engine = FakeEngine(max_positions=64)
    long = (
        {"prompt": "import os " * 400}
        if path == COMPLETIONS
        else {"messages": [{"role": "user", "content": "a " * 900}]}
    )
    whole = await post(engine, path, {**long, "max_tokens": 4})
    few = await post(engine, path, {**long, "max_tokens": 4, "truncate_prompt_tokens": 7})
    fits = await post(engine, path, {**long, "max_tokens": 4, "truncate_prompt_tokens": -1})
    short = await post(engine, path, {**ASKED[path], "max_tokens": 4, "truncate_prompt_tokens": 50})
    none = await post(engine, path, {**ASKED[path], "max_tokens": 4, "truncate_prompt_tokens": 0})
    assert [each.status_code for each in (whole, few, fits, short, none)] == [400, 200, 200, 200, 400]
    first, second, third = [call.token_ids for call in engine.calls]
    assert (
        len(first) == 7 and len(second) == 60 and second[-7:] == first and third[0] == shipped_tokenizer().bos_token_id
    )


async def test_the_end_of_a_prompt_of_token_ids_is_echoed() -> None:
    ids = list(tokens_of("x = 1; y = 2"))
    body = {"prompt": ids, "truncate_prompt_tokens": 3, "echo": True, "max_tokens": 0}
    for prompt in (ids, "x = 1; y = 2"):
        answer = (await post(FakeEngine(), COMPLETIONS, {**body, "prompt": prompt})).json()
        assert answer["choices"][0]["text"] == shipped_tokenizer().decode(ids[-3:])
        assert answer["usage"]["prompt_tokens"] == 3


async def test_the_last_message_is_gone_on_with() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well, I "}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 2}
    for template, prompt in (
        (None, "user: hello\n\nassistant: Well, I "),
        (TEMPLATE, "[user]hello[/][assistant]Well, I "),
    ):
        engine = FakeEngine()
        async with client_of(engine, chat_template=template) as client:
            answer = await client.post(CHAT, json={**body, "add_generation_prompt": False})
            told = await client.post("/tokenize", json={"messages": messages, "continue_final_message": True})
            both = await client.post(CHAT, json={**body, "add_generation_prompt": True})
            none = await client.post(CHAT, json={**body, "messages": [*HELLO, {"role": "assistant", "content": ""}]})
        assert answer.status_code == 200 and prompt_of(engine) == prompt and len(engine.calls) == 1
        assert told.json()["tokens"] == engine.calls[0].token_ids
        assert both.json()["error"]["param"] == "add_generation_prompt"
        assert none.json()["error"]["param"] == "continue_final_message"


async def test_a_template_of_a_client_where_the_server_lets_it() -> None:
    engine, body = FakeEngine(), {"messages": HELLO, "max_tokens": 1, "chat_template": "<{{ messages[0].content }}>"}
    for path in (CHAT, "/tokenize"):
        refused = await post(engine, path, body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template"
        assert "--trust-request-chat-template" in refused.json()["error"]["message"]
    assert engine.calls == []
    assert (await post(engine, CHAT, body, trust_request_chat_template=True)).status_code == 200
    assert prompt_of(engine) == "<hello>" and engine.calls[0].params.stop == ()
    broken = await post(engine, CHAT, {**body, "chat_template": "{% if %}"}, trust_request_chat_template=True)
    assert broken.status_code == 400


# What follows the text.


def taught(names: tuple[str | None, ...]) -> Any:
    tokenizer = copy.deepcopy(shipped_tokenizer())
    tokenizer.add_tokens([name for name in names if name is not None], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("names", INFILLINGS, ids=lambda names: str(names[0]))
async def test_a_text_before_a_suffix(names: tuple[str | None, ...]) -> None:
    engine = FakeEngine()
    engine.tokenizer = taught(names)
    engine.sizes = type(engine.sizes)(**{**vars_of(engine.sizes), "vocab_size": 5000})
    body = {"prompt": "def f(", "suffix": "):\n    return x", "stop_token_ids": [9]}
    assert (await post(engine, COMPLETIONS, body)).status_code == 200
    assert (await post(engine, COMPLETIONS, {**body, "prompt": list(tokens_of("def f("))})).status_code == 200
    ids = {name: engine.tokenizer.convert_tokens_to_ids(name) for name in names if name is not None}
    before, after = list(tokens_of("def f(")), list(tokens_of("):\n    return x"))
    prefix, suffix, middle = names[:3]
    if middle is None:
        marked = [ids[suffix], *after, ids[prefix], *before]
    else:
        marked = [ids[prefix], *before, ids[suffix], *after, ids[middle]]
    first, second = engine.calls
    assert first.token_ids == [shipped_tokenizer().bos_token_id, *marked] and second.token_ids == marked
    assert set(first.params.stop_token_ids) == {9, *ids.values()}
    echoed = await post(engine, COMPLETIONS, {**body, "echo": True})
    assert echoed.status_code == 400 and echoed.json()["error"]["param"] == "echo"


def vars_of(sizes: Any) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in sizes.__slots__}


async def test_a_model_that_knows_no_suffix_refuses_it() -> None:
    engine = FakeEngine()
    refused = await post(engine, COMPLETIONS, {"prompt": "a", "suffix": "b"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"
    assert "no marks" in refused.json()["error"]["message"] and engine.calls == []
    assert (await post(engine, COMPLETIONS, {"prompt": "a", "suffix": ""})).status_code == 200
