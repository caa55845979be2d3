"""Ollama's client."""

from __future__ import annotations

import json
from typing import Any

import ollama
import pytest
from tests.clients.conftest import KEY, MODEL
from tests.server.local import Process

HELLO: Any = [{"role": "user", "content": "def f("}]
FEW: Any = {"num_predict": 8, "temperature": 0}


@pytest.fixture
def client(server: Process) -> ollama.Client:
    return ollama.Client(host=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)


def test_a_chat(client: ollama.Client) -> None:
    whole = client.chat(MODEL, HELLO, options=FEW)
    pieces = list(client.chat(f"{MODEL}:latest", HELLO, options=FEW, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert whole.done and pieces[-1].done and not pieces[0].done
    assert pieces[-1].eval_count == whole.eval_count == 8 and whole.prompt_eval_count
    assert 0 < whole.eval_duration < whole.total_duration


def test_a_prompt(client: ollama.Client) -> None:
    told = client.generate(MODEL, "import os\n\ndef main(", options=FEW)
    assert told.response and told.done_reason == "length"
    text = "".join(p.response for p in client.generate(MODEL, "import os\n\ndef main(", options=FEW, stream=True))
    assert text == told.response


def test_the_model(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == f"{MODEL}:latest"
    assert client.show(model.model).modelinfo["general.basename"] == MODEL
    with pytest.raises(ollama.ResponseError, match="there is no model"):
        client.show("other")


def test_an_answer_in_a_form(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    schema |= {"additionalProperties": False}
    told = client.chat(MODEL, HELLO, format=schema, options={"num_predict": 100})
    assert isinstance(json.loads(told.message.content)["age"], int)


def test_a_history_with_tools(client: ollama.Client) -> None:
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: Its name.
        """
        return city

    call = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
    messages: Any = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_name": "weather", "content": "sunny"}]
    assert client.chat(MODEL, messages, tools=[weather], options=FEW).done
