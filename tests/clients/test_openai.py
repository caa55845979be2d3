"""OpenAI's client: responses, tools in streams, parsed answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from tests.clients.conftest import KEY, MODEL
from tests.server.local import Process

LONG = "import os\nimport sys\n\n" * 12
TOOL: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


class Person(BaseModel):
    kind: Literal["user", "admin"]
    age: Annotated[int, Field(ge=0, le=150)]  # of a number without bounds a model of 4M writes digits without end


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def test_a_response(client: openai.OpenAI) -> None:
    told = client.responses.create(model=MODEL, input="def f(", max_output_tokens=8, temperature=0)
    assert told.output_text and told.status == "incomplete" and told.incomplete_details.reason == "max_output_tokens"
    assert told.usage.output_tokens == 8
    assert client.responses.retrieve(told.id).output_text == told.output_text
    client.responses.delete(told.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(told.id)


def test_a_streamed_response(client: openai.OpenAI) -> None:
    body: Any = {"model": MODEL, "input": "def f(", "max_output_tokens": 12, "temperature": 0, "store": False}
    whole = client.responses.create(**body)
    with client.responses.stream(**body) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    events = list(client.responses.create(**body, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


def test_a_conversation_goes_on_at_the_cost_of_what_is_new(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=LONG, max_output_tokens=16, temperature=0)
    second = client.responses.create(
        model=MODEL, input="more", previous_response_id=first.id, max_output_tokens=4, temperature=0
    )
    before, now = first.usage, second.usage
    assert now.input_tokens > before.input_tokens
    assert before.input_tokens - 32 <= now.input_tokens_details.cached_tokens < now.input_tokens
    other = client.with_options(api_key="key-b")
    with pytest.raises(openai.BadRequestError, match="there is no response"):
        other.responses.create(model=MODEL, input="more", previous_response_id=first.id)


def test_an_answer_that_is_parsed(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "who?"}]
    chat = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Person, max_tokens=200)
    assert isinstance(chat.choices[0].message.parsed, Person)
    response = client.responses.parse(model=MODEL, input="who?", text_format=Person, max_output_tokens=200)
    assert isinstance(response.output_parsed, Person)


def test_a_tool_that_is_called_in_a_stream(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "the weather in Bern?"}]
    body: Any = {
        "model": MODEL,
        "messages": messages,
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
        "seed": 3,
    }
    with client.chat.completions.stream(**body) as stream:
        for _ in stream:
            pass
        told = stream.get_final_completion().choices[0]
    (call,) = told.message.tool_calls
    assert told.finish_reason in ("tool_calls", "stop") and set(json.loads(call.function.arguments)) == {"city", "days"}
    # What came of it goes back.
    messages += [told.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4).choices[0].message.content


def test_a_tool_that_a_response_calls(client: openai.OpenAI) -> None:
    body: Any = {
        "model": MODEL,
        "input": "the weather in Bern?",
        "tools": [{"type": "function", **TOOL}],
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 200,
        "extra_body": {"seed": 3},
    }
    events = list(client.responses.create(**body, stream=True))
    told = events[-1].response
    (call,) = told.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"city", "days"}
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(model=MODEL, input=result, previous_response_id=told.id, max_output_tokens=4).id
