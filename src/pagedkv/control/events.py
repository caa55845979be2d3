"""What subscribers hear, and the frozen snapshot that views are drawn from."""

from __future__ import annotations

import itertools
import logging
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from hashlib import blake2b
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.control.prefix import Namespaces
from pagedkv.control.sequence_table import live_rows
from pagedkv.control.state import State
from pagedkv.control.types import (
    ACTIVE,
    CACHED,
    FREE,
    PINNED,
    SHARED,
    BlockId,
    CacheStats,
    SequenceInfo,
    sequence_info,
    stats_of,
)

SNAPSHOT = (-2).to_bytes(8, "big", signed=True)
"""What a subscriber sends to a replay endpoint in place of a number if it wants a snapshot."""

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
"""The number of the message that ends what a replay endpoint answers; what tells it is that it has no batch."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A full block became findable.

    Attributes
    ----------
    block_id : BlockId
    parent_id : BlockId or None
        The block before it; None for the first block of a prefix.
    token_ids : tuple of int
        The ``block_size`` tokens of the block.
    cache_salt : str
        The namespace that it belongs to.
    """

    block_id: BlockId
    parent_id: BlockId | None
    token_ids: tuple[int, ...]
    cache_salt: str


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A block is not findable any more.

    Attributes
    ----------
    block_id : BlockId
    """

    block_id: BlockId


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing that was stored before is findable any more."""


CacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


def block_hash(token_ids: Iterable[int], parent: int | None, cache_salt: str = "") -> int:
    """Return what published events call a block: 64 bits over its tokens, all before them, and the salt."""
    # A salt goes in at the root and reaches the rest of the chain through the parents.
    above = parent.to_bytes(8, "big") if parent is not None else cache_salt.encode("utf-8", "surrogatepass")
    digest = blake2b(digest_size=8, person=b"pagedkv-block")
    tokens = tuple(token_ids)
    digest.update(len(above).to_bytes(8, "big") + above + struct.pack(f">{len(tokens)}q", *tokens))
    return int.from_bytes(digest.digest(), "big")


@dataclass(frozen=True, slots=True, eq=False)
class CacheSnapshot:
    """The whole pool at one moment; arrays are read-only copies, one entry a block. Equal by value.

    Attributes
    ----------
    block_size : int
    strategy : str
    ref_count : int32 [num_blocks]
        Sequences that hold the block.
    cached : bool [num_blocks]
        Findable, but held by nobody.
    pinned : bool [num_blocks]
    indexed : bool [num_blocks]
        Findable by others.
    num_tokens, depth : int32 [num_blocks]
    last_access : int64 [num_blocks]
    owner : int64 [num_blocks]
        Row of a sequence in ``sequences`` that holds the block, the lowest if several do; −1 if none does.
    sequences : tuple of SequenceInfo
    stats : CacheStats
    tick : int
    """

    block_size: int
    strategy: str
    ref_count: npt.NDArray[np.int32]
    cached: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_]
    indexed: npt.NDArray[np.bool_]
    num_tokens: npt.NDArray[np.int32]
    depth: npt.NDArray[np.int32]
    last_access: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    sequences: tuple[SequenceInfo, ...]
    stats: CacheStats
    tick: int

    def __post_init__(self) -> None:
        for value in self._values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CacheSnapshot):
            return NotImplemented
        return all(map(_is_equal, self._values(), other._values()))

    __hash__ = None  # type: ignore[assignment]

    def _values(self) -> list[object]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def total_blocks(self) -> int:
        """How many blocks the pool has."""
        return len(self.ref_count)

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """What each block is, an index into ``control.types.BLOCK_KINDS``.

        A pinned block, and every block of a pinned sequence, counts as pinned whatever else it is; a shared one is held
        by two sequences or more.
        """
        pinned = self.pinned.copy()
        for info in self.sequences:
            if info.pinned:
                pinned[info.block_table] = True  # as long as it lives it keeps all of its blocks
        found = [pinned, self.ref_count > 1, self.ref_count == 1, self.cached]
        return np.select(found, [PINNED, SHARED, ACTIVE, CACHED], FREE).astype(np.uint8)


def snapshot_of(state: State, strategy: str) -> CacheSnapshot:
    """Return the whole pool at this moment."""
    blocks, live = state.blocks, live_rows(state)
    owner = np.full(len(blocks), -1, np.int64)
    for place in range(len(live) - 1, -1, -1):
        owner[state.table(live[place])] = place
    indexed = blocks["indexed"] != 0
    return CacheSnapshot(
        block_size=state.counter("block_size"),
        strategy=strategy,
        ref_count=blocks["ref_count"].copy(),
        cached=indexed & (blocks["ref_count"] == 0),
        pinned=blocks["pins"] > 0,
        indexed=indexed,
        num_tokens=blocks["num_tokens"].copy(),
        depth=np.where(indexed, blocks["depth"], 0).astype(np.int32),
        last_access=blocks["last_access"].copy(),
        owner=owner,
        sequences=tuple(sequence_info(state, row) for row in live),
        stats=stats_of(state),
        tick=state.counter("tick"),
    )


def _is_equal(a: object, b: object) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b


# Delivers what the compiled calls logged to the subscribers, in order.

logger = logging.getLogger("pagedkv")


def stored_blocks(state: State) -> npt.NDArray[np.int32]:
    """Return the blocks that the last call stored, while somebody listens."""
    entries = state.log[: state.counter("log_len")]
    stored: npt.NDArray[np.int32] = entries[entries > 0] - 1
    return stored


class EventFeed:
    """The subscribers and the events on their way to them."""

    def __init__(self, namespaces: Namespaces, always_log: bool = False) -> None:
        self._always_log = always_log
        self._namespaces = namespaces
        self._callbacks: dict[int, Callable[[CacheEvent], None]] = {}
        self._watch: Callable[[npt.NDArray[np.int32]], None] | None = None
        self._numbers = itertools.count()
        self._queue: deque[CacheEvent] = deque()
        self._delivery = self._deliver_all()
        self._active = False

    def subscribe(self, callback: Callable[[CacheEvent], None], state: State) -> Callable[[], None]:
        """Add a subscriber; returns the function that removes it, and no other of the same callback."""
        number = next(self._numbers)
        state.counters[0].logging = 1
        self._active = True
        self._callbacks[number] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(number, None)

        return unsubscribe

    def watch(self, callback: Callable[[npt.NDArray[np.int32]], None], state: State) -> None:
        """Let `callback` see the log of every call as it is, for who cannot wait for an event of each block."""
        state.counters[0].logging = 1
        self._active = True
        self._watch = callback

    @property
    def is_active(self) -> bool:
        """Whether somebody listens."""
        return self._active

    @property
    def is_delivering(self) -> bool:
        """Whether a subscriber is being called."""
        return getgeneratorstate(self._delivery) == GEN_RUNNING

    def publish(self, state: State) -> None:
        """Deliver what was logged; what calls of the subscribers log is delivered after.

        An event leaves the queue once all have heard it, and the log is emptied once its events are in the queue: a
        delivery that is interrupted goes on at the next call, and no event is lost.
        """
        if not self._active:
            state.counters[0].log_len = 0
            return
        if self._watch is not None:
            self._watch(state.log[: state.counter("log_len")])
        if self._callbacks:
            self._queue.extend(self._read(state))
        state.counters[0].log_len = 0
        if not self._callbacks and self._watch is None:
            self._active = False
            state.counters[0].logging = self._always_log
            self._queue.clear()
        if self.is_delivering:  # a subscriber made this call
            return
        self._delivery = self._deliver_all()
        for _ in self._delivery:
            pass

    def _deliver_all(self) -> Generator[None, None, None]:
        """Empty the queue: a generator, as only one at a time can be running, whatever ends it."""
        while self._queue:
            self._deliver(self._queue[0])
            self._queue.popleft()
        yield

    def _deliver(self, event: CacheEvent) -> None:
        for callback in list(self._callbacks.values()):
            try:
                callback(event)
            except Exception:
                logger.exception("a subscriber failed on %s", type(event).__name__)

    def _read(self, state: State) -> list[CacheEvent]:
        parents, size = state.blocks["parent"], state.counter("block_size")
        roots: dict[int, int] = {}
        events: list[CacheEvent] = []
        for entry in state.log[: state.counter("log_len")].tolist():
            if entry > 0:
                events.append(self._stored(entry - 1, parents, state.contents, size, roots))
            else:
                events.append(BlockRemoved(BlockId(-entry - 1)) if entry < 0 else AllBlocksCleared())
        return events

    def _stored(
        self,
        block: int,
        parents: npt.NDArray[np.int32],
        contents: npt.NDArray[np.int64],
        size: int,
        roots: dict[int, int],
    ) -> BlockStored:
        parent = above = parents.item(block)
        # The roots of this batch are remembered: a chain of n blocks is walked once, not n times.
        while above >= 0 and above not in roots:
            above = parents.item(above)
        roots[block] = roots.get(above, above)
        ids = tuple(contents[block * size : (block + 1) * size].tolist())
        salt = self._namespaces.salt_of(-1 - roots[block])
        return BlockStored(BlockId(block), BlockId(parent) if parent >= 0 else None, ids, salt)


# One batch of KV cache events as bytes, and in a file.
#
# A file is a stream of msgpack ``bin`` values, each holding one batch: the header of the ``bin`` is the frame, and
# any msgpack library reads the file.

MAX_BATCH_BYTES = 32 * 2**20
BIN_32 = 0xC6
_encoder = msgspec.msgpack.Encoder()


def batch_bytes(batch: Any) -> bytes:
    """Return a batch as it is published: bytes as they are, anything else as msgpack."""
    return bytes(batch) if isinstance(batch, bytes | bytearray | memoryview) else _encoder.encode(batch)


def append_event_batch(file: BinaryIO, batch: Any) -> None:
    """Append one batch in one write: ``[ts, events, data_parallel_rank]``, or the payload as it was published.

    One larger than `MAX_BATCH_BYTES` is a ValueError, as readers refuse it; nothing is written then.
    """
    payload = batch_bytes(batch)
    if len(payload) > MAX_BATCH_BYTES:
        raise ValueError(f"a batch takes at most {MAX_BATCH_BYTES} bytes, got {len(payload)}")
    file.write(struct.pack(">BI", BIN_32, len(payload)) + payload)
