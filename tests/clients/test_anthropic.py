"""Anthropic's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from tests.clients.conftest import KEY, MODEL
from tests.server.local import Process

HELLO: Any = [{"role": "user", "content": "def f("}]
GREEDY = {"temperature": 0}
TOOL: Any = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server: Process) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def test_a_message(client: anthropic.Anthropic) -> None:
    told = client.messages.create(model=MODEL, max_tokens=8, messages=HELLO, system="be brief", extra_body=GREEDY)
    assert told.content[0].type == "text" and told.content[0].text
    assert told.stop_reason == "max_tokens" and told.usage.output_tokens == 8
    count = client.messages.count_tokens(model=MODEL, messages=HELLO, system="be brief")
    assert count.input_tokens == told.usage.input_tokens + told.usage.cache_read_input_tokens


def test_a_streamed_message(client: anthropic.Anthropic) -> None:
    body: Any = {"model": MODEL, "max_tokens": 12, "messages": HELLO, "extra_body": GREEDY}
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        text = "".join(stream.text_stream)
        told = stream.get_final_message()
    assert text == whole.content[0].text == told.content[0].text
    assert told.stop_reason == whole.stop_reason and told.usage.output_tokens == whole.usage.output_tokens


def test_where_it_stops(client: anthropic.Anthropic) -> None:
    body: Any = {"model": MODEL, "max_tokens": 12, "messages": HELLO, "extra_body": GREEDY}
    text = client.messages.create(**body).content[0].text
    told = client.messages.create(**body, stop_sequences=[text[3:5]])
    assert told.stop_reason == "stop_sequence" and told.stop_sequence == text[3:5]


def test_a_prompt_that_is_kept(client: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": "import os\n" * 60, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    first, second = (
        client.messages.create(model=MODEL, max_tokens=2, messages=HELLO, system=system).usage for _ in range(2)
    )
    assert first.cache_creation_input_tokens > 0 == second.cache_creation_input_tokens
    assert first.cache_creation.ephemeral_1h_input_tokens == first.cache_creation_input_tokens
    assert second.cache_read_input_tokens >= first.cache_read_input_tokens + first.cache_creation_input_tokens


def test_errors(server: Process, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is no model"):
        client.messages.create(model="other", max_tokens=1, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        client.messages.create(
            model=MODEL, max_tokens=2048, messages=HELLO, thinking={"type": "enabled", "budget_tokens": 1024}
        )
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=1, messages=HELLO)


def test_a_tool_that_is_called(client: anthropic.Anthropic) -> None:
    body: Any = {
        "model": MODEL,
        "max_tokens": 200,
        "messages": HELLO,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "weather"},
        "extra_body": {"seed": 3},
    }
    with client.messages.stream(**body) as stream:
        told = stream.get_final_message()
    (call,) = told.content
    assert told.stop_reason == "tool_use" and call.type == "tool_use" and set(call.input) == {"city"}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages: Any = [*HELLO, {"role": "assistant", "content": told.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(model=MODEL, max_tokens=4, messages=messages, tools=[TOOL]).id
