"""KV events as batches in the format that vLLM publishes and that routers and the simulator read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pagedkv.control.events import (
    END_OF_REPLAY,
    MAX_BATCH_BYTES,
    SNAPSHOT,
    BlockRemoved,
    BlockStored,
    CacheEvent,
    append_event_batch,
    batch_bytes,
    block_hash,
)
from pagedkv.control.types import KvBlock
from pagedkv.tiers.book_tier import BookTier
from pagedkv.tiers.tier import Tier

__all__ = ["END_OF_REPLAY", "MAX_BATCH_BYTES", "SNAPSHOT", "KvEventLog", "append_event_batch", "batch_bytes"]

MEDIUM = "GPU"
"""What consumers call the memory that attention reads, whatever device it is on."""


class _Publisher(Protocol):
    def subscribe(self, callback: Callable[[CacheEvent], None]) -> Callable[[], None]: ...


class _Source(_Publisher, Protocol):
    def block(self, block_id: int) -> KvBlock: ...


class _Medium:
    """What was told of the blocks of one pool or tier: the hash of each, by block id."""

    def __init__(self, name: str, block_of: Callable[[int], KvBlock]) -> None:
        self.name, self.block_of = name, block_of
        self.hashes: dict[int, int] = {}


class KvEventLog:
    """Collects the events of a cache, and of tiers beyond it, until they are taken.

    Blocks are named by a hash of all tokens up to their end, the same one in all media; each event says of which one it
    is. Whoever hears of a block has heard of those before it: what was there before this began to listen is told with
    the first block that is stored behind it.

    Parameters
    ----------
    source : BlockManager or AsyncEngine
        Its events come in whichever thread uses it.
    tiers : iterable of Tier
        Those that keep books are listened to, too.

    Notes
    -----
    Two salts give two hashes for the same tokens, and no salt can be read off one.

    ``AllBlocksCleared`` has no medium: who hears it forgets all. It is told when the cache is cleared; when a tier is,
    its blocks are removed, one by one.
    """

    def __init__(self, source: _Source, tiers: Iterable[Tier] = ()) -> None:
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._media: list[_Medium] = []
        self._unsubscribe: list[Callable[[], None]] = []
        self._listen(source, MEDIUM, lambda block_id: source.block(block_id))
        for tier in tiers:
            if isinstance(tier, BookTier):
                self._listen(tier, tier.medium, tier.books.block)

    def take(self) -> list[Any] | None:
        """Return ``[ts, events, data_parallel_rank]`` with what happened since the last call; None if nothing did."""
        with self._lock:
            events, self._events = self._events, []
        return [time.time(), events, 0] if events else None

    def snapshot(self) -> list[Any]:
        """Return a batch that makes whoever hears it know exactly the blocks that were told of so far.

        ``AllBlocksCleared``, then the hashes of each medium, without tokens and parents. What `take` has yet to return
        is in it; to hear that again afterwards changes nothing.
        """
        with self._lock:
            events: list[dict[str, Any]] = [{"type": "AllBlocksCleared"}]
            events += [_all_of(medium) for medium in self._media if medium.hashes]
        return [time.time(), events, 0]

    def close(self) -> None:
        """Stop listening."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()

    def _listen(self, publisher: _Publisher, name: str, block_of: Callable[[int], KvBlock]) -> None:
        medium = _Medium(name, block_of)
        self._media.append(medium)
        self._unsubscribe.append(publisher.subscribe(lambda event: self._hear(medium, event)))

    def _hear(self, medium: _Medium, event: CacheEvent) -> None:
        with self._lock:
            if isinstance(event, BlockStored):
                for stored in (*_unheard(medium, event), event):
                    self._stored(medium, stored)
            elif isinstance(event, BlockRemoved):
                number = medium.hashes.pop(int(event.block_id), None)
                if number is not None:  # else it was stored before we listened
                    self._removed(medium, [number])
            elif medium is self._media[0]:
                for each in self._media:  # so do those who hear it
                    each.hashes.clear()
                self._events.append({"type": "AllBlocksCleared"})
            elif medium.hashes:
                self._removed(medium, list(medium.hashes.values()))
                medium.hashes.clear()

    def _stored(self, medium: _Medium, event: BlockStored) -> None:
        parent = None if event.parent_id is None else medium.hashes[int(event.parent_id)]
        number = medium.hashes[int(event.block_id)] = block_hash(event.token_ids, parent, event.cache_salt)
        last = self._events[-1] if self._events else None
        # A chain that is stored in one go is one event, as for a request.
        if parent is not None and last is not None and last["type"] == "BlockStored":
            if last["block_hashes"][-1] == parent and last["medium"] == medium.name:
                last["block_hashes"].append(number)
                last["token_ids"].extend(event.token_ids)
                return
        self._events.append(
            {
                "type": "BlockStored",
                "block_hashes": [number],
                "parent_block_hash": parent,
                "token_ids": list(event.token_ids),
                "block_size": len(event.token_ids),
                "lora_id": None,
                "medium": medium.name,
                "lora_name": None,
            }
        )

    def _removed(self, medium: _Medium, numbers: list[int]) -> None:
        last = self._events[-1] if self._events else None
        if last is not None and last["type"] == "BlockRemoved" and last["medium"] == medium.name:
            last["block_hashes"].extend(numbers)
        else:
            self._events.append({"type": "BlockRemoved", "block_hashes": numbers, "medium": medium.name})


def _unheard(medium: _Medium, event: BlockStored) -> list[BlockStored]:
    """Return the blocks before one that was just stored of which nothing was told, the first one first."""
    above: list[BlockStored] = []
    parent = event.parent_id
    while parent is not None and int(parent) not in medium.hashes:
        block = medium.block_of(parent)
        above.append(BlockStored(parent, block.parent_id, block.token_ids, event.cache_salt))
        parent = block.parent_id
    return above[::-1]


def _all_of(medium: _Medium) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(medium.hashes.values()),
        "parent_block_hash": None,
        "token_ids": [],
        "medium": medium.name,
    }
