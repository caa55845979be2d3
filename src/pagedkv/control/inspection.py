"""What a cache tells about itself: properties, snapshots, the report, the events. Nothing here changes a block."""

from __future__ import annotations

import threading
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pagedkv.control import rows
from pagedkv.control.arguments import sequence_key, sequence_number, whole_number
from pagedkv.control.builtins import with_rule
from pagedkv.control.checks import check_state
from pagedkv.control.events import CacheEvent, CacheSnapshot
from pagedkv.control.feed import EventFeed
from pagedkv.control.hooks import Hooks
from pagedkv.control.namespaces import Namespaces, name_of
from pagedkv.control.pool import available_blocks
from pagedkv.control.sequence_eviction import VictimOrder
from pagedkv.control.state import LIVE, PINNED, new_state, with_log, with_roots, with_wider_tables
from pagedkv.control.strategies import EvictionStrategy, as_strategy
from pagedkv.control.types import CacheStats, KvBlock, SeqId, SequenceInfo
from pagedkv.errors import BlockNotFound, InvalidOperation, SequenceNotFound

# The counters behind the fields of CacheStats, in their order.
_STATS = "allocations frees evictions forks peak queries hits hit_tokens partial_tokens reclaimed copied".split()


class Inspection:
    """The state of a pool, and everything that only reads it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        strategy: str | EvictionStrategy,
        eviction_threshold: float,
        prefix_caching: bool,
    ) -> None:
        self._strategy = as_strategy(strategy)
        self._eviction_threshold = eviction_threshold
        self._state = with_rule(new_state(num_blocks, block_size, prefix_caching), self._strategy)
        self._hooks = Hooks(self._strategy)
        self._victims = VictimOrder(self._strategy)
        self._namespaces = Namespaces()
        self._feed = EventFeed(self._namespaces, self._hooks.see_stores)
        if self._hooks.see_stores:
            self._state = with_log(self._state)
            self._state.counters[0].logging = 1
        self._pending_copies: dict[int, int] = {}  # destination: source
        self._kept_pins: dict[int, list[int]] = {}  # sequence key: blocks that stayed pinned when it was freed
        self._wide_ids = False  # whether an id from 2**63 on was ever in use
        self._lock = threading.RLock()

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._state.counter("block_size")

    @property
    def total_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._state.blocks)

    @property
    def free_block_count(self) -> int:
        """Blocks that an allocation can have now: free, or cached and unpinned."""
        return int(available_blocks(self._state.packed))

    @property
    def used_block_count(self) -> int:
        """Blocks that sequences hold."""
        return self._state.counter("used")

    @property
    def cached_block_count(self) -> int:
        """Blocks that nobody holds but that are still findable."""
        return self._state.counter("cached")

    @property
    def utilization(self) -> float:
        """Used blocks over all blocks; 0.0 for an empty pool."""
        return self.used_block_count / self.total_blocks if self.total_blocks else 0.0

    @property
    def needs_eviction(self) -> bool:
        """Whether the utilization has reached the eviction threshold."""
        return self.utilization >= self._eviction_threshold

    @property
    def prefix_caching(self) -> bool:
        """Whether committed blocks stay findable."""
        return bool(self._state.counter("prefix_caching"))

    @property
    def eviction_threshold(self) -> float:
        """The utilization from which on eviction is due."""
        return self._eviction_threshold

    @property
    def eviction_strategy(self) -> EvictionStrategy:
        """What is given up first."""
        return self._strategy

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return self._state.counter("num_sequences")

    @property
    def sequence_ids(self) -> list[SeqId]:
        """The ids of the live sequences, ascending."""
        with self._lock:
            return sorted(self._seq_id(row) for row in self._live_rows())

    @property
    def stats(self) -> CacheStats:
        """The counters since the cache was made."""
        with self._lock:  # all of one moment
            return CacheStats(*map(self._state.counter, _STATS))

    def get_sequence(self, seq_id: int) -> SequenceInfo:
        """Return a snapshot of a sequence.

        Raises
        ------
        SequenceNotFound
        """
        with self._lock:
            return self._info(self._row(sequence_key(seq_id)))

    def __contains__(self, seq_id: object) -> bool:
        try:
            key = sequence_key(seq_id)
        except InvalidOperation:
            return False
        with self._lock:
            return bool(rows.find_row(self._state.packed, key) >= 0)

    def __len__(self) -> int:
        return self.num_sequences

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> NoReturn:
        # A shallow copy would write into the same books, and a deep one stops at the lock without saying why.
        name = type(self).__name__
        raise InvalidOperation(f"a {name} cannot be copied or pickled: fork() its sequences, or take a snapshot()")

    def block(self, block_id: int) -> KvBlock:
        """Return a live view of a block.

        Raises
        ------
        BlockNotFound
            If the pool has no such block.
        """
        number = whole_number("block_id", block_id, 0, 2**32 - 1)
        if number >= self.total_blocks:
            raise BlockNotFound(number)
        return KvBlock(self, number)

    def snapshot(self) -> CacheSnapshot:
        """Return the whole pool at this moment, frozen."""
        with self._lock:
            blocks = self._state.blocks
            live = self._live_rows()
            owner = np.full(len(blocks), -1, np.int64)
            for place in range(len(live) - 1, -1, -1):
                owner[self._table(live[place])] = place
            indexed = blocks["indexed"] != 0
            return CacheSnapshot(
                block_size=self.block_size,
                strategy=str(self._strategy),
                ref_count=blocks["ref_count"].copy(),
                cached=indexed & (blocks["ref_count"] == 0),
                pinned=blocks["pins"] > 0,
                indexed=indexed,
                num_tokens=blocks["num_tokens"].copy(),
                depth=np.where(indexed, blocks["depth"], 0).astype(np.int32),
                last_access=blocks["last_access"].copy(),
                owner=owner,
                sequences=tuple(self._info(row) for row in live),
                stats=self.stats,
                tick=self._state.counter("tick"),
            )

    def check(self) -> None:
        """Verify every invariant of the cache, in time linear in the pool.

        Raises
        ------
        CorruptedState
            With what is wrong and the state around it: a bug in pagedkv.
        """
        with self._lock:
            check_state(self._state, self._kept_pins)

    def __str__(self) -> str:
        with self._lock:
            return "\n".join(self._report())

    def _report(self) -> list[str]:
        stats = self.stats
        return [
            f"{type(self).__name__}",
            f"  Strategy: {self._strategy} (block_size={self.block_size})",
            f"  Blocks: {self.used_block_count}/{self.total_blocks} used ({self.utilization:.1%}), "
            f"{self.cached_block_count} cached, {self.free_block_count} free",
            *self._report_lines(),
            f"  Sequences: {self.num_sequences} active",
            f"  Stats: allocations={stats.total_allocations}, frees={stats.total_frees}, "
            f"evictions={stats.total_evictions}, forks={stats.total_forks}, peak={stats.peak_blocks_used}",
            f"  Prefix: queries={stats.prefix_queries}, hits={stats.prefix_hits}, "
            f"hit_tokens={stats.prefix_hit_tokens}, reclaimed={stats.blocks_reclaimed}, "
            f"copied={stats.blocks_copied}",
        ]

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"{type(self).__name__}(num_blocks={self.total_blocks}, block_size={self.block_size}, "
                f"strategy={str(self._strategy)!r}, used={self.used_block_count}, cached={self.cached_block_count})"
            )

    def _report_lines(self) -> list[str]:
        return []

    def _row(self, key: int) -> int:
        row = int(rows.find_row(self._state.packed, key))
        if row < 0:
            raise SequenceNotFound(sequence_number(key))
        return row

    def _seq_id(self, row: int) -> SeqId:
        return SeqId(sequence_number(self._state.sequences["seq_id"].item(row)))

    def _live_rows(self) -> list[int]:
        used = self._state.counter("rows_used")
        live: list[int] = np.flatnonzero(self._state.sequences["marks"][:used] & LIVE).tolist()
        return live

    def _table(self, row: int) -> npt.NDArray[np.int32]:
        return self._state.tables[row, : self._state.sequences["num_blocks"].item(row)]

    def _info(self, row: int) -> SequenceInfo:
        record = self._state.sequence(row)
        return SequenceInfo(
            seq_id=SeqId(sequence_number(record.seq_id)),
            num_tokens=record.num_tokens,
            num_cached_tokens=record.num_cached,
            num_committed_tokens=record.num_committed,
            num_dropped_tokens=record.num_dropped,
            last_access=record.last_access,
            access_count=record.access_count,
            priority=record.priority,
            pinned=bool(record.marks & PINNED),
            _table=self._state.tables[row, : record.num_blocks].copy(),
        )

    def _enter_namespace(self, cache_salt: str) -> int:
        number = self._namespaces.find(cache_salt)
        if number is None:
            number = self._namespaces.enter(cache_salt, self._state)
            if number >= len(self._state.roots):
                self._state = with_roots(self._state, number + 1)
            self._state.roots[number, 3] = name_of(cache_salt)
        return number

    def _widen_tables(self, width: int) -> None:
        self._state = with_wider_tables(self._state, width)

    def _publish(self, event: CacheEvent | None = None) -> None:
        try:
            if self._hooks.see_stores:
                self._hooks.stored(self._state, self._stored_blocks())
        finally:
            self._feed.publish(self._state, event)

    def _stored_blocks(self) -> npt.NDArray[np.int32]:
        """Return the blocks that this call stored, while somebody listens."""
        entries = self._state.log[: self._state.counter("log_len")]
        return entries[entries > 0] - 1

    def _block_keys(self, block: int) -> Any:
        raise InvalidOperation("a BlockManager holds no keys; use a PagedKvCache")

    def _block_values(self, block: int) -> Any:
        raise InvalidOperation("a BlockManager holds no values; use a PagedKvCache")
