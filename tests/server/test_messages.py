"""/v1/messages: answers, the order of events, errors in Anthropic's form, and what cache_control pins."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.server.asgi import client_of, named_events, until
from tests.server.fakes import STORY, FakeEngine, shipped_tokenizer, story_tokens

from pagedkv.errors import OutOfMemory
from pagedkv.server.pins import Pins

pytestmark = pytest.mark.anyio
URL = "/v1/messages"
WHOLE = len(story_tokens())
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
KEPT = {"type": "ephemeral"}
TEMPLATE = (
    "{% if messages | length == 1 and messages[0].role == 'system' %}{{ raise_exception('nobody asks') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


def block(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def prompts(engine: FakeEngine) -> list[str]:
    return [shipped_tokenizer().decode(call.token_ids, skip_special_tokens=True) for call in engine.calls]


async def test_an_answer() -> None:
    engine = FakeEngine(cached=4)
    system = [block("be "), block("brief")]
    async with client_of(engine) as client:
        told = (await client.post(URL, json={**HELLO, "system": system, "top_k": 5, "stop_sequences": ["#"]})).json()
        count = (await client.post(f"{URL}/count_tokens", json={**HELLO, "system": system})).json()
    assert told["type"] == "message" and told["role"] == "assistant" and told["id"].startswith("msg_")
    assert told["content"] == [block(shipped_tokenizer().decode(story_tokens()[:3]))]
    assert told["stop_reason"] == "max_tokens" and told["stop_sequence"] is None
    assert prompts(engine) == ["system: be brief\n\nuser: hello\n\nassistant:"]
    tokens = len(engine.calls[0].token_ids)
    assert count == {"input_tokens": tokens}
    usage = told["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (tokens - 4, 4, 3)
    assert usage["cache_creation_input_tokens"] == 0
    params = engine.calls[0].params
    assert params.top_k == 5 and params.max_tokens == 3 and "#" in params.stop


async def test_a_stream_tells_the_events_in_order() -> None:
    body = {**HELLO, "max_tokens": WHOLE}
    async with client_of(FakeEngine(cached=2)) as client:
        whole = (await client.post(URL, json=body)).json()
        answer = await client.post(URL, json={**body, "stream": True})
    events = named_events(answer.text)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"] and set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["cache_read_input_tokens"] == 2
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": block("")}
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == STORY
    assert events[-2]["usage"] == whole["usage"] and events[-2]["delta"]["stop_reason"] == whole["stop_reason"]


async def test_errors_have_the_form_that_anthropics_clients_expect() -> None:
    engine = FakeEngine()
    engine.fails_after = 1
    async with client_of(engine, api_keys=("one",), max_body=10_000) as client:
        key = {"x-api-key": "one"}
        asked = {
            400: ({"messages": []}, key, "invalid_request_error"),
            401: (HELLO, {}, "authentication_error"),
            404: ({**HELLO, "model": "other"}, key, "not_found_error"),
            413: ({**HELLO, "x": "y" * 20_000}, key, "request_too_large"),
            500: (HELLO, key, "api_error"),
        }
        for status, (body, headers, kind) in asked.items():
            answer = await client.post(URL, json=body, headers=headers)
            assert answer.status_code == status
            assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind
            assert answer.json()["error"]["message"] and "secret" not in answer.text
        events = named_events((await client.post(URL, json={**HELLO, "stream": True}, headers=key)).text)
        assert events[-1] == {
            "type": "error",
            "error": {"type": "api_error", "message": events[-1]["error"]["message"]},
        }
        assert (await client.get("/v1/models", headers=key)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("thinking", {"type": "enabled", "budget_tokens": 1024}),
        ("mcp_servers", [{"type": "url", "url": "x"}]),
        ("container", "x"),
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}]),
        ("tool_choice", {"type": "any"}),
        ("output_config", {"effort": "low"}),
        ("n", 2),
        ("max_tokens", None),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": {}}]}]),
    ],
)
async def test_what_is_wrong_or_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    engine = FakeEngine()
    more = {"tools": [{"name": "f", "input_schema": {}, "type": "other"}]} if field == "tool_choice" else {}
    async with client_of(engine) as client:
        answer = await client.post(URL, json={**HELLO, **more, field: value})
    words = ("tools",) if more else (field, "effort")
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(words) and engine.calls == []


# Pins.


async def test_what_is_marked_is_pinned_up_to_there_and_told_as_created() -> None:
    engine = FakeEngine()
    system = [block("one " * 40, cache_control=KEPT), block("two " * 40)]
    long = [block("three " * 40, cache_control={**KEPT, "ttl": "1h"}), block("four " * 20)]
    body = {"system": system, "messages": [{"role": "user", "content": long}], "max_tokens": 2}
    async with client_of(engine, chat_template=TEMPLATE) as client:
        usage = (await client.post(URL, json=body)).json()["usage"]
        first, second = (shipped_tokenizer().decode(ids) for ids in engine.pinned.values())
        assert first == "[system]" + "one " * 40 or first.startswith("[system]one one") and "two" not in first
        assert "two two" in second and "three three" in second and "four" not in second
        lengths = [len(ids) for ids in engine.pinned.values()]
        prompt = engine.calls[0].token_ids
        assert all(ids == prompt[: len(ids)] and len(ids) % 16 == 0 for ids in engine.pinned.values())
        assert usage["cache_creation_input_tokens"] == max(lengths)
        assert usage["cache_creation"] == {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": lengths[1]}
        assert usage["input_tokens"] == len(prompt) - max(lengths)
        # The same again: no pin more, and what came from the cache was not created.
        engine.cached = max(lengths)
        stream = named_events((await client.post(URL, json={**body, "stream": True})).text)
        assert stream[0]["message"]["usage"]["cache_creation_input_tokens"] == 0
        assert stream[0]["message"]["usage"]["cache_read_input_tokens"] == max(lengths)
        assert len(engine.pinned) == 2


async def test_a_mark_of_the_request_is_that_of_its_last_block() -> None:
    engine = FakeEngine()
    body = {"messages": [{"role": "user", "content": "word " * 60}], "max_tokens": 1, "cache_control": KEPT}
    async with client_of(engine) as client:
        await client.post(URL, json=body)
        (ids,) = engine.pinned.values()
        assert len(ids) >= len(engine.calls[0].token_ids) - 2 * 16
        many = [block("x", cache_control=KEPT)] * 5
        refused = await client.post(URL, json={"messages": [{"role": "user", "content": many}], "max_tokens": 1})
        await client.post(URL, json={**body, "cache_prompt": False})
    assert refused.status_code == 400 and "at most 4" in refused.json()["error"]["message"]
    assert len(engine.pinned) == 1


async def test_pins_end_in_time_and_each_use_makes_it_longer() -> None:
    now, engine = [0.0], FakeEngine()
    pins = Pins(engine, lambda: now[0])  # type: ignore[arg-type]
    assert await pins.keep("a", "", list(range(40)), 300) == 32
    assert await pins.keep("a", "", list(range(16, 32)), 3600) == 16
    now[0] = 200
    assert await pins.keep("a", "", list(range(32)), 300) == 32 and len(engine.pinned) == 2
    for now[0], left in ((499, 2), (500, 1), (3599, 1), (3600, 0)):
        await pins.expire()
        assert len(engine.pinned) == left
    assert pins.blocks == 0
    assert await pins.keep("a", "", list(range(15)), 300) == 0 and engine.pinned == {}


async def test_nobody_can_pin_more_than_a_part_of_the_pool() -> None:
    engine = FakeEngine()
    pins = Pins(engine)  # type: ignore[arg-type]
    most = engine.sizes.total_blocks // 4
    assert await pins.keep("a", "", [1] * 100_000, 300) == (most - 1) * 16
    assert pins.blocks == most
    # Another key has its part by the oldest pins of the one that has most.
    assert await pins.keep("b", "", [2] * 160, 300) == 160
    assert [ids[0] for ids in engine.pinned.values()] == [2]
    for token in range(3, 60):
        assert await pins.keep("a", "", [token] * 160, 300) == 160
    assert pins.blocks <= most and [ids[0] for ids in engine.pinned.values()].count(2) == 1
    # What begins alike is counted once.
    before = pins.blocks
    assert await pins.keep("b", "", [2] * 176, 300) == 176 and pins.blocks <= before + 2


async def test_a_pin_of_a_client_that_left_still_ends_in_time() -> None:
    class Slow(FakeEngine):
        async def pin(self, token_ids: Any, *, cache_salt: str = "") -> Any:
            made = await super().pin(token_ids, cache_salt=cache_salt)
            await asyncio.sleep(0.01)
            return made

    now, engine = [0.0], Slow()
    pins = Pins(engine, lambda: now[0])  # type: ignore[arg-type]
    task = asyncio.ensure_future(pins.keep("a", "", [1] * 16, 300))
    await until(lambda: engine.pinned)
    task.cancel()
    await until(lambda: pins.blocks)
    now[0] = 301
    await pins.expire()
    assert engine.pinned == {} and pins.blocks == 0


async def test_where_there_is_no_room_nothing_is_pinned_and_the_answer_comes() -> None:
    class Full(FakeEngine):
        async def pin(self, token_ids: Any, *, cache_salt: str = "") -> Any:
            raise OutOfMemory(1, 0)

    async with client_of(Full()) as client:
        body = {"messages": [{"role": "user", "content": "word " * 60}], "max_tokens": 1, "cache_control": KEPT}
        answer = await client.post(URL, json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["cache_creation_input_tokens"] == 0
