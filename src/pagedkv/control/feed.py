"""Delivers what the compiled calls logged to the subscribers, in order."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable

from pagedkv.control.events import BlockRemoved, BlockStored, CacheEvent
from pagedkv.control.namespaces import Namespaces
from pagedkv.control.state import State
from pagedkv.control.types import BlockId

logger = logging.getLogger("pagedkv")


class EventFeed:
    """The subscribers and the events on their way to them."""

    def __init__(self, namespaces: Namespaces, always_log: bool = False) -> None:
        self._always_log = always_log
        self._namespaces = namespaces
        self._callbacks: dict[int, Callable[[CacheEvent], None]] = {}
        self._numbers = itertools.count()
        self._queue: deque[CacheEvent] = deque()
        self._delivering = False
        self._active = False

    def subscribe(self, callback: Callable[[CacheEvent], None], state: State) -> Callable[[], None]:
        """Add a subscriber; returns the function that removes it, and no other of the same callback."""
        number = next(self._numbers)
        self._callbacks[number] = callback
        self._active = True
        state.counters[0].logging = 1

        def unsubscribe() -> None:
            self._callbacks.pop(number, None)

        return unsubscribe

    def publish(self, state: State, event: CacheEvent | None = None) -> None:
        """Deliver what was logged, then `event`; calls that the subscribers make are delivered after."""
        if not self._active:
            if self._always_log:
                state.counters[0].log_len = 0
            return
        self._queue.extend(self._read(state))
        if event is not None:
            self._queue.append(event)
        if not self._callbacks:
            self._active = False
            state.counters[0].logging = self._always_log
            self._queue.clear()
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._queue:
                self._deliver(self._queue.popleft())
        finally:
            self._delivering = False

    def _deliver(self, event: CacheEvent) -> None:
        for callback in list(self._callbacks.values()):
            try:
                callback(event)
            except Exception:
                logger.exception("a subscriber failed on %s", type(event).__name__)

    def _read(self, state: State) -> list[CacheEvent]:
        counters = state.counters[0]
        entries = state.log[: counters.log_len].tolist()
        counters.log_len = 0
        roots: dict[int, int] = {}
        return [
            self._stored(state, entry - 1, roots) if entry > 0 else BlockRemoved(BlockId(-entry - 1))
            for entry in entries
        ]

    def _stored(self, state: State, block: int, roots: dict[int, int]) -> BlockStored:
        size = int(state.counters[0].block_size)
        parent = above = int(state.blocks[block].parent)
        # The roots of this batch are remembered: a chain of n blocks is walked once, not n times.
        while above >= 0 and above not in roots:
            above = int(state.blocks[above].parent)
        roots[block] = roots.get(above, above)
        ids = tuple(state.contents[block * size : (block + 1) * size].tolist())
        salt = self._namespaces.salt_of(-1 - roots[block])
        return BlockStored(BlockId(block), BlockId(parent) if parent >= 0 else None, ids, salt)
