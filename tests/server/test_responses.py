"""/v1/responses: answers, the order of events, and conversations that go on."""

from __future__ import annotations

from typing import Any

import pytest
from tests.server.asgi import client_of, named_events
from tests.server.fakes import STORY, FakeEngine, shipped_tokenizer, story_tokens

from pagedkv.server.fair_store import FairStore

pytestmark = pytest.mark.anyio
URL = "/v1/responses"
WHOLE = len(story_tokens())
KEYS = ("key-a", "key-b")


def as_(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def prompts(engine: FakeEngine) -> list[str]:
    return [shipped_tokenizer().decode(call.token_ids, skip_special_tokens=True) for call in engine.calls]


async def test_an_answer() -> None:
    engine = FakeEngine(cached=3)
    body = {"input": "hello", "instructions": "be brief", "max_output_tokens": 3, "metadata": {"a": "b"}, "top_p": 0.5}
    async with client_of(engine) as client:
        told = (await client.post(URL, json=body, headers={"x-request-id": "mine"})).json()
    assert told["object"] == "response" and told["id"].startswith("resp_mine_") and told["metadata"] == {"a": "b"}
    assert told["status"] == "incomplete" and told["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = told["output"]
    assert item["type"] == "message" and item["role"] == "assistant" and item["status"] == "incomplete"
    assert item["content"][0]["text"] == shipped_tokenizer().decode(story_tokens()[:3])
    count = len(engine.calls[0].token_ids)
    assert told["usage"]["input_tokens"] == count and told["usage"]["total_tokens"] == count + 3
    assert told["usage"]["input_tokens_details"]["cached_tokens"] == 3
    assert prompts(engine) == ["system: be brief\n\nuser: hello\n\nassistant:"]
    assert engine.calls[0].params.max_tokens == 3 and engine.calls[0].params.top_p == 0.5


async def test_items_are_messages() -> None:
    engine = FakeEngine()
    parts = [{"type": "input_text", "text": "one "}, {"type": "input_text", "text": "two"}]
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "output_text", "text": "three", "annotations": []}], "id": "msg_1"},
        {"role": "user", "content": "four"},
    ]
    async with client_of(engine) as client:
        assert (await client.post(URL, json={"input": items, "max_output_tokens": 1})).status_code == 200
    assert prompts(engine) == ["system: be brief\n\nuser: one two\n\nassistant: three\n\nuser: four\n\nassistant:"]


async def test_a_stream_tells_the_events_in_order_and_ends_with_the_response() -> None:
    body = {"input": "hello", "max_output_tokens": WHOLE}
    async with client_of(FakeEngine()) as client:
        whole = (await client.post(URL, json=body)).json()
        answer = await client.post(URL, json={**body, "stream": True})
    events = named_events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[2]["item"]["status"] == "in_progress"
    assert "".join(event["delta"] for event in events[4:-4]) == STORY == events[-4]["text"]
    last = events[-1]["response"]
    assert {event["item_id"] for event in events[3:-2]} == {last["output"][0]["id"]}
    same = {"output", "id", "created_at"}
    assert {n: v for n, v in last.items() if n not in same} == {n: v for n, v in whole.items() if n not in same}
    assert last["output"][0]["content"] == whole["output"][0]["content"]


async def test_what_goes_wrong_in_a_stream_is_its_last_event() -> None:
    engine = FakeEngine()
    engine.fails_after = 2
    async with client_of(engine) as client:
        answer = await client.post(URL, json={"input": "hello", "stream": True})
        last = named_events(answer.text)[-1]
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert (await client.get(f"{URL}/{last['response']['id']}")).status_code == 404


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_goes_on(stream: bool) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        body = {"input": "hello", "instructions": "of the first alone", "max_output_tokens": WHOLE, "stream": stream}
        answer = await client.post(URL, json=body)
        first = named_events(answer.text)[-1]["response"] if stream else answer.json()
        assert (await client.get(f"{URL}/{first['id']}")).json() == first
        body = {"input": "more", "previous_response_id": first["id"], "max_output_tokens": WHOLE}
        second = (await client.post(URL, json=body)).json()
        assert second["previous_response_id"] == first["id"]
        deleted = await client.delete(f"{URL}/{first['id']}")
        assert deleted.json() == {"id": first["id"], "object": "response", "deleted": True}
        assert (await client.get(f"{URL}/{first['id']}")).status_code == 404
        await client.post(URL, json={**body, "previous_response_id": second["id"]})
        gone = await client.post(URL, json={**body, "previous_response_id": first["id"]})
    assert gone.status_code == 400 and gone.json()["error"]["code"] == "previous_response_not_found"
    said = f"user: hello\n\nassistant: {STORY}\n\nuser: more\n\nassistant:"
    assert prompts(engine)[1:] == [said, f"{said} {STORY}\n\nuser: more\n\nassistant:"]


async def test_one_key_never_sees_what_another_keeps() -> None:
    engine = FakeEngine()
    async with client_of(engine, api_keys=KEYS, shared_cache=True) as client:
        told = (await client.post(URL, json={"input": "hello"}, headers=as_("key-a"))).json()
        path, body = f"{URL}/{told['id']}", {"input": "x", "previous_response_id": told["id"]}
        for key, status in (("key-b", 404), ("key-a", 200)):
            assert (await client.get(path, headers=as_(key))).status_code == status
        assert (await client.post(URL, json=body, headers=as_("key-b"))).status_code == 400
        assert (await client.delete(path, headers=as_("key-b"))).status_code == 404
        assert (await client.get(path)).status_code == 401
        assert (await client.delete(path)).status_code == 401
        assert (await client.post(URL, json=body, headers=as_("key-a"))).status_code == 200
    assert len(engine.calls) == 2


async def test_what_is_not_to_be_kept_is_not() -> None:
    async with client_of(FakeEngine()) as client:
        told = (await client.post(URL, json={"input": "hello", "store": False})).json()
        assert told["store"] is False and (await client.get(f"{URL}/{told['id']}")).status_code == 404
    async with client_of(FakeEngine(), max_responses=0) as client:
        told = (await client.post(URL, json={"input": "hello"})).json()
        assert (await client.get(f"{URL}/{told['id']}")).status_code == 404


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("n", 2, "n"),
        ("input", [], "input"),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input"),
        ("background", True, "background"),
        ("conversation", "conv_1", "conversation"),
        ("include", ["message.output_text.logprobs"], "include"),
        ("reasoning", {"effort": "high"}, "reasoning"),
        ("truncation", "auto", "truncation"),
        ("max_output_tokens", 0, "max_output_tokens"),
        ("max_output_tokens", 10_000, "max_output_tokens"),
        ("tools", [{"type": "web_search"}], "tools"),
        ("text", {"format": {"type": "grammar"}}, "text.format.type"),
    ],
)
async def test_what_is_wrong_or_not_supported_is_refused_by_its_name_here(field: str, value: Any, param: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        answer = await client.post(URL, json={"input": "hello", field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and engine.calls == []


async def test_what_is_too_long_is_told_by_the_clients_name_of_it() -> None:
    async with client_of(FakeEngine()) as client:
        error = (await client.post(URL, json={"input": "hello " * 300})).json()["error"]
    assert error["param"] == "input" and error["message"].startswith("input: the prompt has")


def test_the_store_gives_up_the_oldest_of_who_has_most() -> None:
    store: FairStore[str] = FairStore(10)
    assert store.put("a", 1, "a1", {"x": 3}) == [] and store.put("b", 1, "b1", {"x": 3}) == []
    assert store.put("a", 2, "a2", {"x": 3, "y": 2}) == []  # a part that both have counts once
    assert store.used == 8
    assert store.put("b", 2, "b2", {"z": 3}) == ["b1"]
    assert store.used == 8 and store.get("b", 1) is None and store.get("a", 1) == "a1"
    assert store.put("c", 1, "c1", {"z": 11}) == ["c1"] and store.owners() == ["a", "b"]
    assert store.pop("a", 1) == "a1" and store.used == 8
    assert store.pop("a", 2) == "a2" and store.used == 3 and store.pop("a", 2) is None
    assert store.items("b") == [(2, "b2")]
