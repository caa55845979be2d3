"""BlockManager: the thin, documented doors of the control plane."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control import growth, lifecycle, prefix_clear, rows
from pagedkv.control.arguments import (
    fraction,
    parse_batch_tokens,
    parse_tokens,
    sequence_key,
    sequence_keys,
    sequence_number,
    whole_number,
)
from pagedkv.control.events import AllBlocksCleared, CacheEvent
from pagedkv.control.inspection import Inspection
from pagedkv.control.layout import copies_in, plan_from, plan_rows
from pagedkv.control.plan import BatchPlan
from pagedkv.control.pool import unpin_block
from pagedkv.control.room import fits_after_evicting, written_tails
from pagedkv.control.state import MAX_PINS, PINNED, with_log
from pagedkv.control.strategies import MAX_PRIORITY, EvictionStrategy, Priority, checked_scores
from pagedkv.control.streaming import stream_row
from pagedkv.control.types import BlockView, SeqId, SequenceInfo
from pagedkv.errors import InvalidOperation, OutOfMemory, SequenceNotFound

__all__ = ["BlockManager"]

Copies = npt.NDArray[np.int32]
_NO_COPIES = np.empty((0, 2), np.int32)


class BlockManager(Inspection):
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

    # ---------------------------------------------------------------- sequences

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
                status, a, b, source, destination = lifecycle.allocate_row(
                    self._state, key, namespace, priority, count, ids, known
                )
                if status == rows.OK:
                    break
                if status == rows.EXISTS:
                    raise InvalidOperation(f"sequence {SeqId(seq_id)} exists already")
                matched = lifecycle.matching_blocks(self._state, namespace, ids) if known else ()
                self._make_room(status, a, b, matched=matched)
            if source != lifecycle.NOBODY:
                self._copy(np.array([[source, destination]], np.int32))
            self._wide_ids |= key < 0
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
            wanted = np.full(len(keys), -1)
        else:
            wanted = parse_batch_tokens(num_query_tokens, len(keys)).counts
        with self._lock:
            status, place, width, wide, narrow = plan_rows(self._state, keys, wanted)
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
            status, place = growth.commit_rows(self._state, keys, upto, made_at)
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
                status, twin = lifecycle.fork_row(self._state, row, dst_key)
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
            held = int(self._state.sequences[row].num_tokens)
            num_tokens = whole_number("num_tokens", num_tokens, 0, held)
            if num_tokens < held:
                hole = self._state.sequences[row].hole_len if num_tokens > self._state.sequences[row].hole_start else 0
                self._score_before_release(row, int(num_tokens + hole) // self.block_size)
                lifecycle.truncate_row(self._state, row, num_tokens)
                rows.mark_dirty(self._state, row)
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
            rows.touch_row(self._state, row)
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
            rows.mark_dirty(self._state, row)
            return self._info(row)

    # ---------------------------------------------------------------- pins

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
            row = rows.find_row(self._state, key)
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

    # ---------------------------------------------------------------- eviction

    def select_eviction_target(self) -> SeqId | None:
        """Return the sequence that ``evict`` would free, or None if there is none that may go."""
        with self._lock:
            row = self._victims.first(self._state)
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
            record = self._state.sequences[row]
            if record.num_tokens <= sink + window:
                return 0
            if record.num_dropped and record.hole_start != sink:
                raise InvalidOperation(
                    f"sink_tokens expects {record.hole_start}, as {SeqId(seq_id)} streams already, got {sink}"
                )
            self._score_before_release(row, sink // self.block_size)
            status, a, b, copies = stream_row(self._state, row, sink, window)
            if status == rows.NO_ROOM:
                raise OutOfMemory(a, b, "private copies of shared window blocks")
            self._copy(copies)
            self._publish()
            return int(a)

    # ---------------------------------------------------------------- the prefix index

    def match_prefix(self, token_ids: Any, cache_salt: str = "") -> int:
        """Return how many leading tokens an ``allocate`` would find cached now; changes nothing."""
        count, ids, known = parse_tokens(token_ids)
        if not known:
            raise InvalidOperation(f"token_ids expects token ids, got {token_ids!r}")
        with self._lock:
            namespace = self._namespaces.find(cache_salt)
            if namespace is None or not self._state.counters[0].prefix_caching:
                return 0
            return int(lifecycle.count_matching(self._state, namespace, ids))

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

    # ---------------------------------------------------------------- inside

    def _grow(self, keys: Any, counts: Any, ids: Any, known: bool, given: Any = None) -> tuple[int, int, Any, Copies]:
        while True:
            status, a, b, num_copies, wide, narrow = growth.grow_rows(self._state, keys, counts, ids, known)
            if status == rows.OK:
                break
            self._refuse(status, a, keys, given)
            growing = [int(rows.find_row(self._state, key)) for key in keys.tolist()]
            self._make_room(status, a, b, frozenset(growing), tails=written_tails(self._state, growing, counts))
        if num_copies:
            self._copy(copies_in(narrow, num_copies))
        return a, b, wide, narrow

    def _refuse(self, status: int, place: int, keys: npt.NDArray[np.int64], given: Any = None) -> None:
        if status == rows.NOT_FOUND:
            if given is not None:
                listed = given.tolist() if hasattr(given, "tolist") else given
                sequence_key(listed[place], "seq_ids")  # a negative id was not looked for: say so
            raise SequenceNotFound(sequence_number(keys[place]))
        if status == rows.REPEATED:
            raise InvalidOperation(f"seq_ids expects each sequence once, got S{sequence_number(keys[place])} twice")

    def _make_room(
        self,
        status: int,
        a: int,
        b: int,
        spared: frozenset[int] = frozenset(),
        matched: Iterable[int] = (),
        tails: Sequence[int] = (),
    ) -> None:
        """Grow the arrays, or evict by the strategy, so that the compiled call can be made again."""
        if status == rows.NEEDS_ROWS:
            self._state = rows.with_more_rows(self._state)
        elif status == rows.NEEDS_WIDTH:
            self._widen_tables(a)
        elif self._on_full == "raise" or not fits_after_evicting(self._state, a - b, spared, matched, tails):
            raise OutOfMemory(a, b)
        else:
            row = self._victims.first(self._state, spared)
            if row is None:
                raise OutOfMemory(a, b)
            self._evict_row(row)

    def _evict_row(self, row: int) -> SeqId:
        seq_id = self._seq_id(row)
        self._free_row(row)
        self._state.counters[0].evictions += 1
        return seq_id

    def _free_row(self, row: int) -> None:
        self._score_before_release(row, 0)
        record = self._state.sequences[row]
        if record.pinned_blocks:
            table = self._table(row)[: record.pinned_blocks]
            pinned = table[self._state.blocks["indexed"][table] == 1].tolist()
            if pinned and self._state.blocks["pins"][pinned].max() == MAX_PINS:
                raise InvalidOperation(f"a block has at most {MAX_PINS} pins; unpin sequences that were freed")
            self._kept_pins.setdefault(int(record.seq_id), []).extend(pinned)
        lifecycle.free_row(self._state, row)

    def _score_before_release(self, row: int, first: int) -> None:
        """Let the strategy score what this sequence may leave cached; done first, so that its errors change nothing."""
        ids = lifecycle.release_candidates(self._state, row, first)
        if len(ids):
            view = BlockView(self._state.blocks[ids], ids)
            scores = self.eviction_strategy.score_blocks(view, int(self._state.counters[0].tick))
            checked = checked_scores(self.eviction_strategy, "score_blocks", scores, len(ids))
            self._state.blocks["score"][ids] = checked

    def _checked_priority(self, priority: Any) -> int:
        strategy = self.eviction_strategy
        highest = strategy.levels - 1 if isinstance(strategy, Priority) else MAX_PRIORITY
        return whole_number("priority", priority, 0, highest)

    def _copy(self, copies: Copies) -> None:
        """Note copies for the next plan; a cache with K and V makes them at once instead."""
        for source, destination in copies.tolist():
            source = self._pending_copies.get(source, source)
            self._pending_copies.pop(destination, None)
            self._pending_copies[destination] = source

    def _take_pending_copies(self) -> Copies:
        if not self._pending_copies:
            return _NO_COPIES
        pairs = [(source, destination) for destination, source in self._pending_copies.items()]
        self._pending_copies.clear()
        return np.array(pairs, np.int32)
