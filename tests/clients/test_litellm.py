"""litellm, by each of the APIs."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from tests.clients.conftest import KEY, MODEL
from tests.server.local import Process

HELLO: Any = [{"role": "user", "content": "def f("}]
WAYS = [
    ("openai", "/v1"),
    ("hosted_vllm", "/v1"),
    ("text-completion-openai", "/v1"),
    ("anthropic", ""),
    ("ollama_chat", ""),
]


@pytest.mark.parametrize(("provider", "path"), WAYS)
def test_an_answer(server: Process, provider: str, path: str) -> None:
    body: Any = {
        "model": f"{provider}/{MODEL}",
        "messages": HELLO,
        "api_base": f"{server.url}{path}",
        "api_key": KEY,
        "max_tokens": 8,
        "temperature": 0,
        "extra_headers": {"Content-Type": "application/json"},  # which it leaves out where it speaks to Ollama
    }
    whole = litellm.completion(**body)
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 8
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**body, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_response(server: Process) -> None:
    told = litellm.responses(
        model=f"openai/{MODEL}", input="def f(", api_base=f"{server.url}/v1", api_key=KEY, max_output_tokens=8
    )
    assert told.output[0].content[0].text
