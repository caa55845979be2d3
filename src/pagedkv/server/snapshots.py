"""SnapshotSource: one snapshot for all who look, never more of them than the engine hardly notices."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from pagedkv.server.state import Server

if TYPE_CHECKING:
    from pagedkv.engine.snapshot import EngineSnapshot

__all__ = ["SnapshotSource", "Snapshots"]

SHORTEST_INTERVAL = 0.25
SHARE_OF_TIME = 0.02
"""Snapshots take at most this part of the time: a pool that takes 20 ms to copy is copied once a second."""


class SnapshotSource:
    """Takes snapshots of an engine when somebody asks, and gives the same one to all who ask at about the same time.

    Parameters
    ----------
    engine : AsyncEngine
    interval : float
        Seconds between two snapshots, at least.

    Attributes
    ----------
    taken : int
        Snapshots taken so far.
    watchers : int
        Streams that are open.
    """

    def __init__(self, engine: Any, interval: float = SHORTEST_INTERVAL) -> None:
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
        snapshot: EngineSnapshot = await asyncio.to_thread(self._engine.snapshot)
        self._next_at = started + max(self._shortest, snapshot.cost / SHARE_OF_TIME)
        self.taken += 1
        return snapshot


def _source_of(request: Request, server: Server) -> SnapshotSource:
    shared = request.app.state
    if not hasattr(shared, "snapshots"):
        shared.snapshots = SnapshotSource(server.engine)
    source: SnapshotSource = shared.snapshots
    return source


Snapshots = Annotated[SnapshotSource, Depends(_source_of)]
"""What a route takes to see the engine."""
