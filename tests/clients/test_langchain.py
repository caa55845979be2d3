"""langchain-openai."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr
from tests.clients.conftest import KEY, MODEL
from tests.server.local import Process


class Person(BaseModel):
    """Somebody."""

    kind: Literal["user", "admin"]
    age: Annotated[int, Field(ge=0, le=150)]  # of a number without bounds a model of 4M writes digits without end


@tool
def weather(days: Annotated[int, Field(ge=0, le=30)]) -> str:
    """Tell the weather."""
    return f"sunny for {days} days"


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def chat(server: Process, request: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key=SecretStr(KEY),
        max_retries=0,
        timeout=120,
        max_completion_tokens=200,
        use_responses_api=request.param,
    )


def test_an_answer(chat: ChatOpenAI) -> None:
    told = chat.invoke("def f(")
    assert told.text and told.usage_metadata["output_tokens"] > 0
    assert "".join(piece.text for piece in chat.stream("def f("))


def test_an_answer_in_a_form(chat: ChatOpenAI) -> None:
    assert isinstance(chat.with_structured_output(Person, method="json_schema").invoke("who?"), Person)


def test_a_tool_that_is_called(chat: ChatOpenAI) -> None:
    told = chat.bind_tools([weather], tool_choice="weather").invoke("the weather?")
    (call,) = told.tool_calls
    assert call["name"] == "weather" and isinstance(call["args"]["days"], int)
