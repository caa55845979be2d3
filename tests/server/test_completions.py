"""/v1/completions against an engine without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.server.asgi import client_of, events_of
from tests.server.fakes import STORY, FakeEngine, shipped_tokenizer, story_tokens

from pagedkv.server.completions import _best

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


async def test_a_text() -> None:
    engine = FakeEngine(cached=2)
    async with client_of(engine) as client:
        answer = await client.post(URL, json={"prompt": "import os", "max_tokens": 4, "model": "tiny"})
    told = answer.json()
    assert answer.status_code == 200
    assert told["object"] == "text_completion" and told["model"] == "tiny" and told["id"].startswith("cmpl-")
    (choice,) = told["choices"]
    assert choice["text"] == shipped_tokenizer().decode(story_tokens()[:4])
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert told["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert engine.calls[0].token_ids == shipped_tokenizer()("import os")["input_ids"]


async def test_defaults_are_those_of_openai() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        await client.post(URL, json={"prompt": "x"})
    params = engine.calls[0].params
    assert (params.max_tokens, params.temperature, params.n, params.logprobs) == (16, 1.0, 1, None)


async def test_every_field_reaches_the_engine() -> None:
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "max_tokens": 5,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logprobs": 3,
    }
    engine = FakeEngine()
    async with client_of(engine) as client:
        body = {**fields, "prompt": "x", "logit_bias": {"7": -1.5}, "priority": 4, "session_id": "s"}
        told = await client.post(URL, json=body)
        assert told.status_code == 200
        body |= {"session_id": None, "prompt_cache_key": "k", "user": "u", "nobody_knows": {"this": 1}}
        assert (await client.post(URL, json=body, headers={"x-session-id": "h"})).status_code == 200
    first, second = engine.calls
    for name, value in fields.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(first.params, name) == expected, name
    assert dict(first.params.logit_bias or {}) == {7: -1.5}
    options = {"request_id": told.json()["id"], "priority": 4, "cache_salt": "", "session_id": "s", "tenant": ""}
    assert first.options == options
    assert second.options["session_id"] == "h"


@pytest.mark.parametrize(
    ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8]], 3), (["a"], 1)]
)
async def test_every_form_of_a_prompt(prompt: object, count: int) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        told = (await client.post(URL, json={"prompt": prompt, "max_tokens": 1, "n": 1})).json()
    assert [choice["index"] for choice in told["choices"]] == list(range(count))
    assert told["usage"]["prompt_tokens"] == sum(len(call.token_ids) for call in engine.calls)
    if prompt == [[5, 6], [7], [8]]:
        assert [call.token_ids for call in engine.calls] == prompt


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_adds_up_to_the_answer(n: int) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": len(story_tokens()), "n": n, "logprobs": 1}
    async with client_of(FakeEngine(cached=1)) as client:
        whole = (await client.post(URL, json=body)).json()
        answer = await client.post(URL, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = events_of(answer.text)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert all(event["usage"] is None and event["id"] == last["id"] for event in events)
    pieces = [choice for event in events for choice in event["choices"]]
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"] == STORY
        assert [piece["finish_reason"] for piece in mine][-1] == "length"
        assert not any(piece["finish_reason"] for piece in mine[:-1])
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((piece["logprobs"][name] for piece in mine), []) == choice["logprobs"][name]


async def test_a_stream_never_splits_a_character_and_has_no_usage_unasked() -> None:
    async with client_of(FakeEngine()) as client:
        answer = await client.post(URL, json={"prompt": "a", "max_tokens": len(story_tokens()), "stream": True})
    events = events_of(answer.text)
    assert all("usage" not in event for event in events)
    assert "\ufffd" not in answer.text and "β→" in "".join(event["choices"][0]["text"] for event in events)


async def test_log_probabilities_show_halves_of_characters_as_bytes() -> None:
    async with client_of(FakeEngine()) as client:
        body = {"prompt": "a", "max_tokens": len(story_tokens()), "logprobs": 1}
        told = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(story_tokens()) == len(told["text_offset"])
    assert any(token.startswith("bytes:\\x") for token in told["tokens"])
    assert set(told["token_logprobs"]) == {-0.5}
    assert all(len(top) == 2 for top in told["top_logprobs"])


async def test_echo_puts_the_prompt_first() -> None:
    async with client_of(FakeEngine()) as client:
        told = (await client.post(URL, json={"prompt": "x = 1", "echo": True, "max_tokens": 2})).json()
        stream = await client.post(URL, json={"prompt": "x = 1", "echo": True, "max_tokens": 2, "stream": True})
        alone = (await client.post(URL, json={"prompt": "x = 1", "echo": True, "max_tokens": 0, "logprobs": 0})).json()
        ids = shipped_tokenizer()("x = 1")["input_ids"]
        by_ids = (await client.post(URL, json={"prompt": ids, "echo": True, "max_tokens": 2})).json()
    assert told["choices"][0]["text"] == "x = 1" + shipped_tokenizer().decode(story_tokens()[:2])
    assert "".join(event["choices"][0]["text"] for event in events_of(stream.text)) == told["choices"][0]["text"]
    assert by_ids["choices"][0]["text"] == told["choices"][0]["text"]
    choice = alone["choices"][0]
    assert choice["text"] == "x = 1" and choice["finish_reason"] == "length"
    assert alone["usage"]["completion_tokens"] == 0 and len(choice["logprobs"]["tokens"]) == len(ids)


async def test_each_of_several_prompts_is_echoed_before_its_own_texts() -> None:
    async with client_of(FakeEngine()) as client:
        body = {"prompt": ["x = 1", "y = 2"], "n": 2, "echo": True, "max_tokens": 2}
        choices = (await client.post(URL, json=body)).json()["choices"]
    assert [choice["text"][:5] for choice in sorted(choices, key=lambda choice: choice["index"])] == [
        *("x = 1", "x = 1"),
        *("y = 2", "y = 2"),
    ]


def test_the_likeliest_by_token_come_first() -> None:
    sums = {"long": (-4.0, 4), "short": (-1.5, 1), "likely": (-1.0, 2), "empty": (-9.0, 0)}
    choices = [SimpleNamespace(text=text, cumulative_logprob=s, token_ids=[0] * n) for text, (s, n) in sums.items()]
    assert [choice.text for choice in _best(choices, 2)] == ["likely", "long"]


async def test_best_of_returns_the_likeliest() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        told = (await client.post(URL, json={"prompt": "a", "best_of": 3, "n": 2, "max_tokens": 4})).json()
        worse = await client.post(URL, json={"prompt": "a", "best_of": 1, "n": 2})
        streamed = await client.post(URL, json={"prompt": "a", "best_of": 2, "stream": True})
    assert engine.calls[0].params.n == 3
    assert [choice["index"] for choice in told["choices"]] == [0, 1]
    assert told["choices"][0]["logprobs"] is None and told["usage"]["completion_tokens"] == 12
    for refused in (worse, streamed):
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "best_of"
