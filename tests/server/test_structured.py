"""Structured output over HTTP: every name for it, errors before anything is queued, and answers that validate."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from tests.server.asgi import client_of, events_of
from tests.server.fakes import FakeEngine

from pagedkv.engine import LLM, AsyncEngine, Structured, token_grammar
from pagedkv.models import shipped_model_path
from pagedkv.server import ServerConfig, create_app

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1},
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
LARK, GBNF = 'start: "a" | "b"', 'root ::= "a" | "b"'
NAMES: list[tuple[dict[str, Any], Structured]] = [
    ({"response_format": {"type": "json_object"}}, Structured(json=True)),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Structured(json=SCHEMA)),
    ({"response_format": FORMAT}, Structured(json=SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA}}, Structured(json=SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Structured(json=SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, Structured(json=True)),
    (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        Structured(json=True, whitespace=""),
    ),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, Structured(json=SCHEMA, whitespace=" ?")),
    ({"structured_outputs": {"regex": "[ab]"}}, Structured(regex="[ab]")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Structured(choice=["a", "b"])),
    ({"structured_outputs": {"grammar": LARK}}, Structured(grammar=LARK)),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, Structured(json=SCHEMA, whitespace="")),
    ({"guided_regex": "[ab]"}, Structured(regex="[ab]")),
    ({"guided_choice": ["a", "b"]}, Structured(choice=["a", "b"])),
    ({"guided_grammar": GBNF}, Structured(grammar=GBNF)),
    ({"json_schema": SCHEMA}, Structured(json=SCHEMA)),
    ({"grammar": GBNF}, Structured(grammar=GBNF)),
    ({"ebnf": GBNF}, Structured(grammar=GBNF)),
    ({"regex": "[ab]"}, Structured(regex="[ab]")),
]
NOTHING: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"response_format": {}},
    {"response_format": None, "structured_outputs": None, "guided_json": None},
    {"grammar": "", "guided_whitespace_pattern": " ?"},
]
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type", "Input should be 'text', 'json_object' or"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "expected a JSON Schema, got"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
        "response_format.json_schema.schema",
        "expected a JSON Schema that can be enforced, got Invalid type: strin",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "expected one of json, regex, choice and grammar, got none"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "got regex and choice"),
    ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "expected a regular expression, got"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "Input should be None"),
    ({"guided_json": {"uniqueItems": True}}, "guided_json", 'got Unimplemented keys: ["uniqueItems"]'),
    ({"guided_choice": []}, "guided_choice", "expected at least one string, got []"),
    ({"grammar": "root ::= other"}, "grammar", "got Rule 'other' not found"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "none beside response_format"),
]


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(("fields", "wanted"), NAMES)
async def test_every_name_for_a_structure_reaches_the_engine(path: str, fields: Any, wanted: Structured) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        answer = await client.post(path, json={**ASKED[path], **fields})
    assert answer.status_code == 200, answer.text
    got = engine.calls[0].params.structured
    assert got is not None and got.definition.replace(" ", "") == wanted.definition.replace(" ", "")
    assert engine.compiled == [got]
    assert "\nuser:" not in engine.calls[0].params.stop


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("fields", NOTHING)
async def test_what_asks_for_no_structure_changes_nothing(path: str, fields: Any) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        assert (await client.post(path, json={**ASKED[path], **fields})).status_code == 200
    assert engine.calls[0].params.structured is None


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(("fields", "param", "message"), WRONG)
async def test_a_wrong_structure_is_named_and_nothing_is_begun(
    path: str, fields: Any, param: str, message: str
) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        answer = await client.post(path, json={**ASKED[path], **fields, "stream": True})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"] and error["message"].startswith(param)
    assert engine.calls == []


@pytest.fixture(scope="module")
def engine() -> AsyncEngine:
    return AsyncEngine(LLM(shipped_model_path(), num_blocks=256))


def client_of_model(engine: AsyncEngine) -> httpx.AsyncClient:
    app = create_app(engine, ServerConfig(model_name="tiny"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60)


async def test_answers_of_the_shipped_model_follow_what_was_asked(engine: AsyncEngine) -> None:
    chat = {**ASKED[CHAT], "max_tokens": 200, "seed": 1}
    async with client_of_model(engine) as client:
        told = (await client.post(CHAT, json={**chat, "response_format": FORMAT, "n": 3})).json()
        streamed = (await client.post(CHAT, json={**chat, "response_format": FORMAT, "stream": True})).text
        chosen = (
            await client.post(COMPLETIONS, json={"prompt": "a", "guided_choice": ["yes", "no"], "seed": 1})
        ).json()
        cut = (await client.post(CHAT, json={**chat, "response_format": FORMAT, "max_tokens": 2})).json()
    for choice in told["choices"]:
        thing = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop" and thing.keys() == {"a", "b"}
        assert 0 <= thing["a"] <= 99 and thing["b"] in ("x", "y")
    deltas = [event["choices"][0] for event in events_of(streamed)]
    assert json.loads("".join(delta["delta"]["content"] for delta in deltas)).keys() == {"a", "b"}
    assert deltas[-1]["finish_reason"] == "stop" and len(deltas) > 2
    assert chosen["choices"][0]["text"] in ("yes", "no")
    assert cut["choices"][0]["finish_reason"] == "length"


async def test_what_no_text_can_follow_and_what_grows_too_complex_are_errors_of_the_client(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = type(token_grammar.parser_limits())(max_items_in_row=200, verbose_errors=False)
    monkeypatch.setattr(token_grammar, "parser_limits", lambda: few)
    wide = {"type": "object", "properties": {f"p{place}": {} for place in range(700)}, "required": ["p699"]}
    async with client_of_model(engine) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": "a", "guided_json": {"$ref": "#"}})
        broken = await client.post(COMPLETIONS, json={"prompt": "a", "guided_json": wide})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "guided_json"
    assert "one that no text follows" in answer.json()["error"]["message"]
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "grammar_too_complex"
    assert broken.json()["error"]["message"].startswith("structured: Parser Error")


async def test_a_schema_that_takes_long_holds_up_nobody_else() -> None:
    engine, go_on = FakeEngine(), threading.Event()
    engine.compile = lambda structured: go_on.wait(60)  # type: ignore[assignment]
    async with client_of(engine) as client:
        late = [asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "a", "regex": "b"})) for _ in range(9)]
        quick = [await client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}) for _ in range(4)]
        assert [answer.status_code for answer in quick] == [200] * 4
        assert not any(task.done() for task in late)
        go_on.set()
        assert {(await task).status_code for task in late} == {200}
