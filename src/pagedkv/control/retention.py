"""What stays and what goes: pins, eviction, streaming, and the prefix index as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pagedkv.control import lifecycle, prefix_clear, rows
from pagedkv.control.arguments import (
    fraction,
    parse_tokens,
    sequence_key,
    whole_number,
)
from pagedkv.control.events import AllBlocksCleared, CacheEvent
from pagedkv.control.holding import Holding
from pagedkv.control.pool import unpin_block
from pagedkv.control.state import PINNED, with_log
from pagedkv.control.streaming import blocks_to_stream, stream_row
from pagedkv.control.types import SeqId, SequenceInfo
from pagedkv.errors import InvalidOperation, OutOfMemory, SequenceNotFound


class Retention(Holding):
    """The public calls of a BlockManager that decide what is kept."""

    def pin(self, seq_id: int, num_tokens: int | None = None) -> SequenceInfo:
        """Keep a sequence from being evicted, and its first `num_tokens` (default: all) from being reclaimed.

        The pin outlives ``free``: the blocks that were committed stay findable until ``unpin(seq_id)``.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence has fewer tokens.
        """
        key = sequence_key(seq_id)
        with self._lock:
            row = self._row(key)
            record = self._state.sequences[row]
            if num_tokens is None:
                blocks = int(record.num_blocks)
            else:
                num_tokens = whole_number("num_tokens", num_tokens, 0, int(record.num_tokens))
                hole = int(record.hole_len) if num_tokens > record.hole_start else 0
                blocks = -(-(num_tokens + hole) // self.block_size)
            record.pinned_blocks = blocks
            record.marks |= PINNED
            return self._info(row)

    def unpin(self, seq_id: int) -> None:
        """Take a pin back, of a live sequence or of one that was freed.

        Raises
        ------
        SequenceNotFound
            If there is neither such a sequence nor a pin that outlived it.
        InvalidOperation
            If the sequence is not pinned.
        """
        key = sequence_key(seq_id)
        with self._lock:
            kept = self._kept_pins.pop(key, None)
            row = rows.find_row(self._state.packed, key)
            if kept is None:
                if row < 0:
                    raise SequenceNotFound(seq_id)
                if not self._state.sequences[row].marks & PINNED:
                    raise InvalidOperation(f"sequence {SeqId(seq_id)} is not pinned")
            for block in kept or ():
                unpin_block(self._state, block)
            if row >= 0:
                self._state.sequences[row].marks &= ~PINNED
                self._state.sequences[row].pinned_blocks = 0

    def select_eviction_target(self, spared: Iterable[int] = ()) -> SeqId | None:
        """Return the sequence that ``evict`` would free, or None if there is none that may go.

        Sequences that are `spared` are passed over as pinned ones are; ids that are not in use are ignored.
        """
        keys = [sequence_key(seq_id, "spared") for seq_id in spared]
        with self._lock:
            rows_spared = frozenset(int(rows.find_row(self._state.packed, key)) for key in keys)
            row = self._victims.first(self._state, rows_spared)
            return None if row is None else self._seq_id(row)

    def evict(self) -> SeqId:
        """Free the sequence that the strategy ranks lowest and return its id; pinned ones are left alone.

        Raises
        ------
        InvalidOperation
            If there is none.
        """
        with self._lock:
            row = self._victims.first(self._state)
            if row is None:
                raise InvalidOperation("there is no sequence to evict")
            return self._evict_row(row)

    def evict_to_threshold(self, target: float | None = None) -> list[SeqId]:
        """Evict until ``utilization <= target`` (default: the eviction threshold); returns the ids in order.

        Pinned sequences stay, even if the target is then missed.

        Raises
        ------
        InvalidOperation
            If `target` is no number.
        """
        limit = self._eviction_threshold if target is None else fraction("target", target)
        evicted: list[SeqId] = []
        with self._lock:
            while self.utilization > limit:
                row = self._victims.first(self._state)
                if row is None:
                    break
                evicted.append(self._evict_row(row))
        return evicted

    def apply_streaming_llm(self, seq_id: int, sink_tokens: int, window_tokens: int) -> int:
        """Keep the first `sink_tokens` and the last `window_tokens`; returns how many tokens were dropped.

        Blocks that hold only dropped tokens are given back, partial ones are masked (``BatchPlan.holes``). From then
        on the sequence is not committed to the prefix index any more. Source: Xiao et al. 2023, section 3.2.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence already streams with another number of sinks.
        OutOfMemory
            If window blocks that others share need private copies that do not fit.
        """
        key = sequence_key(seq_id)
        sink = whole_number("sink_tokens", sink_tokens)
        window = whole_number("window_tokens", window_tokens)
        with self._lock:
            row = self._row(key)
            record = self._state.sequence(row)
            if record.num_tokens <= sink + window:
                return 0
            if record.num_dropped and record.hole_start != sink:
                raise InvalidOperation(
                    f"sink_tokens expects {record.hole_start}, as {SeqId(seq_id)} streams already, got {sink}"
                )
            needed = int(blocks_to_stream(self._state.packed, row, sink, window))
            if needed > self.free_block_count:
                raise OutOfMemory(needed, self.free_block_count, "private copies of shared window blocks")
            self._let_strategy_make_room(needed)
            self._score_before_release(row, sink // self.block_size)
            dropped, copies = stream_row(self._state.packed, row, sink, window)
            self._copy(copies)
            self._publish()
            return int(dropped)

    def match_prefix(self, token_ids: Any, cache_salt: str = "") -> int:
        """Return how many leading tokens an ``allocate`` would find cached now; changes nothing."""
        count, ids, known = parse_tokens(token_ids)
        if not known:
            raise InvalidOperation(f"token_ids expects token ids, got {token_ids!r}")
        with self._lock:
            namespace = self._namespaces.find(cache_salt)
            if namespace is None or not self.prefix_caching:
                return 0
            return int(lifecycle.count_matching(self._state.packed, namespace, ids))

    def blocks_to_allocate(self, tokens: Any, cache_salt: str = "") -> int:
        """Return how many of the ``free_block_count`` blocks ``allocate(tokens)`` would take now; changes nothing.

        Cached blocks that it would take up again count; blocks that other sequences hold and it would share do not.

        Parameters
        ----------
        tokens : int or sequence of int
            As for ``allocate``.
        cache_salt : str
        """
        count, ids, known = parse_tokens(tokens)
        with self._lock:
            namespace = self._namespaces.find(cache_salt) if known else None
            needed = -(-count // self.block_size)
            if namespace is None or not self.prefix_caching:
                return needed
            matched = self._state.blocks[lifecycle.matching_blocks(self._state.packed, namespace, ids)]
            return needed - int(np.count_nonzero((matched["ref_count"] > 0) | (matched["pins"] > 0)))

    def clear_prefix_cache(self) -> int:
        """Make everything stored so far unfindable, pinned blocks too; returns how many blocks became free.

        Live sequences keep their blocks but are never committed again: their prefix belongs to what was cleared (old
        weights, for instance).
        """
        with self._lock:
            freed = prefix_clear.clear(self._state)
            self._kept_pins.clear()
            self._publish(AllBlocksCleared())
            return freed

    def subscribe(self, callback: Callable[[CacheEvent], None]) -> Callable[[], None]:
        """Call `callback` with every ``BlockStored``, ``BlockRemoved`` and ``AllBlocksCleared``, in order.

        It is called while the cache is consistent and locked, and may call the cache itself. An exception in it is
        logged and does not reach the caller.

        Returns
        -------
        callable
            Call it to unsubscribe.
        """
        if not callable(callback):
            raise InvalidOperation(f"callback expects a callable, got {callback!r}")
        with self._lock:
            if len(self._state.log) == 1:
                self._state = with_log(self._state)
            return self._feed.subscribe(callback, self._state)
