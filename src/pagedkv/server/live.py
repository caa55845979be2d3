"""Live snapshots: the page at ``/`` and the server-sent events that it draws."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
from collections.abc import AsyncIterator
from functools import cache
from importlib.resources import files
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from pagedkv.engine import EngineSnapshot
from pagedkv.engine.snapshot import pack_columns
from pagedkv.server.auth import Operator
from pagedkv.server.engines import ServedEngine
from pagedkv.server.errors import ApiError
from pagedkv.server.state import Server, ServerState

SHORTEST_INTERVAL = 0.25
SHARE_OF_TIME = 0.02
"""Snapshots take at most this part of the time: a pool that takes 20 ms to copy is copied once a second."""


class SnapshotSource:
    """Takes snapshots of an engine on demand, and gives the same one to all who ask at about the same time.

    Parameters
    ----------
    engine : ServedEngine
    interval : float
        Seconds between two snapshots, at least.

    Attributes
    ----------
    taken : int
        Snapshots taken so far.
    watchers : int
        Streams that are open.
    """

    def __init__(self, engine: ServedEngine, interval: float = SHORTEST_INTERVAL) -> None:
        self._engine = engine
        self._shortest = interval
        self._next_at = 0.0
        self._latest: EngineSnapshot | None = None
        self._lock = asyncio.Lock()
        self.taken = 0
        self.watchers = 0

    async def now(self) -> EngineSnapshot:
        """Return the latest snapshot if it is fresh, or take one."""
        async with self._lock:
            if self._latest is None or time.monotonic() >= self._next_at:
                self._latest = await self._take()
            return self._latest

    async def next(self) -> EngineSnapshot:
        """Wait until the latest snapshot is due to be replaced and return its successor."""
        while (pause := self._next_at - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        return await self.now()

    async def _take(self) -> EngineSnapshot:
        started = time.monotonic()
        # Beside the event loop: a snapshot waits for the step that is being made.
        snapshot = await asyncio.to_thread(self._engine.snapshot)
        self._next_at = started + max(self._shortest, snapshot.cost / SHARE_OF_TIME)
        self.taken += 1
        return snapshot


async def _source_of(request: Request, server: Server) -> SnapshotSource:
    shared = request.app.state
    if not hasattr(shared, "snapshots"):
        shared.snapshots = SnapshotSource(server.engine)
    source: SnapshotSource = shared.snapshots
    return source


Snapshots = Annotated[SnapshotSource, Depends(_source_of)]
"""What a route takes to see the engine."""


MAX_WATCHERS = 16
SECONDS_BETWEEN_SIGNS = 1.0
"""So often at least something is sent, so that a reader that is gone is noticed."""

_PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "map.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
    "tiers.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

page_router = APIRouter(include_in_schema=False)
stream_router = APIRouter(tags=["cache"], dependencies=[Operator])


@cache
def _page_file(name: str) -> bytes:
    return files("pagedkv.server").joinpath("page", name).read_bytes()


@page_router.get("/")
async def page() -> Response:
    """Return the page; it holds nothing of the cache, what it shows it asks for."""
    return await page_file("index.html")


@page_router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """Return a part of the page."""
    if name not in _PAGE_FILES:
        raise ApiError(404, "there is no such part of the page")
    return Response(_page_file(name), media_type=_PAGE_FILES[name], headers=_PAGE_HEADERS)


@stream_router.get(
    "/v1/cache/stream",
    summary="Snapshots of the cache as they come",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events without an end."}},
)
async def stream(server: Server, snapshots: Snapshots) -> StreamingResponse:
    """Stream snapshots: at most four a second, fewer for a slow reader, none without a reader."""
    if snapshots.watchers >= MAX_WATCHERS:
        raise ApiError(503, f"{MAX_WATCHERS} readers watch already", code="too_many_watchers", retry_after=5)
    return StreamingResponse(
        _events(server, snapshots),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(server: ServerState, source: SnapshotSource) -> AsyncIterator[bytes]:
    # A slow reader holds up this generator alone: it asks for the next snapshot when the last one has been taken.
    source.watchers += 1
    try:
        known, sent_at = b"", 0.0
        snapshot = await source.now()
        while not server.draining:
            columns = pack_columns(snapshot)
            is_news = columns != known
            if is_news or snapshot.requests or snapshot.taken - sent_at >= SECONDS_BETWEEN_SIGNS:
                yield event_of(snapshot, server.model.name, columns if is_news else None)
                known, sent_at = columns, snapshot.taken
            snapshot = await source.next()
    finally:
        source.watchers -= 1


def event_of(snapshot: EngineSnapshot, model: str, columns: bytes | None) -> bytes:
    """Return a server-sent event that holds a snapshot as JSON; without columns the blocks are as they were."""
    fields = {
        "model": model,
        "taken": snapshot.taken,
        "block_size": snapshot.block_size,
        "strategy": snapshot.strategy,
        "tick": snapshot.tick,
        "num_blocks": snapshot.total_blocks,
        "requests": snapshot.requests,
        "prefixes": snapshot.prefixes,
        "stats": dataclasses.asdict(snapshot.stats),
        "clock": snapshot.clock,
        "columns": None if columns is None else base64.b64encode(columns).decode(),
    }
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"
