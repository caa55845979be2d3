"""Every failure is OpenAI's JSON object, names the field, and never the secret."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.server.asgi import RawRequest, client_of, events_of
from tests.server.fakes import FakeEngine

from pagedkv.errors import EngineDead, RequestRefused, bad_argument

pytestmark = pytest.mark.anyio
URL = "/v1/completions"
JSON = {"content-type": "application/json"}


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", URL, 405), ("PUT", "/health", 405)]
)
async def test_wrong_places(method: str, path: str, status: int) -> None:
    async with client_of(FakeEngine()) as client:
        error_of(await client.request(method, path), status)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": "a", "max_tokens": "x"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1e300}, "max_tokens"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 129}, "n"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": 3}, "stream_options"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5000": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "priority": -1}, "priority"),
        ({"prompt": "a", "stop_token_ids": [5000]}, "stop_token_ids"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
    ],
)
async def test_a_wrong_field_is_named(body: dict[str, Any], param: str) -> None:
    async with client_of(FakeEngine()) as client:
        error = error_of(await client.post(URL, json=body), 400)
    assert error["type"] == "invalid_request_error" and error["param"] == param and param in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "\xff"}',
        b"\xff\xfe",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_bodies_that_are_no_request(body: bytes) -> None:
    async with client_of(FakeEngine()) as client:
        error_of(await client.post(URL, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}'),
        ("/tokenize", b'{"prompt": "\\ud800"}'),
        ("/tokenize", b'{"messages": [{"role": "user", "content": "\\udfff"}]}'),
    ],
)
async def test_halves_of_surrogate_pairs_are_no_text(path: str, body: bytes) -> None:
    async with client_of(FakeEngine()) as client:
        error = error_of(await client.post(path, content=body, headers=JSON), 400)
    assert error["param"].startswith(("messages.0.content", "prompt"))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "system", "content": None}])
async def test_only_an_assistant_may_have_said_nothing(path: str, message: dict[str, Any]) -> None:
    mute = {"role": "assistant", "content": None}
    async with client_of(FakeEngine()) as client:
        error = error_of(await client.post(path, json={"messages": [mute, message]}), 400)
        assert error["param"] == "messages.1.content" and "expected a text" in error["message"]
        fine = await client.post(path, json={"messages": [mute, {"role": "user", "content": ""}]})
        assert fine.status_code == 200


async def test_a_body_that_does_not_say_that_it_is_json() -> None:
    """Nor can a web page send one across origins without asking first."""
    async with client_of(FakeEngine()) as client:
        answer = await client.post(URL, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
        assert error_of(answer, 415)["code"] == "unsupported_media_type"
        fine = await client.post(URL, content=b'{"prompt": "a"}', headers={"content-type": "application/json; a=b"})
        assert fine.status_code == 200


async def test_an_unknown_model() -> None:
    async with client_of(FakeEngine()) as client:
        for answer in (await client.post(URL, json={"prompt": "a", "model": "x"}), await client.get("/v1/models/x")):
            error = error_of(answer, 404)
            assert error["code"] == "model_not_found" and error["param"] == "model"


async def test_too_long_prompts_are_told_the_numbers() -> None:
    async with client_of(FakeEngine(max_positions=64), max_prompt_tokens=20) as client:
        long = error_of(await client.post(URL, json={"prompt": [5] * 21, "max_tokens": 1}), 400)
        much = error_of(await client.post(URL, json={"prompt": [5] * 20, "max_tokens": 45}), 400)
        chat = {"messages": [{"role": "user", "content": "x = 1\n" * 30}]}
        error_of(await client.post("/v1/chat/completions", json=chat), 400)
        assert (await client.post(URL, json={"prompt": [5] * 20, "max_tokens": 44})).status_code == 200
    assert "21 tokens" in long["message"] and "20" in long["message"] and long["code"] == "context_length_exceeded"
    assert "64" in much["message"] and "65" in much["message"] and much["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (RequestRefused("it needs 9 blocks, there are 4"), 400, "9 blocks"),
        (RequestRefused("the queue is full", retry_after=7), 429, "queue"),
        (bad_argument("priority", "at most 2", "5"), 400, "at most 2"),
        (EngineDead("a step failed"), 503, "engine"),
        (RuntimeError("secret words"), 500, "foresee"),
    ],
)
async def test_what_the_engine_raises(error: Exception, status: int, text: str, stream: bool) -> None:
    engine = FakeEngine()
    engine.error = error
    async with client_of(engine) as client:
        answer = await client.post(URL, json={"prompt": "a", "stream": stream})
    told = error_of(answer, status)
    assert text in told["message"] and "secret" not in answer.text
    assert answer.headers.get("retry-after") == ("7" if status == 429 else None)
    assert told["param"] == ("priority" if "priority" in str(error) else None)


async def test_a_fault_in_the_middle_of_a_stream_is_its_last_event(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(delay=0.001)
    engine.fails_after = 3
    async with client_of(engine) as client:
        app = client.app  # type: ignore[attr-defined]
        request = RawRequest(app, URL, {"prompt": "a", "stream": True})
        await request.start()
    *_, last = events_of(request.body.decode())
    assert request.status == 200 and last["error"]["type"] == "server_error"
    assert engine.running == 0


async def test_logs_tell_what_happened_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    caplog.set_level(logging.DEBUG)
    async with client_of(engine, api_keys=("key-of-alice",)) as client:
        headers = {"authorization": "Bearer key-of-alice", "x-request-id": "mine-1"}
        body = {"prompt": "very private words", "user": "private", "session_id": "private", "max_tokens": 2}
        answer = await client.post(URL, json=body, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        await client.post(URL, json={**body, "n": "private"}, headers=headers)
        engine.error = RuntimeError("private")
        await client.post(URL, json=body, headers=headers)
        odd = await client.get("/nothing", headers={"x-request-id": "a\tb" * 100})
    records = [record for record in caplog.records if record.name == "pagedkv.server"]
    facts = [record.facts for record in records]  # type: ignore[attr-defined]
    assert facts[0] | {"seconds": 0, "first_token_seconds": 0} == {
        "id": "mine-1",
        "method": "POST",
        "path": URL,
        "status": 200,
        "seconds": 0,
        "key": facts[0]["key"],
        "prompts": 1,
        "prompt_tokens": facts[0]["prompt_tokens"],
        "completion_tokens": 2,
        "cached_tokens": 0,
        "first_token_seconds": 0,
    }
    assert [fact["status"] for fact in facts if "status" in fact] == [200, 400, 500, 404]
    text = " ".join(record.getMessage() + str(getattr(record, "facts", "")) for record in records)
    assert "private" not in text and "alice" not in text
    assert odd.headers["x-request-id"].isalnum()
