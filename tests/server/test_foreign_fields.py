"""Fields of OpenAI, vLLM and llama.cpp that this server does not have: honoured, refused by name, or ignored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tests.server.asgi import client_of
from tests.server.fakes import FakeEngine, shipped_tokenizer

from pagedkv.server.messages import MessagesRequest
from pagedkv.server.ollama import OllamaChat, OllamaPrompt, Options
from pagedkv.server.responses import ResponsesRequest
from pagedkv.server.schemas import (
    NOT_HONOURED,
    OTHER_NAMES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    RequestBody,
    TokenizeRequest,
)

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "hello"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
}
FOREIGN = {
    "/v1/completions": NOT_HONOURED.keys() - CompletionRequest.model_fields.keys(),
    "/v1/chat/completions": NOT_HONOURED.keys() - ChatRequest.model_fields.keys(),
    "/tokenize": NOT_HONOURED.keys() - TokenizeRequest.model_fields.keys(),
}
PAGE = Path(__file__).parents[2] / "docs" / "api-fields.md"


@pytest.mark.parametrize("path", ASKED)
async def test_what_would_change_the_answer_is_refused_by_name(path: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        for name in FOREIGN[path]:
            answer = await client.post(path, json={**ASKED[path], name: {"something": "else"}})
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == name and error["code"] == "unsupported_parameter"
            assert engine.calls == []


@pytest.mark.parametrize("path", ASKED)
async def test_the_values_that_change_nothing_are_taken(path: str) -> None:
    names = FOREIGN[path]
    async with client_of(FakeEngine()) as client:
        for place in range(max(map(len, NOT_HONOURED.values())) + 1):
            values = {name: (None, *NOT_HONOURED[name])[place:][:1] for name in names}
            body = {**ASKED[path], **{name: value[0] for name, value in values.items() if value}}
            assert (await client.post(path, json=body)).status_code == 200


OTHERS: dict[str, tuple[type[RequestBody], dict[str, Any]]] = {
    "/v1/responses": (ResponsesRequest, {"input": "a", "max_output_tokens": 1}),
    "/v1/messages": (MessagesRequest, {"messages": MESSAGES, "max_tokens": 1}),
    "/api/chat": (OllamaChat, {"messages": MESSAGES, "stream": False}),
    "/api/generate": (OllamaPrompt, {"prompt": "a", "stream": False}),
}


@pytest.mark.parametrize("path", OTHERS)
async def test_other_apis_refuse_and_take_in_the_same_manner(path: str) -> None:
    engine, (schema, asked) = FakeEngine(), OTHERS[path]
    foreign = {**NOT_HONOURED, **schema.not_honoured}
    async with client_of(engine) as client:
        for name in foreign.keys() - schema.model_fields.keys():
            answer = await client.post(path, json={**asked, name: {"something": "else"}})
            assert answer.status_code == 400 and f"{name}: not supported" in answer.text
            same = [None, *foreign[name]]
            assert (await client.post(path, json={**asked, name: same[-1]})).status_code == 200
        for name in NOT_HONOURED.keys() - Options.model_fields.keys() if path.startswith("/api") else ():
            answer = await client.post(path, json={**asked, "options": {name: {"something": "else"}}})
            assert answer.status_code == 400 and f"{name}: not supported" in answer.text


async def test_what_a_message_would_lose_is_refused_by_name() -> None:
    message: dict[str, Any] = {"role": "assistant", "content": "x", "reasoning_content": "because"}
    async with client_of(FakeEngine()) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": [message]})
        message["reasoning_content"] = ""
        assert (await client.post("/v1/chat/completions", json={"messages": [message]})).status_code == 200
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning_content"


async def test_the_names_of_llama_cpp() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        body = {"prompt": "a", "repeat_penalty": 1.5, "n_predict": 3}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        twice = await client.post("/v1/completions", json={**body, "repetition_penalty": 1.5, "max_tokens": None})
        torn = await client.post("/v1/completions", json={**body, "repetition_penalty": 2})
        wrong = await client.post("/v1/completions", json={"prompt": "a", "repeat_penalty": -1})
        bare = await client.post("/tokenize", json={"prompt": "a", "add_special": False})
    assert [call.params.repetition_penalty for call in engine.calls] == [1.5, 1.5]
    assert [call.params.max_tokens for call in engine.calls] == [3, 3]
    assert twice.status_code == 200 and torn.status_code == 400 and torn.json()["error"]["param"] == "repeat_penalty"
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "repetition_penalty"
    assert bare.json()["tokens"] == shipped_tokenizer()("a", add_special_tokens=False)["input_ids"]


async def test_a_prompt_that_is_not_to_be_cached_finds_nothing() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        for value in (False, False, True, None):
            body = {"prompt": "a", "max_tokens": 1, "cache_prompt": value}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    salts = [call.options["cache_salt"] for call in engine.calls]
    assert len(set(salts)) == 3 and salts[2] == salts[3] == ""


async def test_special_tokens_as_asked() -> None:
    engine, first = FakeEngine(), shipped_tokenizer().bos_token_id
    async with client_of(engine) as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for asked in (None, True, False):
                await client.post(path, json={**ASKED[path], "add_special_tokens": asked})
    assert [call.token_ids[0] == first for call in engine.calls] == [True, True, False] * 2


async def test_a_chat_template_is_told_what_the_client_says() -> None:
    engine = FakeEngine()
    body = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"mood": "calm"}}
    template = "{{ messages[0].content }} {{ mood }}"
    async with client_of(engine, chat_template=template) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        told = (await client.post("/tokenize", json={**body, "max_tokens": None})).json()
        for name in ("chat_template", "tokenize", "messages", "conversation", "tools"):
            answer = await client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {name: "x"}})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"
    assert shipped_tokenizer().decode(engine.calls[0].token_ids) == "hello calm"
    assert told["tokens"] == engine.calls[0].token_ids and len(engine.calls) == 1
    async with client_of(engine) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"
        assert (await client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {}})).status_code == 200


async def test_what_cannot_change_the_answer_is_ignored() -> None:
    ignored = {"store": True, "metadata": {"a": "b"}, "service_tier": "flex"}
    async with client_of(FakeEngine()) as client:
        for path, body in ASKED.items():
            assert (await client.post(path, json={**body, **ignored})).status_code == 200


# The tables of docs/api-fields.md.

IGNORED = {"user", "prompt_cache_key"}  # fields that we know by name and that have no effect
SCHEMAS = {"chats": ChatRequest, "completions": CompletionRequest}


def tables(heading: str) -> dict[str, list[str]]:
    """Return the cells of each field in the tables below a heading."""
    part = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:3] == "| `"]
    names = [row[0].strip("`") for row in rows]
    assert len(set(names)) == len(names)
    return {name: row[1:] for name, row in zip(names, rows, strict=True)}


def status(name: str, schema: type[RequestBody]) -> str:
    """Return what becomes of a field."""
    if name in IGNORED:
        return "no effect"
    if name in schema.model_fields:
        return "yes"
    return "refused" if name in NOT_HONOURED else "no effect"


def test_the_tables_say_what_becomes_of_every_field() -> None:
    rows = tables("Chats and completions")
    expected = {name: [status(name, schema) for schema in SCHEMAS.values()] for name in rows}
    assert {name: cells[:2] for name, cells in rows.items()} == expected
    assert ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys() <= rows.keys()
    of_messages = tables("Messages")
    assert {name: cells[0] for name, cells in of_messages.items()} == {
        name: status(name, ChatMessage) for name in of_messages
    }
    assert ChatMessage.model_fields.keys() <= of_messages.keys()
    (others,) = [part for part in PAGE.read_text().split("\n\n") if part.startswith("Refused are")]
    listed = set(re.findall(r"`(\w+)`", others))
    assert listed <= NOT_HONOURED.keys() <= listed | of_messages.keys() | rows.keys()
    assert not listed & rows.keys() and all(f"`{name}`" in PAGE.read_text() for name in OTHER_NAMES)


def test_the_table_of_responses_says_what_becomes_of_every_field() -> None:
    for name, (told, _) in tables("Responses").items():
        refused = name in ResponsesRequest.not_honoured
        assert told == ("refused" if refused else status(name, ResponsesRequest)), name


def test_the_tables_have_every_field_of_the_official_client() -> None:
    pytest.importorskip("openai")
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chats
    from openai.types.responses import response_create_params as responses

    rows = tables("Chats and completions")
    for params in (chats.CompletionCreateParamsStreaming, completions.CompletionCreateParamsStreaming):
        names = get_type_hints(params).keys()
        assert "stream" in names and names - rows.keys() == set()
    names = get_type_hints(responses.ResponseCreateParamsStreaming).keys()
    assert "stream" in names and names - tables("Responses").keys() == set()
