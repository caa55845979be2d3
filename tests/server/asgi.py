"""Clients of an application in the same process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from pagedkv.server import ServerConfig, create_app


@asynccontextmanager
async def client_of(engine: Any, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, ServerConfig(model_name="tiny", **settings))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=20) as client:
        client.app = app  # type: ignore[attr-defined]
        yield client


def events_of(text: str) -> list[Any]:
    """Parse server-sent events; the last one must be [DONE]."""
    data = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def named_events(text: str) -> list[Any]:
    """Parse server-sent events with names, which must be the types of their data."""
    found = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


class RawRequest:
    """One request at the level of ASGI: the test decides when the client reads, and when it leaves."""

    def __init__(self, app: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        listed = {"content-type": "application/json", **(headers or {})}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in listed.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": encoded, "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self._app = app

    async def send(self, message: dict[str, Any]) -> None:
        await self.may_send.wait()
        self.sent.append(message)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self._app(self.scope, self.inbox.get, self.send))

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
