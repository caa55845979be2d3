"""What a web page can make its reader's browser do to a server that only the reader reaches: nothing."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute
from tests.server.asgi import client_of
from tests.server.fakes import FakeEngine

from pagedkv.server.app import ROUTERS

pytestmark = pytest.mark.anyio
BODY = {"prompt": "a", "max_tokens": 1}
CLEARS = ("/v1/cache/clear", "/reset_prefix_cache")
POSTS = sorted(
    route.path
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and "POST" in route.methods
)


@pytest.mark.parametrize("path", POSTS)
async def test_a_page_of_another_origin_cannot_post(path: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        for origin in ("https://evil.example", "null", "http://localhost:3000", "http://localhost.evil.example", ""):
            answer = await client.post(path, json=BODY, headers={"origin": origin})
            assert answer.status_code == 403 and "allow-origin" in answer.text, origin
    assert engine.calls == [] and engine.cleared == 0


@pytest.mark.parametrize("path", POSTS)
async def test_every_post_says_that_it_is_json(path: str) -> None:
    """A browser sends these types across origins without asking first."""
    engine = FakeEngine()
    simple = ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"})
    async with client_of(engine) as client:
        for headers in simple:
            for content in (b"", b'{"prompt": "a"}'):
                answer = await client.post(path, content=content, headers=headers)
                assert answer.status_code in (400, 415), (headers, content)  # 400: without a body there is no type
    assert engine.calls == [] and engine.cleared == 0


@pytest.mark.parametrize("path", CLEARS)
async def test_the_cache_is_cleared_for_json_alone(path: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        assert (await client.post(path)).status_code == 415 and engine.cleared == 0
        assert (await client.post(path, headers={"content-type": "application/json"})).status_code == 200
        assert (await client.post(path, json={})).status_code == 200 and engine.cleared == 2


@pytest.mark.parametrize(
    ("settings", "headers", "allowed"),
    [
        ({}, {"origin": "http://localhost"}, True),
        ({}, {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}, True),
        ({}, {"origin": "http://[::1]:8000", "host": "[::1]:8000"}, True),
        ({}, {"origin": "http://127.0.0.1:3000", "host": "127.0.0.1:8000"}, False),
        ({"allow_origins": ("https://a.example",)}, {"origin": "https://a.example"}, True),
        ({"allow_origins": ("https://a.example",)}, {"origin": "http://a.example"}, False),
        ({"allow_origins": ("*",)}, {"origin": "null"}, True),
        ({"allow_hosts": ("api.example",)}, {"origin": "https://api.example", "host": "api.example"}, True),
        ({"api_keys": ("alice",)}, {"origin": "https://evil.example", "authorization": "Bearer alice"}, False),
    ],
)
async def test_whose_pages_may_post(settings: dict[str, Any], headers: dict[str, str], allowed: bool) -> None:
    async with client_of(FakeEngine(), **settings) as client:
        answer = await client.post("/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("settings", "host", "allowed"),
    [
        ({}, "localhost", True),
        ({}, "LOCALHOST:8000", True),
        ({}, "pagedkv.localhost:8000", True),
        ({}, "127.0.0.1:8000", True),
        ({}, "[::1]:8000", True),
        ({}, "192.168.1.7:8000", True),
        ({}, "evil.example", False),
        ({}, "evil.example:8000", False),
        ({}, "localhost.evil.example", False),
        ({}, "127.0.0.1.evil.example", False),
        ({}, "evil.example@localhost", True),
        ({}, "localhost@evil.example", False),
        ({}, "[::1", False),
        ({}, "", False),
        ({"host": "0.0.0.0"}, "evil.example", False),
        ({"host": "0.0.0.0"}, "10.0.0.5", True),
        ({"host": "box.example"}, "box.example:8000", True),
        ({"allow_hosts": ("Box.example",)}, "box.example:8000", True),
        ({"allow_hosts": ("box.example",)}, "evil.example", False),
        ({"allow_hosts": ("*",)}, "evil.example", True),
        ({"api_keys": ("alice",)}, "anything.example", True),
        ({"api_keys": ("alice",), "allow_hosts": ("box.example",)}, "evil.example", False),
    ],
)
async def test_which_hosts_may_be_named(settings: dict[str, Any], host: str, allowed: bool) -> None:
    headers = {"host": host, "authorization": "Bearer alice"}
    async with client_of(FakeEngine(), **settings) as client:
        answers = [await client.get(path, headers=headers) for path in ("/health", "/v1/cache/stream/x", "/")]
    assert [answer.status_code for answer in answers] == ([200, 404, 200] if allowed else [403] * 3)
