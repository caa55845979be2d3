"""KV events as batches in the format that vLLM publishes and that routers and the simulator read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Protocol

from pagedkv.control.events import (
    MAX_BATCH_BYTES,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheEvent,
    append_event_batch,
    batch_bytes,
)

__all__ = ["MAX_BATCH_BYTES", "KvEventLog", "append_event_batch", "batch_bytes"]

MEDIUM = "GPU"
"""What consumers call the tier that attention reads, whatever device it is on."""


class _Publisher(Protocol):
    def subscribe(self, callback: Callable[[CacheEvent], None]) -> Callable[[], None]: ...


class KvEventLog:
    """Collects the events of a cache until they are taken; blocks are named by a hash of all tokens up to their end.

    Parameters
    ----------
    source : BlockManager or AsyncEngine
        Its events come in whichever thread uses it.

    Notes
    -----
    Two salts give two hashes for the same tokens, and no salt can be read off one.
    """

    def __init__(self, source: _Publisher) -> None:
        self._hashes: dict[int, int] = {}
        self._events: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._unsubscribe = source.subscribe(self._hear)

    def take(self) -> list[Any] | None:
        """Return ``[ts, events, data_parallel_rank]`` with what happened since the last call; None if nothing did."""
        with self._lock:
            events, self._events = self._events, []
        return [time.time(), events, 0] if events else None

    def close(self) -> None:
        """Stop listening."""
        self._unsubscribe()

    def _hear(self, event: CacheEvent) -> None:
        with self._lock:
            if isinstance(event, BlockStored):
                self._stored(event)
            elif isinstance(event, BlockRemoved):
                self._removed(event)
            elif isinstance(event, AllBlocksCleared):
                self._hashes.clear()
                self._events.append({"type": "AllBlocksCleared"})

    def _stored(self, event: BlockStored) -> None:
        parent = None if event.parent_id is None else self._hashes.get(int(event.parent_id))
        number = self._hashes[int(event.block_id)] = _hash_of(event, parent)
        last = self._events[-1] if self._events else None
        # A chain that is stored in one go is one event, as for a request.
        if parent is not None and last is not None and last["type"] == "BlockStored":
            if last["block_hashes"][-1] == parent:
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
                "medium": MEDIUM,
                "lora_name": None,
            }
        )

    def _removed(self, event: BlockRemoved) -> None:
        number = self._hashes.pop(int(event.block_id), None)
        if number is None:
            return  # stored before we listened
        last = self._events[-1] if self._events else None
        if last is not None and last["type"] == "BlockRemoved":
            last["block_hashes"].append(number)
        else:
            self._events.append({"type": "BlockRemoved", "block_hashes": [number], "medium": MEDIUM})


def _hash_of(event: BlockStored, parent: int | None) -> int:
    # A salt goes in at the root and reaches the rest of the chain through the parents.
    above = parent.to_bytes(8, "big") if parent is not None else event.cache_salt.encode("utf-8", "surrogatepass")
    digest = blake2b(digest_size=8, person=b"pagedkv-block")
    digest.update(len(above).to_bytes(8, "big") + above)
    for token in event.token_ids:
        digest.update(token.to_bytes(8, "big", signed=True))
    return int.from_bytes(digest.digest(), "big")
