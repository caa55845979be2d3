"""Pins of clients: beginnings of prompts that stay in the pool for a while, within a part of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from pagedkv.errors import OutOfMemory
from pagedkv.server.engines import ServedEngine
from pagedkv.server.fair_store import FairStore

SHARE = 4
"""Clients' pins take at most one part in so many of the pool."""
MOST_MARKS = 4
"""Beginnings that one request may have pinned."""


@dataclass(frozen=True, slots=True)
class _Pin:
    handle: int
    expires: float


class Pins:
    """What clients have pinned: when it does not fit any more, the oldest of the owner that has most goes first.

    Parameters
    ----------
    engine : ServedEngine
    clock : callable
        Returns seconds.
    """

    def __init__(self, engine: ServedEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._store: FairStore[_Pin] = FairStore(engine.sizes.total_blocks // SHARE)

    @property
    def blocks(self) -> int:
        """How many blocks are pinned, one more for each pin."""
        return self._store.used

    async def keep(self, owner: str, salt: str, token_ids: Sequence[int], seconds: float) -> int:
        """Pin the whole blocks of a beginning that are in the pool, or keep them for longer; returns how many tokens.

        Parameters
        ----------
        owner : str
            Whose part of the room it takes.
        salt : str
            Of the prompts that are to find it.
        token_ids : sequence of int
        seconds : float
        """
        # A pin that is made has to be noted, though nobody waits for it any more.
        return await asyncio.shield(asyncio.ensure_future(self._keep(owner, salt, token_ids, seconds)))

    async def expire(self) -> None:
        """Take back the pins whose time is over."""
        now = self._clock()
        pins = [(owner, key, pin) for owner in self._store.owners() for key, pin in self._store.items(owner)]
        over = [(owner, key, pin) for owner, key, pin in pins if pin.expires <= now]
        for owner, key, _ in over:
            self._store.pop(owner, key)
        for _, _, pin in over:
            await self._engine.unpin(pin.handle)

    async def expire_in_time(self) -> None:
        """Do so for as long as this is awaited."""
        while True:
            await asyncio.sleep(1)
            await self.expire()

    async def _keep(self, owner: str, salt: str, token_ids: Sequence[int], seconds: float) -> int:
        size = self._engine.sizes.block_size
        ids = token_ids[: min(len(token_ids) // size, self._store.most - 1) * size]
        if not ids:
            return 0
        try:
            handle, count = await self._engine.pin(ids, cache_salt=salt)
        except OutOfMemory:
            return 0
        if count == 0:
            return 0
        chain = _chain(salt, ids[:count], size)
        expires = self._clock() + seconds
        before = self._store.pop(owner, chain[-1])
        if before is not None:
            expires = max(expires, before.expires)
        pin = _Pin(handle, expires)
        parts: dict[Hashable, int] = {**dict.fromkeys(chain, 1), (chain[-1],): 1}
        gone = self._store.put(owner, chain[-1], pin, parts)
        for other in [*([] if before is None else [before]), *gone]:
            await self._engine.unpin(other.handle)
        return 0 if pin in gone else count


def _chain(salt: str, token_ids: Sequence[int], size: int) -> list[bytes]:
    """Return a digest for each block, of it and of all before it."""
    ids, digest, found = np.array(token_ids, np.int64), salt.encode(), []
    for start in range(0, len(ids), size):
        digest = blake2b(digest + ids[start : start + size].tobytes(), digest_size=16).digest()
        found.append(digest)
    return found
