"""Fields of OpenAI, vLLM and llama.cpp that this server does not have: honoured, refused by name, or ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.server.asgi import client_of
from tests.server.fakes import FakeEngine, shipped_tokenizer

from pagedkv.server.schemas import NOT_HONOURED, OTHER_NAMES

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "hello"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
}
OWN = {"/v1/completions": {"echo", "best_of"}}
PAGE = Path(__file__).parents[2] / "docs" / "server.md"


@pytest.mark.parametrize("path", ASKED)
async def test_what_would_change_the_answer_is_refused_by_name(path: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        for name in NOT_HONOURED.keys() - OWN.get(path, set()):
            answer = await client.post(path, json={**ASKED[path], name: {"something": "else"}})
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == name and error["code"] == "unsupported_parameter"
            assert engine.calls == []


@pytest.mark.parametrize("path", ASKED)
async def test_the_values_that_change_nothing_are_taken(path: str) -> None:
    names = NOT_HONOURED.keys() - OWN.get(path, set())
    async with client_of(FakeEngine()) as client:
        for place in range(max(map(len, NOT_HONOURED.values())) + 1):
            values = {name: (None, *NOT_HONOURED[name])[place:][:1] for name in names}
            body = {**ASKED[path], **{name: value[0] for name, value in values.items() if value}}
            assert (await client.post(path, json=body)).status_code == 200


async def test_what_a_message_would_lose_is_refused_by_name() -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}
    async with client_of(FakeEngine()) as client:
        answer = await client.post("/v1/chat/completions", json={"messages": [message]})
        message["tool_calls"] = []
        assert (await client.post("/v1/chat/completions", json={"messages": [message]})).status_code == 200
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_calls"


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
    ignored = {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "parallel_tool_calls": False}
    async with client_of(FakeEngine()) as client:
        for path, body in ASKED.items():
            assert (await client.post(path, json={**body, **ignored})).status_code == 200


def test_the_guide_lists_all_of_them() -> None:
    page = PAGE.read_text()
    assert [name for name in (*NOT_HONOURED, *OTHER_NAMES) if f"`{name}`" not in page] == []
