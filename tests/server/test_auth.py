"""Who may call, and whose prefixes a call may reuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.server.asgi import RawRequest, client_of, until
from tests.server.fakes import FakeEngine

from pagedkv.server import ServerConfig, create_app
from pagedkv.server.auth import Caller, name_of_caller, salt_of

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


def as_(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic alice", "alice", "Bearer alicé"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", URL), ("POST", "/tokenize"), ("POST", "/v1/cache/clear"), ("GET", "/v1/models"), ("GET", "/v1/models/x")],
)
async def test_without_a_key_there_is_nothing(header: str | None, method: str, path: str) -> None:
    engine = FakeEngine()
    async with client_of(engine, api_keys=("alice", "bob")) as client:
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        answer = await client.request(method, path, json={"prompt": "a"}, headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert engine.calls == [] and engine.cleared == 0


async def test_nobodys_body_is_awaited_before_it_is_known_who_sends_it() -> None:
    app = create_app(FakeEngine(), ServerConfig(api_keys=("alice",)))  # type: ignore[arg-type]
    request = RawRequest(app, URL, b"", as_("eve"))
    request.inbox = asyncio.Queue()
    task = request.start()
    await until(lambda: b"invalid_api_key" in request.body)
    assert request.status == 401
    request.leave()
    await asyncio.wait_for(task, 5)


async def test_health_and_version_need_no_key() -> None:
    async with client_of(FakeEngine(), api_keys=("alice",)) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/version")).json()["version"]


async def salts(**settings: Any) -> list[str]:
    """The salts of alice, alice with a salt of her own, bob, bob with the same salt, and alice again."""
    engine = FakeEngine()
    async with client_of(engine, **settings) as client:
        for key, salt in (("alice", None), ("alice", "s"), ("bob", None), ("bob", "s"), ("alice", None)):
            body = {"prompt": "a", "cache_salt": salt, "max_tokens": 1}
            assert (await client.post(URL, json=body, headers=as_(key))).status_code == 200
    return [call.options["cache_salt"] for call in engine.calls]


async def test_each_key_has_a_cache_of_its_own() -> None:
    found = await salts(api_keys=("alice", "bob"))
    assert len(set(found[:4])) == 4 and found[4] == found[0]
    assert not any("alice" in salt or "bob" in salt or salt == "s" for salt in found)


@pytest.mark.parametrize("shared_cache", [False, True])
async def test_each_key_has_its_own_turn_in_the_engine(shared_cache: bool) -> None:
    engine = FakeEngine()
    async with client_of(engine, api_keys=("alice", "bob"), shared_cache=shared_cache) as client:
        for key in ("alice", "bob", "alice"):
            assert (await client.post(URL, json={"prompt": "a", "max_tokens": 1}, headers=as_(key))).status_code == 200
    alice, bob, again = (call.options["tenant"] for call in engine.calls)
    assert alice == again != bob and "" not in (alice, bob)


async def test_a_cache_that_is_shared_on_request() -> None:
    found = await salts(api_keys=("alice", "bob"), shared_cache=True)
    assert found[0] == found[2] == found[4] == "" and found[1] == found[3] != ""


async def test_without_keys_all_share() -> None:
    found = await salts()
    assert found[0] == found[2] == "" and found[1] == found[3] != ""


def test_salts_cannot_be_forged() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""), ("abc", None), ("", "c"), ("", "\udc80")]
    made = [salt_of(Caller("", tenant), salt) for tenant, salt in parts]
    assert len(set(made)) == len(parts) - 1 and made[3] == made[4]


@pytest.mark.parametrize("path", ["/v1/cache/clear", "/reset_prefix_cache"])
@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({}, "", 200),
        ({"api_keys": ("alice",)}, "alice", 200),
        ({"api_keys": ("alice", "bob")}, "alice", 403),
        ({"api_keys": ("alice", "bob"), "shared_cache": True}, "alice", 200),
        ({"api_keys": ("alice", "bob"), "operator_keys": ("root",)}, "alice", 403),
        ({"api_keys": ("alice",), "operator_keys": ("root",)}, "alice", 403),
        ({"api_keys": ("alice", "bob"), "operator_keys": ("root",)}, "root", 200),
    ],
)
async def test_who_may_touch_the_cache_of_all(path: str, settings: dict[str, Any], key: str, status: int) -> None:
    engine = FakeEngine()
    async with client_of(engine, **settings) as client:
        answer = await client.post(path, headers={"content-type": "application/json", **(as_(key) if key else {})})
    assert answer.status_code == status
    assert engine.cleared == (status == 200)
    assert (
        answer.json() == {"cleared_blocks": 7} if status == 200 else answer.json()["error"]["code"] == "operator_only"
    )


async def test_web_pages_of_other_origins_may_not_call_unless_they_are_named() -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with client_of(FakeEngine()) as client:
        assert "access-control-allow-origin" not in (await client.get("/health", headers=asks)).headers
    async with client_of(FakeEngine(), allow_origins=("https://a.example",)) as client:
        answer = await client.options(URL, headers=asks)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({b"authorization": b"Bearer one"}, True),
        ({b"authorization": b"bearer  one "}, True),
        ({b"authorization": b"Basic one"}, False),
        ({b"authorization": b"one"}, False),
        ({b"authorization": b""}, False),
        ({}, False),
        ({b"x-api-key": b"one"}, True),
        ({b"x-api-key": b"two"}, False),
        ({b"x-api-key": b"one", b"authorization": b"Bearer two"}, False),
    ],
)
def test_a_key_comes_under_its_scheme_or_in_a_header_of_its_own(headers, known) -> None:
    assert (name_of_caller(ServerConfig(api_keys=("one",)), headers) is not None) is known
