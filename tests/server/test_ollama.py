"""Ollama's /api: chats, prompts, lines, counts and durations, and the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.server.asgi import client_of
from tests.server.fakes import STORY, FakeEngine, shipped_tokenizer, story_tokens

from pagedkv import __version__

pytestmark = pytest.mark.anyio
WHOLE = len(story_tokens())
HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[me]"
COUNTS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"}


def prompts(engine: FakeEngine) -> list[str]:
    return [shipped_tokenizer().decode(call.token_ids, skip_special_tokens=True) for call in engine.calls]


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_a_chat_is_lines_unless_it_says_otherwise() -> None:
    engine = FakeEngine(delay=0.001)
    options = {"num_predict": WHOLE, "temperature": 0, "top_k": 5, "repeat_penalty": 1.1, "num_ctx": 4096, "seed": 7}
    body = {"model": "tiny:latest", "messages": HELLO, "options": options}
    async with client_of(engine) as client:
        answer = await client.post("/api/chat", json=body)
        whole = (await client.post("/api/chat", json={**body, "stream": False})).json()
    assert answer.headers["content-type"] == "application/x-ndjson"
    *lines, last = lines_of(answer.text)
    assert "".join(line["message"]["content"] for line in lines) == STORY == whole["message"]["content"]
    assert not any(line["done"] or COUNTS & line.keys() for line in lines)
    for end in (last, whole):
        assert end["done"] and end["done_reason"] == "length" and COUNTS <= end.keys() and end["model"] == "tiny"
        assert end["eval_count"] == WHOLE and end["prompt_eval_count"] == len(engine.calls[0].token_ids)
        assert 0 <= end["eval_duration"] <= end["total_duration"]
        assert 0 <= end["prompt_eval_duration"] <= end["total_duration"]
    assert prompts(engine)[0] == "system: be brief\n\nuser: hello\n\nassistant:"
    params = engine.calls[0].params
    assert (params.temperature, params.top_k, params.repetition_penalty, params.seed) == (0, 5, 1.1, 7)


async def test_a_prompt_is_a_chat_where_there_is_a_template() -> None:
    engine = FakeEngine()
    async with client_of(engine, chat_template=TEMPLATE) as client:
        body = {"prompt": "import", "system": "be brief", "options": {"num_predict": 2}}
        *_, last = lines_of((await client.post("/api/generate", json=body)).text)
        assert last["done"] and last["response"] == "" and last["eval_count"] == 2
        raw = (await client.post("/api/generate", json={**body, "raw": True, "stream": False})).json()
    assert raw["response"] == shipped_tokenizer().decode(story_tokens()[:2])
    assert prompts(engine) == ["[system]be brief[user]import[me]", "import"]


async def test_without_a_template_the_model_goes_on_from_the_prompt_as_far_as_there_is_room() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        told = (await client.post("/api/generate", json={"prompt": "import", "stream": False})).json()
    assert prompts(engine) == ["import"]
    assert engine.calls[0].params.max_tokens == 256 - len(engine.calls[0].token_ids) == told["eval_count"]


async def test_an_empty_request_asks_whether_the_model_is_there() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        for path, body in (("/api/chat", {"messages": []}), ("/api/generate", {"keep_alive": "5m"})):
            (line,) = lines_of((await client.post(path, json=body)).text)
            assert line["done"] and line["done_reason"] == "load"
            assert (await client.post(path, json={**body, "model": "other"})).status_code == 404
    assert engine.calls == []


async def test_the_model_is_described() -> None:
    async with client_of(FakeEngine(), chat_template=TEMPLATE, api_keys=("one",)) as client:
        assert (await client.get("/api/tags")).status_code == 401
        client.headers["authorization"] = "Bearer one"
        (tag,) = (await client.get("/api/tags")).json()["models"]
        assert tag["name"] == tag["model"] == "tiny:latest" and len(tag["digest"]) == 64
        shown = (await client.post("/api/show", json={"model": tag["name"]})).json()
        assert shown["template"] == TEMPLATE and "completion" in shown["capabilities"]
        assert shown["model_info"]["pagedkv.context_length"] == 256
        assert (await client.get("/api/version")).json() == {"version": __version__}
        missing = await client.post("/api/show", json={"model": "other"})
        assert missing.status_code == 404 and list(missing.json()) == ["error"] and "other" in missing.json()["error"]


async def test_what_goes_wrong_in_a_stream_is_its_last_line() -> None:
    engine = FakeEngine()
    engine.fails_after = 2
    async with client_of(engine) as client:
        answer = await client.post("/api/chat", json={"messages": HELLO})
    assert list(lines_of(answer.text)[-1]) == ["error"] and "secret" not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/api/chat", {"messages": HELLO, "think": True}, "think"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["eA=="]}]}, "images"),
        ("/api/chat", {"messages": HELLO, "options": {"mirostat": 2}}, "mirostat"),
        ("/api/chat", {"messages": HELLO, "options": {"temperature": -1}}, "temperature"),
        ("/api/chat", {"messages": HELLO, "options": {"num_predict": 9999}}, "This model's maximum context"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/api/generate", {"prompt": "x", "context": [1]}, "context"),
        ("/api/generate", {"prompt": "x", "template": "y"}, "template"),
        ("/api/generate", {"prompt": "hello " * 300}, "prompt"),
    ],
)
async def test_what_is_wrong_or_not_supported_is_refused_by_name(path: str, body: dict[str, Any], words: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"].startswith(words) and engine.calls == []
