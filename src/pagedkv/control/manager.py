"""BlockManager: the thin, documented doors of the control plane."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control import lifecycle, rows, sequences
from pagedkv.control.arguments import (
    equal_counts,
    fraction,
    parse_batch_tokens,
    parse_counts,
    parse_tokens,
    sequence_key,
    sequence_keys,
    sequence_number,
    whole_number,
)
from pagedkv.control.layout import plan_from, plan_rows
from pagedkv.control.plan import BatchPlan
from pagedkv.control.retention import Retention
from pagedkv.control.strategies import EvictionStrategy
from pagedkv.control.types import SeqId, SequenceInfo
from pagedkv.errors import InvalidOperation

__all__ = ["BlockManager"]


class BlockManager(Retention):
    """Paged KV-cache bookkeeping: who owns which block, without K and V.

    Every public method is atomic: many threads may share one manager. A call that fails changes nothing.

    Parameters
    ----------
    num_blocks : int
        Size of the pool.
    block_size : int
        Tokens per block.
    strategy : str or EvictionStrategy
        What is given up first; a name for ``parse_strategy`` or an object.
    eviction_threshold : float
        ``needs_eviction`` is true from this utilization on; clamped to 0 … 1.
    prefix_caching : bool
        Whether committed blocks stay findable.
    on_full : {"raise", "evict"}
        What happens when an allocation does not fit: ``OutOfMemory``, or whole sequences are evicted by the strategy
        until it does.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        strategy: str | EvictionStrategy = "lru",
        eviction_threshold: float = 0.9,
        prefix_caching: bool = True,
        on_full: str = "raise",
    ) -> None:
        num_blocks = whole_number("num_blocks", num_blocks, 0, 2**31 - 2)
        block_size = whole_number("block_size", block_size, 1, 2**31 - 1)
        if on_full not in ("raise", "evict"):
            raise InvalidOperation(f"on_full expects 'raise' or 'evict', got {on_full!r}")
        if not isinstance(prefix_caching, bool):
            raise InvalidOperation(f"prefix_caching expects a bool, got {prefix_caching!r}")
        threshold = fraction("eviction_threshold", eviction_threshold)
        super().__init__(num_blocks, block_size, strategy, threshold, prefix_caching)
        self._on_full = on_full

    def allocate(self, seq_id: int, tokens: Any, *, priority: int = 0, cache_salt: str = "") -> SequenceInfo:
        """Start a sequence.

        Parameters
        ----------
        seq_id : int
            The caller's id, 0 … 2⁶⁴−1.
        tokens : int or sequence of int
            A number of tokens, or token ids: then the longest cached prefix is shared (``info.num_cached_tokens``),
            always leaving at least the last token to compute. A partly matching block is copied.
        priority : int
            For the ``Priority`` strategy; 0 is the lowest.
        cache_salt : str
            Sequences of different salts never share a block.

        Returns
        -------
        SequenceInfo

        Raises
        ------
        InvalidOperation
            If the sequence exists, or an argument is out of range.
        OutOfMemory
            If the blocks that it needs cannot be had.
        """
        key = sequence_key(seq_id)
        count, ids, known = parse_tokens(tokens)
        priority = self._checked_priority(priority)
        with self._lock:
            namespace = self._enter_namespace(cache_salt)
            while True:
                if self._hooks.decide_reclaims and rows.find_row(self._state.packed, key) < 0:
                    self._reclaim_for(namespace, count, ids, known)
                status, a, b, source, destination = lifecycle.allocate_row(
                    self._state.packed, key, namespace, priority, count, ids, known
                )
                if status == rows.OK:
                    break
                if status == rows.EXISTS:
                    raise InvalidOperation(f"sequence {SeqId(seq_id)} exists already")
                matched = lifecycle.matching_blocks(self._state.packed, namespace, ids) if known else ()
                self._make_room(status, a, b, matched=matched)
            self._wide_ids |= key < 0
            self._tell_hits(a)
            if source != lifecycle.NOBODY:
                self._copy(np.array([[source, destination]], np.int32))
            info = self._info(a)
            self._publish()
            return info

    def append(self, seq_id: int, tokens: Any) -> SequenceInfo:
        """Add tokens to the end of a sequence; a shared last block is copied first.

        Parameters
        ----------
        seq_id : int
        tokens : int or sequence of int
            A number of tokens, or token ids. Only tokens of known ids become findable for others.

        Raises
        ------
        SequenceNotFound, OutOfMemory, InvalidOperation
        """
        key = sequence_key(seq_id)
        count, ids, known = parse_tokens(tokens)
        with self._lock:
            self._grow(np.array([key]), np.array([count]), ids, known)
            info = self._info(self._row(key))
            self._publish()
            return info

    def append_batch(self, seq_ids: Any, counts_or_tokens: Any = 1) -> BatchPlan:
        """Add tokens to many sequences and plan the forward pass over them: one call a step.

        Parameters
        ----------
        seq_ids : sequence of int
            Each sequence at most once; int64 arrays are taken as they are.
        counts_or_tokens : int, sequence of int, array of int [n, k], or sequence of sequences of int
            One count for all, a count for each sequence, or the token ids of each sequence.

        Returns
        -------
        BatchPlan
            Its query tokens are the tokens just added.

        Raises
        ------
        SequenceNotFound, OutOfMemory, InvalidOperation
            If one sequence cannot grow, none does.
        """
        keys = sequence_keys(seq_ids, self._wide_ids)
        counts, ids, known = parse_batch_tokens(counts_or_tokens, len(keys))
        with self._lock:
            tick, width, wide, narrow = self._grow(keys, counts, ids, known, seq_ids)
            plan = plan_from(keys, wide, narrow, width, self._take_pending_copies(), tick)
            self._publish()
            return plan

    def plan(self, seq_ids: Any, num_query_tokens: Any = None) -> BatchPlan:
        """Lay out a forward pass.

        Parameters
        ----------
        seq_ids : sequence of int
        num_query_tokens : int or sequence of int, optional
            The last so many tokens of each sequence; by default those that are not committed yet.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If a sequence is named twice or has fewer tokens.
        """
        keys = sequence_keys(seq_ids, self._wide_ids)
        if num_query_tokens is None:
            wanted = equal_counts(-1, len(keys))
        else:
            wanted = parse_counts("num_query_tokens", num_query_tokens, len(keys))
        with self._lock:
            status, place, width, wide, narrow = plan_rows(self._state.packed, keys, wanted)
            if status == rows.NO_ROOM:
                number, most = sequence_number(keys[place]), "at most the tokens of the sequence"
                raise InvalidOperation(f"num_query_tokens expects {most}, got {wanted[place]} for S{number}")
            self._refuse(status, place, keys, seq_ids)
            return plan_from(keys, wide, narrow, width, self._take_pending_copies(), place)

    def commit(self, plan_or_seq_id: BatchPlan | int) -> None:
        """Say that K and V are written: full blocks of known token ids become findable.

        With a plan, this holds for the tokens up to the end of the plan; with a sequence id, for all its tokens. Where
        the index already holds an equal block, the sequence goes over to it, so make a new plan afterwards.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If tokens of the plan were taken back and others appended since.
        """
        if isinstance(plan_or_seq_id, BatchPlan):
            keys, made_at = plan_or_seq_id.seq_ids, plan_or_seq_id.tick
            upto = plan_or_seq_id.seq_lens.astype(np.int64)
        else:
            keys, made_at = np.array([sequence_key(plan_or_seq_id)]), 2**62
            upto = np.array([-1])
        with self._lock:
            status, place = sequences.commit_rows(self._state.packed, keys, upto, made_at)
            if status == rows.STALE:
                number = sequence_number(keys[place])
                raise InvalidOperation(f"the plan is stale: S{number} was taken back and continued since it was made")
            self._refuse(status, place, keys)
            self._publish()

    def fork(self, src: int, dst: int) -> SequenceInfo:
        """Let the new sequence `dst` share every block of `src`; nothing is copied until one of them writes.

        Raises
        ------
        SequenceNotFound
            If there is no `src`.
        InvalidOperation
            If `dst` exists.
        """
        src_key, dst_key = sequence_key(src, "src"), sequence_key(dst, "dst")
        with self._lock:
            row = self._row(src_key)
            while True:
                status, twin = lifecycle.fork_row(self._state.packed, row, dst_key)
                if status == rows.OK:
                    self._wide_ids |= dst_key < 0
                    return self._info(twin)
                if status == rows.EXISTS:
                    raise InvalidOperation(f"sequence {SeqId(dst)} exists already")
                self._make_room(status, 0, 0)

    def truncate(self, seq_id: int, num_tokens: int) -> SequenceInfo:
        """Take back the tokens from position `num_tokens` on, of rejected drafts for instance.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence has fewer tokens.
        """
        key = sequence_key(seq_id)
        with self._lock:
            row = self._row(key)
            record = self._state.sequence(row)
            num_tokens = whole_number("num_tokens", num_tokens, 0, record.num_tokens)
            if num_tokens < record.num_tokens:
                hole = record.hole_len if num_tokens > record.hole_start else 0
                self._score_before_release(row, (num_tokens + hole) // self.block_size)
                lifecycle.truncate_row(self._state.packed, row, num_tokens)
                rows.mark_dirty(self._state.packed, row)
            return self._info(row)

    def free(self, seq_id: int) -> None:
        """End a sequence. What it committed stays findable until the strategy gives it up.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence is pinned and a block of it has 65,535 pins of freed sequences already.
        """
        key = sequence_key(seq_id)
        with self._lock:
            self._free_row(self._row(key))

    def touch(self, seq_id: int) -> SequenceInfo:
        """Count an access.

        Raises
        ------
        SequenceNotFound
        """
        key = sequence_key(seq_id)
        with self._lock:
            row = self._row(key)
            self._state.counters[0].tick += 1
            rows.touch_row(self._state.packed, row)
            return self._info(row)

    def set_priority(self, seq_id: int, priority: int) -> SequenceInfo:
        """Change the priority of a sequence.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the strategy has no such level.
        """
        key = sequence_key(seq_id)
        priority = self._checked_priority(priority)
        with self._lock:
            row = self._row(key)
            self._state.sequences[row].priority = priority
            rows.mark_dirty(self._state.packed, row)
            return self._info(row)
