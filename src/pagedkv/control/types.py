"""What the cache hands out: ids, live block views, immutable snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.control.arguments import sequence_number
from pagedkv.control.state import PINNED as MARKED_PINNED
from pagedkv.control.state import State
from pagedkv.errors import InvalidOperation
from pagedkv.typing import BlockContent
from pagedkv.validate import require_int

BLOCK_KINDS = ("free", "active", "shared", "cached", "pinned")
"""What a block is, by the number that stands for it wherever there is one entry a block."""
FREE, ACTIVE, SHARED, CACHED, PINNED = range(5)


class _Id(int):
    """A bounded int that prints with its letter."""

    __slots__ = ()  # no attributes of its own: immutable, as an int is

    _letter = ""
    _limit = 0

    def __new__(cls, value: Any) -> _Id:
        return super().__new__(cls, require_int(cls.__name__, value, 0, cls._limit - 1))

    def __str__(self) -> str:
        return f"{self._letter}{int(self)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self)})"


class BlockId(_Id):
    """The index of a block in its pool: 0 … 2³²−1, shown as ``B7``."""

    __slots__ = ()
    _letter = "B"
    _limit = 2**32


class SeqId(_Id):
    """The caller's id of a sequence: 0 … 2⁶⁴−1, shown as ``S7``."""

    __slots__ = ()
    _letter = "S"
    _limit = 2**64


def block_ids_of(blocks: Iterable[int]) -> tuple[BlockId, ...]:
    """Return typed ids for block indices that come out of our own arrays."""
    return tuple(int.__new__(BlockId, block) for block in blocks)


@dataclass(frozen=True, slots=True)
class SequenceInfo:
    """An immutable snapshot of one sequence. Equal by value, ``block_ids`` included.

    Attributes
    ----------
    seq_id : SeqId
    num_tokens : int
        Visible tokens: those that streaming dropped do not count.
    num_cached_tokens : int
        Leading tokens whose K and V were found in the prefix index when the sequence was allocated.
    num_committed_tokens : int
        Leading tokens whose K and V are known to be written.
    num_dropped_tokens : int
        Tokens that ``apply_streaming_llm`` dropped.
    last_access : int
        Logical tick of the last allocate, append, fork or touch.
    access_count : int
        How often that happened.
    priority : int
    pinned : bool
    """

    seq_id: SeqId
    num_tokens: int
    num_cached_tokens: int
    num_committed_tokens: int
    num_dropped_tokens: int
    last_access: int
    access_count: int
    priority: int
    pinned: bool
    _blocks: bytes = field(repr=False)  # of int32

    @property
    def block_ids(self) -> tuple[BlockId, ...]:
        """The blocks of the sequence, in order."""
        return block_ids_of(self.block_table.tolist())

    @property
    def block_table(self) -> npt.NDArray[np.int32]:
        """The same as a read-only array, int32 ``[num_blocks]``."""
        return np.frombuffer(self._blocks, np.int32)

    @property
    def num_blocks(self) -> int:
        """How many blocks the sequence has."""
        return len(self._blocks) // np.dtype(np.int32).itemsize


def seq_id_of(state: State, row: int) -> SeqId:
    """Return the id of the sequence in `row`."""
    return SeqId(sequence_number(state.sequences["seq_id"].item(row)))


def sequence_info(state: State, row: int) -> SequenceInfo:
    """Return a snapshot of the sequence in `row`."""
    record = state.sequence(row)
    return SequenceInfo(
        seq_id=SeqId(sequence_number(record.seq_id)),
        num_tokens=record.num_tokens,
        num_cached_tokens=record.num_cached,
        num_committed_tokens=record.num_committed,
        num_dropped_tokens=record.num_dropped,
        last_access=record.last_access,
        access_count=record.access_count,
        priority=record.priority,
        pinned=bool(record.marks & MARKED_PINNED),
        _blocks=state.tables[record.table : record.table + record.num_blocks].tobytes(),
    )


@dataclass(frozen=True, slots=True)
class CacheStats:
    """An immutable snapshot of the counters since the cache was made.

    Attributes
    ----------
    total_allocations : int
        Blocks that became active: fresh ones, copies, and cached ones taken up again.
    total_frees : int
        Blocks whose last reference went. ``used_block_count`` is always allocations minus frees.
    total_evictions : int
        Sequences evicted.
    total_forks : int
        Sequences forked.
    peak_blocks_used : int
        The largest ``used_block_count`` so far.
    prefix_queries, prefix_hits : int
        Allocations that looked for a cached prefix, and those that found one.
    prefix_hit_tokens : int
        Tokens found in whole blocks, which are shared.
    partial_hit_tokens : int
        Tokens found in partly matching blocks, which are copied.
    blocks_reclaimed : int
        Cached blocks evicted for a new use.
    blocks_copied : int
        Copies made because a block was shared (copy-on-write).
    states_stored, states_reclaimed : int
        Snapshots of recurrent states that were kept at block boundaries, and those given up for a new use.
    """

    total_allocations: int = 0
    total_frees: int = 0
    total_evictions: int = 0
    total_forks: int = 0
    peak_blocks_used: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_hit_tokens: int = 0
    partial_hit_tokens: int = 0
    blocks_reclaimed: int = 0
    blocks_copied: int = 0
    states_stored: int = 0
    states_reclaimed: int = 0

    def report(self) -> tuple[str, str]:
        """Return what happened to blocks, and what the prefix index brought, a line each."""
        return (
            f"Stats: allocations={self.total_allocations}, frees={self.total_frees}, "
            f"evictions={self.total_evictions}, forks={self.total_forks}, peak={self.peak_blocks_used}",
            f"Prefix: queries={self.prefix_queries}, hits={self.prefix_hits}, hit_tokens={self.prefix_hit_tokens}, "
            f"reclaimed={self.blocks_reclaimed}, copied={self.blocks_copied}",
        )


# The counters behind these fields, in their order.
_STATS = (
    "allocations frees evictions forks peak queries hits hit_tokens partial_tokens reclaimed copied "
    "states_stored states_reclaimed"
).split()


def stats_of(state: State) -> CacheStats:
    """Return the counters since the cache was made."""
    return CacheStats(*map(state.counter, _STATS))


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A findable prefix that several sequences have used.

    Attributes
    ----------
    block_id : int
        Its last block.
    num_tokens : int
    uses : int
        Sequences that have held its last block since it was stored.
    ref_count : int
        Sequences that hold it now.
    age : int
        Ticks since its last use.
    token_ids : tuple of int
        The prefix itself, or the head of it; empty where it was not asked for.
    """

    block_id: int
    num_tokens: int
    uses: int
    ref_count: int
    age: int
    token_ids: tuple[int, ...] = ()


def hottest_prefixes(state: State, limit: int, max_tokens: int) -> tuple[HotPrefix, ...]:
    """Rank the prefixes of the index; see :meth:`pagedkv.BlockManager.hottest_prefixes`."""
    blocks = state.blocks
    nodes = np.flatnonzero((blocks["indexed"] != 0) & (blocks["access_count"] > 1))
    uses = blocks["access_count"][nodes].astype(np.int64)
    parents = blocks["parent"][nodes]
    follow = np.zeros(len(blocks), np.int64)
    inner = parents >= 0
    np.maximum.at(follow, parents[inner], uses[inner])
    is_end = uses > follow[nodes]
    ends, uses = nodes[is_end], uses[is_end]
    saved = (uses - 1) * (blocks["depth"][ends].astype(np.int64) + 1)
    best = np.argsort(-saved, kind="stable")[:limit]
    return tuple(_prefix(state, int(ends[place]), max_tokens) for place in best)


def _prefix(state: State, block: int, max_tokens: int) -> HotPrefix:
    record, size = state.blocks[block], state.counter("block_size")
    return HotPrefix(
        block_id=block,
        num_tokens=(int(record.depth) + 1) * size,
        uses=int(record.access_count),
        ref_count=int(record.ref_count),
        age=max(0, state.counter("tick") - int(record.last_access)),
        token_ids=_head(state, block, size)[:max_tokens] if max_tokens else (),
    )


def _head(state: State, block: int, size: int) -> tuple[int, ...]:
    chain = []
    while block >= 0:
        chain.append(block)
        block = int(state.blocks[block].parent)
    return tuple(token for b in reversed(chain) for token in state.contents[b * size : (b + 1) * size].tolist())


class BlockOwner(Protocol):
    """The cache that a block belongs to."""

    _state: State

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    def _block_keys(self, block: int) -> BlockContent: ...

    def _block_values(self, block: int) -> BlockContent: ...


class KvBlock:
    """A live view of one block: it always shows the present state. Views of the same block are equal.

    References change only through the cache, which keeps them balanced.
    """

    __slots__ = ("_owner", "_place")

    def __init__(self, owner: BlockOwner, block_id: int) -> None:
        self._owner = owner
        self._place = block_id

    @property
    def _record(self) -> Any:
        state: State = self._owner._state
        return state.blocks[self._place]

    @property
    def id(self) -> BlockId:
        """The index of the block in its pool."""
        return BlockId(self._place)

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return int(self._owner.block_size)

    @property
    def num_tokens(self) -> int:
        """How many tokens are stored (0 … capacity)."""
        return int(self._record.num_tokens)

    @property
    def ref_count(self) -> int:
        """How many sequences hold the block."""
        return int(self._record.ref_count)

    @property
    def is_full(self) -> bool:
        """Whether no further token fits."""
        return self.num_tokens >= self.capacity

    @property
    def parent_id(self) -> BlockId | None:
        """The block before it in its prefix; None for the first one, and for a block that cannot be found."""
        record = self._record
        return BlockId(int(record.parent)) if record.indexed and record.parent >= 0 else None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens; none for a block that cannot be found."""
        state: State = self._owner._state
        start = self._place * self.capacity
        return tuple(state.contents[start : start + self.capacity].tolist()) if self._record.indexed else ()

    @property
    def remaining(self) -> int:
        """How many further tokens fit."""
        return max(0, self.capacity - self.num_tokens)

    @property
    def state(self) -> str:
        """``"active"`` (in use), ``"cached"`` (findable, nobody needs it) or ``"free"``."""
        record = self._record
        if record.ref_count > 0:
            return "active"
        return "cached" if record.indexed else "free"

    @property
    def depth(self) -> int:
        """How many blocks precede this one in its prefix; 0 for a block that is not in the index."""
        return int(self._record.depth) if self._record.indexed else 0

    @property
    def is_pinned(self) -> bool:
        """Whether a pin keeps the block from being reclaimed."""
        return bool(self._record.pins)

    @property
    def keys(self) -> BlockContent:
        """The keys, ``[num_layers, block_size, num_kv_heads, head_dim]``, a view of the real buffer."""
        return self._owner._block_keys(self._place)

    @property
    def values(self) -> BlockContent:
        """The values, ``[num_layers, block_size, num_kv_heads, v_head_dim]``, a view of the real buffer."""
        return self._owner._block_values(self._place)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KvBlock):
            return NotImplemented
        return self._owner is other._owner and self._place == other._place

    def __hash__(self) -> int:
        return hash((id(self._owner), self._place))

    def __repr__(self) -> str:
        return f"KvBlock({self.id}, {self.state}, {self.num_tokens}/{self.capacity} tokens, ref_count={self.ref_count})"


# The views that strategies score: the fields of many records as arrays, by the names of KvBlock and SequenceInfo.


class _Column:
    """One field of the records under a view, as an array."""

    def __init__(self, field_name: str, doc: str) -> None:
        self._field = field_name
        self.__doc__ = doc

    def __get__(self, view: _RecordView, owner: type | None = None) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = view._records[self._field]
        return column


class _RecordView:
    __slots__ = ("_ids", "_records")

    def __init__(self, records: npt.NDArray[np.void], ids: npt.NDArray[Any]) -> None:
        self._records = records
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def records(self) -> npt.NDArray[np.void]:
        """The records themselves, copies."""
        return self._records


class BlockView(_RecordView):
    """Cached blocks to be scored, each field an array ``[n]``."""

    last_access = _Column("last_access", "tick of the last use")
    access_count = _Column("access_count", "how many sequences used the block")
    num_tokens = _Column("num_tokens", "tokens stored")
    ref_count = _Column("ref_count", "how many sequences hold the block")
    priority = _Column("priority", "highest priority of a sequence that used it")
    depth = _Column("depth", "blocks before it in its prefix")
    created = _Column("created", "tick at which it was filled")
    num_children = _Column("num_children", "blocks that continue it in the index")

    __slots__ = ("_prefix_hashes",)

    def __init__(
        self, records: npt.NDArray[np.void], ids: npt.NDArray[Any], prefix_hashes: npt.NDArray[np.int64] | None = None
    ) -> None:
        super().__init__(records, ids)
        self._prefix_hashes = prefix_hashes

    @property
    def id(self) -> npt.NDArray[np.int32]:
        """The ids of the blocks, ``block_id`` by the name that ``KvBlock`` has for it."""
        return self._ids

    @property
    def block_id(self) -> npt.NDArray[np.int32]:
        """The ids of the blocks."""
        return self._ids

    @property
    def prefix_hash(self) -> npt.NDArray[np.int64]:
        """A number for the content of each block and of all that precedes it, for strategies with hooks."""
        if self._prefix_hashes is None:
            raise InvalidOperation("prefix_hash is kept for strategies with hooks (StrategyHooks) only")
        return self._prefix_hashes


class SequenceView(_RecordView):
    """Live sequences to be scored, each field an array ``[n]``."""

    last_access = _Column("last_access", "tick of the last access")
    access_count = _Column("access_count", "number of accesses")
    num_tokens = _Column("num_tokens", "visible tokens")
    num_blocks = _Column("num_blocks", "blocks held")
    num_cached_tokens = _Column("num_cached", "tokens found cached at allocation")
    num_committed_tokens = _Column("num_committed", "leading tokens whose K and V are written")
    num_dropped_tokens = _Column("num_dropped", "tokens that streaming dropped")
    priority = _Column("priority", "the sequence's priority")
    created = _Column("created", "tick of the allocation")

    @property
    def seq_id(self) -> npt.NDArray[np.uint64]:
        """The ids of the sequences."""
        ids: npt.NDArray[np.uint64] = self._records["seq_id"].view(np.uint64)
        return ids
