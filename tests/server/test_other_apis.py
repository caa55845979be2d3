"""What responses, messages and Ollama's chats have in common with chats: tools, histories, clients that leave."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.server.asgi import RawRequest, client_of, named_events, until
from tests.server.fakes import FakeEngine, shipped_tokenizer
from tests.server.test_tools import WEATHER

pytestmark = pytest.mark.anyio
SAYS = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Basel"}}\n</tool_call>'
)
CITIES = [{"city": "Bern"}, {"city": "Basel"}]
HELLO = [{"role": "user", "content": "hello"}]
FUNCTION: dict[str, Any] = WEATHER["function"]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hello", "tools": [{"type": "function", **FUNCTION}], "stream": True},
    "/v1/messages": {
        "messages": HELLO,
        "max_tokens": 200,
        "tools": [{"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}],
        "stream": True,
    },
    "/api/chat": {"messages": HELLO, "tools": [WEATHER]},
}


async def ask(path: str, **more: Any) -> Any:
    async with client_of(FakeEngine(says=SAYS, max_positions=2048)) as client:
        return await client.post(path, json={**ASKED[path], **more})


async def test_a_response_tells_its_calls() -> None:
    whole = (await ask("/v1/responses", stream=False)).json()
    events = named_events((await ask("/v1/responses")).text)
    for output in (whole["output"], events[-1]["response"]["output"]):
        text, *calls = output
        assert text["content"][0]["text"].strip() == "I look." and text["status"] == "completed"
        assert [json.loads(call["arguments"]) for call in calls] == CITIES
        assert all(call["type"] == "function_call" and call["name"] == "get_weather" for call in calls)
        assert len({call["call_id"] for call in calls} | {call["id"] for call in output}) == 5
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    kinds = [kind for place, kind in enumerate(kinds) if kinds[place - 1] != kind]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    assert kinds == ["created", "in_progress", *message, "output_item.done", *call, *call, "completed"]
    for place in (1, 2):
        mine = [event for event in events if event.get("output_index") == place]
        deltas = "".join(event.get("delta", "") for event in mine)
        assert json.loads(deltas) == CITIES[place - 1]
        assert {event["item_id"] for event in mine if "item_id" in event} == {mine[0]["item"]["id"]}


async def test_a_message_tells_its_calls() -> None:
    whole = (await ask("/v1/messages", stream=False)).json()
    text, *calls = whole["content"]
    assert text["text"].strip() == "I look." and [call["input"] for call in calls] == CITIES
    assert whole["stop_reason"] == "tool_use" and len({call["id"] for call in calls}) == 2
    events = named_events((await ask("/v1/messages")).text)
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == ["text", "tool_use", "tool_use"]
    assert [start["input"] for start in starts[1:]] == [{}, {}]
    for index in (1, 2):
        mine = [
            event["delta"] for event in events if event["type"] == "content_block_delta" and event["index"] == index
        ]
        assert json.loads("".join(delta["partial_json"] for delta in mine)) == CITIES[index - 1]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert stops == [0, 1, 2] and events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_chat_of_ollama_tells_its_calls() -> None:
    whole = (await ask("/api/chat", stream=False)).json()
    lines = [json.loads(line) for line in (await ask("/api/chat")).text.splitlines()]
    assert whole["message"]["content"].strip() == "I look." and whole["done_reason"] == "stop"
    for message in (whole["message"], lines[-2]["message"]):
        assert [call["function"]["arguments"] for call in message["tool_calls"]] == CITIES
    assert lines[-1]["done"] and "tool_calls" not in lines[-1]["message"]
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]


async def test_histories_with_tools_are_those_of_a_chat() -> None:
    arguments = {"city": "Bern"}
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    chat = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat += [{"role": "tool", "tool_call_id": "a", "content": "21"}]
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": chat, "max_tokens": 1},
        "/v1/responses": {
            "max_output_tokens": 1,
            "input": [
                *HELLO,
                {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": json.dumps(arguments)},
                {"type": "function_call_output", "call_id": "a", "output": "21"},
            ],
        },
        "/v1/messages": {
            "max_tokens": 1,
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "get_weather", "input": arguments}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "21"}]},
            ],
        },
        "/api/chat": {
            "options": {"num_predict": 1},
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "get_weather", "arguments": arguments}}],
                },
                {"role": "tool", "tool_name": "get_weather", "content": "21"},
            ],
        },
    }
    engine = FakeEngine(max_positions=1024)
    async with client_of(engine) as client:
        for path, body in asked.items():
            assert (await client.post(path, json=body)).status_code == 200
    prompts = {shipped_tokenizer().decode(call.token_ids) for call in engine.calls}
    assert len(engine.calls) == 4 and len(prompts) == 1


async def test_the_last_word_of_an_assistant_is_gone_on_with() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        messages = [*HELLO, {"role": "assistant", "content": "I s"}]
        await client.post("/v1/messages", json={"messages": messages, "max_tokens": 1})
    prompt = shipped_tokenizer().decode(engine.calls[0].token_ids, skip_special_tokens=True)
    assert prompt == "user: hello\n\nassistant: I s"


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_what_it_asked_for(path: str, stream: bool) -> None:
    engine = FakeEngine(delay=0.01, max_positions=4096)
    more = {"max_tokens": 1000} if path == "/v1/messages" else {}
    async with client_of(engine) as client:
        server = client.app.state.server  # type: ignore[attr-defined]
        request = RawRequest(client.app, path, {**ASKED[path], "stream": stream, **more})  # type: ignore[attr-defined]
        task = request.start()
        await until(lambda: request.sent if stream else engine.running)
        request.leave()
        await task
        await until(lambda: not engine.running)
        assert engine.calls[0].ended == "aborted" and server.admission.inside == 0
        assert server.responses.used == 0
