"""/v1/chat/completions against an engine without a model."""

from __future__ import annotations

import pytest
from tests.server.asgi import client_of, events_of
from tests.server.fakes import STORY, FakeEngine, shipped_tokenizer, story_tokens

from pagedkv.server.chat import plain_chat
from pagedkv.server.schemas import ChatMessage

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


async def test_an_answer() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        answer = await client.post(URL, json={"messages": HELLO, "max_tokens": 3, "n": 2})
    told = answer.json()
    assert answer.status_code == 200 and told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    text = shipped_tokenizer().decode(story_tokens()[:3])
    for index, choice in enumerate(told["choices"]):
        assert choice["index"] == index and choice["finish_reason"] == "length"
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert told["usage"]["completion_tokens"] == 6


async def test_a_model_without_a_template_gets_the_plain_form() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        await client.post(URL, json={"messages": HELLO, "max_tokens": 1, "stop": "#"})
        await client.post(URL, json={"messages": HELLO, "max_tokens": 1, "add_generation_prompt": False})
    first, second = (shipped_tokenizer().decode(call.token_ids, skip_special_tokens=True) for call in engine.calls)
    assert first == "system: be brief\n\nuser: hello\n\nassistant:"
    assert second == "system: be brief\n\nuser: hello\n\n"
    assert engine.calls[0].token_ids[0] == shipped_tokenizer().bos_token_id
    assert engine.calls[0].params.stop == ("#", "\nuser:", "\nsystem:")


def test_the_newer_name_of_the_system() -> None:
    assert plain_chat([ChatMessage(role="developer", content="x")], open_answer=False) == "system: x\n\n"


async def test_a_template_is_used_as_it_is() -> None:
    engine = FakeEngine()
    async with client_of(engine, chat_template=TEMPLATE) as client:
        parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
        messages = [{"role": "user", "content": parts}, {"role": "developer", "content": "three"}]
        assert (await client.post(URL, json={"messages": messages})).status_code == 200
        refused = await client.post(URL, json={"messages": [{"role": "assistant", "content": "I first"}]})
    call = engine.calls[0]
    assert shipped_tokenizer().decode(call.token_ids) == "[user]one two[system]three[me]"  # no token added before it
    assert call.params.stop == ()
    assert refused.status_code == 400 and "the user speaks first" in refused.json()["error"]["message"]


async def test_a_stream_adds_up_to_the_answer() -> None:
    body = {"messages": HELLO, "max_tokens": len(story_tokens()), "logprobs": True, "top_logprobs": 2, "n": 2}
    async with client_of(FakeEngine()) as client:
        whole = (await client.post(URL, json=body)).json()
        answer = await client.post(URL, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    *events, last = events_of(answer.text)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        mine = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant" and all("role" not in c["delta"] for c in mine[1:])
        assert "".join(c["delta"]["content"] for c in mine) == choice["message"]["content"] == STORY
        assert sum((c["logprobs"]["content"] for c in mine), []) == choice["logprobs"]["content"]


async def test_log_probabilities_have_the_bytes() -> None:
    body = {"messages": HELLO, "max_tokens": len(story_tokens()), "logprobs": True, "top_logprobs": 1}
    async with client_of(FakeEngine()) as client:
        told = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == STORY
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 1 for entry in told)


async def test_the_newer_name_of_max_tokens_wins() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        await client.post(URL, json={"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 2})
        await client.post(URL, json={"messages": HELLO})
    assert [call.params.max_tokens for call in engine.calls] == [2, None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("top_logprobs", 3),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    async with client_of(FakeEngine()) as client:
        answer = await client.post(URL, json={"messages": HELLO, field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"].split(".")[0] == field


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages.0.role"),
        ([{"role": "tool", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"content": "x"}], "messages.0.role"),
    ],
)
async def test_wrong_messages_are_refused_by_place(messages: object, param: str) -> None:
    async with client_of(FakeEngine()) as client:
        error = (await client.post(URL, json={"messages": messages})).json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
