"""BlockManager: the thin, documented doors of the control plane."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pagedkv.control import prefix, sequence_eviction, sequence_table, sequences
from pagedkv.control.arguments import (
    equal_counts,
    fraction,
    parse_batch_tokens,
    parse_commit,
    parse_counts,
    parse_ids,
    parse_tokens,
    sequence_key,
    sequence_keys,
    sequence_number,
)
from pagedkv.control.block_tables import entries_to_grow, segment_length
from pagedkv.control.call_lock import new_lock
from pagedkv.control.checks import check_state
from pagedkv.control.events import CacheEvent, CacheSnapshot, EventFeed, snapshot_of, stored_blocks
from pagedkv.control.learner import asked_clock, tell_time
from pagedkv.control.plan import NO_COPIES, BatchPlan, UntoldCopies, stale_plan
from pagedkv.control.pool import available_blocks
from pagedkv.control.prefix import Namespaces
from pagedkv.control.protocol import EvictionStrategy, Hooks, Order, Strategy, shared_blocks
from pagedkv.control.reclaim import require_leaf
from pagedkv.control.recurrent import count_available_slots
from pagedkv.control.sequence_eviction import Demand, Room
from pagedkv.control.sequence_table import KeptPins, live_rows, row_of, rows_of
from pagedkv.control.state import (
    PINNED,
    RECLAIM,
    State,
    new_state,
    with_log,
    with_orders,
)
from pagedkv.control.strategies import (
    as_strategy,
    checked_priority,
    forget_blocks,
    is_scored_in_numpy,
    with_policy_of,
)
from pagedkv.control.types import (
    BlockId,
    CacheStats,
    HotPrefix,
    KvBlock,
    SeqId,
    SequenceInfo,
    block_ids_of,
    hottest_prefixes,
    seq_id_of,
    sequence_info,
    stats_of,
)
from pagedkv.errors import BlockNotFound, InvalidOperation, OutOfMemory, bad_argument
from pagedkv.typing import BlockContent, IntRows, Ints, OnFull, TokenIds, Tokens
from pagedkv.validate import require_choice, require_flag, require_int, shown

Copies = npt.NDArray[np.int32]


class BlockManager:
    """Paged KV-cache bookkeeping: who owns which block, without K and V.

    Every public method is atomic: many threads may share one manager. A call that fails changes nothing. One that is
    interrupted, by Ctrl-C for instance, has happened as a whole or not at all: what it leaves to do beside the books
    (copies, events) is done before the next call.

    Parameters
    ----------
    num_blocks : int
        Size of the pool.
    block_size : int
        Tokens per block.
    strategy : str or EvictionStrategy
        What is evicted first; a name for ``parse_strategy`` or an object.
    eviction_threshold : float
        ``needs_eviction`` is true from this utilization on; clamped to 0 … 1.
    prefix_caching : bool
        Whether committed blocks stay findable.
    on_full : {"raise", "evict"}
        What happens when an allocation does not fit: ``OutOfMemory``, or whole sequences are evicted by the strategy
        until it does.
    num_states : int
        Slots for the states of recurrent layers: one for each live sequence, and snapshots of them at block boundaries
        in what is left. With states a prefix is reused up to its last block that has a snapshot, and no block in part.
    whole_hits : bool
        Whether whole blocks are found and nothing else: the last one of a text too, where nothing is left to compute,
        and none in part. For books of what a model has computed elsewhere.
    clock : callable, optional
        Tells a strategy that learns from pauses the time in seconds: ``time.monotonic``, say. Without it the strategy
        counts used blocks, and the same calls always have the same effect.

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
        strategy: Strategy = "lru",
        eviction_threshold: float = 0.9,
        prefix_caching: bool = True,
        on_full: OnFull = "raise",
        num_states: int = 0,
        whole_hits: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        num_states = require_int("num_states", num_states, 0, 2**31 - 2)
        num_blocks = require_int("num_blocks", num_blocks, 0, 2**31 - 2)
        block_size = require_int("block_size", block_size, 1, 2**31 - 1)
        require_choice("on_full", on_full, ("raise", "evict"))
        require_flag("prefix_caching", prefix_caching)
        self._eviction_threshold = fraction("eviction_threshold", eviction_threshold)
        self._strategy = as_strategy(strategy)
        self._state = with_policy_of(new_state(num_blocks, block_size, prefix_caching, num_states), self._strategy)
        self._state.counters[0].whole_hits = require_flag("whole_hits", whole_hits)
        self._clock = asked_clock(self._state, clock)
        self._is_scored_in_numpy = is_scored_in_numpy(self._strategy)
        self._hooks = Hooks(self._strategy)
        self._victims = sequence_eviction.VictimOrder(self._strategy)
        self._namespaces = Namespaces()
        self._feed = EventFeed(self._namespaces, self._hooks.see_stores)
        self._listens = self._hooks.see_stores  # whether calls have something to publish
        if self._hooks.see_stores:
            self._state = with_log(self._state)
            self._state.counters[0].logging = 1
        self._state_copies: list[tuple[int, int]] = []
        self._untold = UntoldCopies()
        self._pins = KeptPins()
        evicts = on_full == "evict"
        self._room = Room(self._strategy, self._victims, self._hooks, self._pins, evicts, self._is_scored_in_numpy)
        self._is_open = False  # whether a call has begun that may leave something to finish
        self._wide_ids = False  # whether an id from 2**63 on was ever in use
        self._lock = new_lock(self)

    def allocate(
        self, seq_id: int, tokens: Tokens, *, priority: int = 0, cache_salt: str = "", reuse: bool = True
    ) -> SequenceInfo:
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
        reuse : bool
            Whether cached blocks are shared. Without, every token is left to compute, for its logits for instance; once
            committed, its blocks are found by others all the same.

        Returns
        -------
        SequenceInfo

        Raises
        ------
        InvalidOperation
            If the sequence exists, or an argument is out of range.
        OutOfMemory
            If the blocks that it needs cannot be had, or a slot for its state.
        """
        key = sequence_key(seq_id)
        count, ids, known = parse_tokens(tokens)
        priority = checked_priority(self._strategy, priority)
        reuse = (reuse is True or require_flag("reuse", reuse)) and known
        with self._lock:
            self._begin()
            namespace = self._enter_namespace(cache_salt)
            self._wide_ids |= key < 0
            while True:
                is_asked = self._hooks.exist and not self._state.counter("num_orders")
                if is_asked and sequence_table.find_row(self._state.packed, key) < 0:
                    orders = self._hooks.orders_to_allocate(self._state, namespace, count, ids, reuse)
                    if orders is not None:
                        self._order(orders)
                        self._hooks.about_to_hit(self._state, namespace, ids, reuse)
                status, a, b = sequences.allocate_row(
                    self._state.packed, key, namespace, priority, count, ids, known, reuse
                )
                if status == sequence_table.OK:
                    break
                if status == sequence_table.EXISTS:
                    raise sequence_table.exists(SeqId(seq_id))
                sequence_table.refuse(status, a, keys=())
                ask = partial(self._hooks.orders_to_allocate, namespace=namespace, count=count, ids=ids, reuse=reuse)
                matched = shared_blocks(self._state, namespace, ids, reuse)
                entries = segment_length(-(-count // self.block_size))
                self._make_room(status, a, b, Demand(ask, entries, matched=matched.tolist()))
            self._finish(b)
            return sequence_info(self._state, a)

    def append(self, seq_id: int, tokens: Tokens) -> SequenceInfo:
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
            self._begin()
            self._grow(np.array([key]), np.array([count]), ids, known)
            return sequence_info(self._state, row_of(self._state, seq_id))

    def append_batch(
        self, seq_ids: Ints, tokens: Ints | IntRows | None = None, *, counts: int | Ints | None = None
    ) -> BatchPlan:
        """Add tokens to many sequences and plan the forward pass over them: one call a step.

        Parameters
        ----------
        seq_ids : sequence of int
            Each sequence at most once; int64 arrays are taken as they are.
        tokens : array of int [n] or [n, k], or sequence of sequences of int, optional
            Token ids: one for each sequence, k for each, or a list for each. A decode step passes what was sampled.
        counts : int or sequence of int [n], optional
            Instead of ids, how many tokens of unknown ids each sequence gets; one each where neither is given.

        Returns
        -------
        BatchPlan
            Its query tokens are the tokens just added.

        Raises
        ------
        SequenceNotFound, OutOfMemory, InvalidOperation
            If one sequence cannot grow, none does; if both tokens and counts are given; if the system has no memory for
            the plan.
        """
        keys = sequence_keys(seq_ids, self._wide_ids)
        num_tokens, ids, known = parse_batch_tokens(tokens, counts, len(keys))
        with self._lock:
            self._begin()
            tick, width, wide, narrow = self._grow(keys, num_tokens, ids, known, seq_ids)
            return self._planned(keys, wide, narrow, width, tick)

    def plan(self, seq_ids: Ints, num_query_tokens: int | Ints | None = None) -> BatchPlan:
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
        OutOfMemory
            If the system has no memory for the plan.
        """
        keys = sequence_keys(seq_ids, self._wide_ids)
        if num_query_tokens is None:
            wanted = equal_counts(-1, len(keys))
        else:
            wanted = parse_counts("num_query_tokens", num_query_tokens, len(keys))
        with self._lock:
            self._settle()
            status, place, width, wide, narrow = sequences.plan_in_memory(self._state, keys, wanted)
            if status == sequence_table.NO_ROOM:
                number, most = sequence_number(keys[place]), "at most the tokens of the sequence"
                hint = "append() the rest first"
                raise bad_argument("num_query_tokens", f"{most}", f"{wanted[place]} for S{number}", hint)
            sequence_table.refuse(status, place, keys, seq_ids)
            return self._planned(keys, wide, narrow, width, place)

    def commit(
        self, plan_or_seq_ids: BatchPlan | int | Ints, *, upto: int | Ints | None = None, has_states: bool = True
    ) -> None:
        """Say that K and V are written: full blocks of known token ids become findable.

        With a plan, this holds for the tokens up to the end of the plan; with ids of sequences, for all their tokens.
        Where the index already holds an equal block, the sequence goes over to it, so make a new plan afterwards.

        Parameters
        ----------
        plan_or_seq_ids : BatchPlan, int or sequence of int
        upto : int or sequence of int [n], optional
            Only the first so many tokens, one number for all sequences or one for each: those that are written so far,
            or that a verification accepted. What was committed before stays so.
        has_states : bool
            Whether the slots of the sequences hold their states behind these tokens; if not, no snapshot is kept.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If `upto` is beyond the tokens, a sequence is named twice, or one of the plan streamed or began anew, or
            had tokens taken back and others appended; if they were only taken back, what is left is committed.
        """
        keys, counts, most, made_at = parse_commit(plan_or_seq_ids, upto, self._wide_ids)
        with self._lock:
            self._begin()
            if upto is not None:
                sequence_table.require_tokens("upto", self._state, keys, counts, most)
            status, place = sequences.commit_rows(self._state.packed, keys, counts, made_at, has_states)
            if status == sequence_table.STALE:
                raise stale_plan(sequence_number(keys[place]))
            sequence_table.refuse(status, place, keys)
            self._finish(place)

    def fork(self, src: int, dst: int) -> SequenceInfo:
        """Let the new sequence `dst` share every block of `src`; nothing is copied until one of them writes.

        Raises
        ------
        SequenceNotFound
            If there is no `src`.
        InvalidOperation
            If `dst` exists.
        OutOfMemory
            If sequences have states, and there is no slot for its own.
        """
        key = sequence_key(dst, "dst")
        with self._lock:
            self._begin()
            self._wide_ids |= key < 0
            row = row_of(self._state, src, "src")
            while True:
                status, a = sequences.fork_row(self._state.packed, row, key)
                if status == sequence_table.OK:
                    self._finish(self._state.counter("num_state_copies"))
                    return sequence_info(self._state, a)
                if status == sequence_table.EXISTS:
                    raise sequence_table.exists(SeqId(dst), "dst")
                self._make_room(status, a, 0, Demand())

    def truncate(self, seq_id: int, num_tokens: int) -> SequenceInfo:
        """Take back the tokens from position `num_tokens` on, of rejected drafts for instance.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence has fewer tokens.
        """
        with self._lock:
            self._settle()
            row = row_of(self._state, seq_id)
            record = self._state.sequence(row)
            hint = f"it has {record.num_tokens}; append() adds to them"
            num_tokens = require_int("num_tokens", num_tokens, 0, record.num_tokens, hint)
            if num_tokens < record.num_tokens:
                hole = record.hole_len if num_tokens > record.hole_start else 0
                self._score_before_release([row], (num_tokens + hole) // self.block_size)
                sequences.truncate_row(self._state.packed, row, num_tokens)
            return sequence_info(self._state, row)

    def free(self, seq_id: int) -> None:
        """End a sequence. What it committed stays findable until the strategy gives it up.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence is pinned and a block of it has 65,535 pins of freed sequences already.
        """
        with self._lock:
            self._settle()
            row = row_of(self._state, seq_id)
            self._score_before_release([row])
            if self._state.sequence(row).marks & PINNED:
                self._is_open = True
                self._pins.keep(self._state, row)
            sequences.free_row(self._state.packed, row)

    def touch(self, seq_id: int) -> SequenceInfo:
        """Count an access.

        Raises
        ------
        SequenceNotFound
        """
        with self._lock:
            self._settle()
            row = row_of(self._state, seq_id)
            sequence_table.access_row(self._state.packed, row)
            return sequence_info(self._state, row)

    def set_priority(self, seq_id: int, priority: int) -> SequenceInfo:
        """Change the priority of a sequence.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the strategy has no such level.
        """
        priority = checked_priority(self._strategy, priority)
        with self._lock:
            self._settle()
            row = row_of(self._state, seq_id)
            sequence_table.set_row_priority(self._state.packed, row, priority)
            return sequence_info(self._state, row)

    def pin(self, seq_id: int, num_tokens: int | None = None) -> SequenceInfo:
        """Keep a sequence from being evicted, and its first `num_tokens` (default: all) from being reclaimed.

        The pin outlives ``free``: the blocks that were committed stay findable until ``unpin(seq_id)``.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If the sequence has fewer tokens.
        """
        with self._lock:
            self._settle()
            row = row_of(self._state, seq_id)
            blocks = sequence_table.blocks_to_pin(self._state, row, num_tokens)
            sequence_table.pin_row(self._state.packed, row, blocks)
            return sequence_info(self._state, row)

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
            self._settle()
            row, kept = self._pins.held_by(self._state, key)
            self._is_open = True
            self._pins.drop(self._state, key)
            sequence_table.unpin_row(self._state.packed, row, np.array(kept, np.int32))

    def select_eviction_target(self, spared: Iterable[int] = ()) -> SeqId | None:
        """Return the sequence that ``evict`` would free, or None if there is none that may go.

        Sequences that are `spared` are passed over as pinned ones are; ids that are not in use are ignored.
        """
        keys = [sequence_key(seq_id, "spared") for seq_id in spared]
        with self._lock:
            rows_spared = frozenset(int(sequence_table.find_row(self._state.packed, key)) for key in keys)
            row = self._victims.first(self._state, rows_spared)
            return None if row is None else seq_id_of(self._state, row)

    def evict(self) -> SeqId:
        """Free the sequence that the strategy ranks lowest and return its id; pinned ones are left alone.

        Raises
        ------
        InvalidOperation
            If there is none.
        """
        with self._lock:
            self._settle()
            row = self._victims.first(self._state)
            if row is None:
                raise InvalidOperation("there is no sequence to evict", hint="unpin() one, or allocate() some")
            seq_id = seq_id_of(self._state, row)
            self._score_before_release([row])
            sequences.evict_rows(self._state.packed, np.array([row], np.int32))
            return seq_id

    def evict_to_threshold(self, target: float | None = None) -> list[SeqId]:
        """Evict until ``utilization <= target`` (default: the eviction threshold); returns the ids in order.

        Pinned sequences stay, even if the target is then missed.

        Raises
        ------
        InvalidOperation
            If `target` is no number.
        """
        limit = self._eviction_threshold if target is None else fraction("target", target)
        with self._lock:
            self._settle()
            excess = self.used_block_count - sequence_eviction.most_blocks(self.total_blocks, limit)
            if excess <= 0:
                return []
            rows = sequence_eviction.rows_to_evict(self._state, self._victims.in_order(self._state), excess)
            evicted = [seq_id_of(self._state, row) for row in rows.tolist()]
            self._score_before_release(rows.tolist())
            sequences.evict_rows(self._state.packed, rows)
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
        sink = require_int("sink_tokens", sink_tokens)
        window = require_int("window_tokens", window_tokens)
        with self._lock:
            self._begin()
            row = row_of(self._state, seq_id)
            record = self._state.sequence(row)
            if record.num_tokens <= sink + window:
                return 0
            if record.num_dropped and record.hole_start != sink:
                raise bad_argument("sink_tokens", f"{record.hole_start}, as {SeqId(seq_id)} streams already", f"{sink}")
            needed = int(sequences.blocks_to_stream(self._state.packed, row, sink, window))
            if needed > self.free_block_count:
                raise OutOfMemory(needed, self.free_block_count, "private copies of shared window blocks")
            self._order(self._hooks.orders_for(self._state, needed) if self._hooks.decide_reclaims else [])
            self._score_before_release([row], sink // self.block_size)
            dropped = sequences.stream_row(self._state.packed, row, sink, window)
            self._finish(self._state.counter("num_copies"))
            return int(dropped)

    def match_prefix(self, token_ids: TokenIds, cache_salt: str = "") -> int:
        """Return how many leading tokens an ``allocate`` would find cached now; changes nothing."""
        return self._count_found(sequences.count_matching, token_ids, cache_salt)

    def matching_block_ids(self, token_ids: TokenIds, cache_salt: str = "") -> tuple[BlockId, ...]:
        """Return the whole blocks that an ``allocate`` would share now, in the order of the text; changes nothing.

        A partly matching block, of which ``match_prefix`` counts tokens too, is not among them: it would be copied.
        """
        ids = parse_ids("token_ids", token_ids)
        with self._lock:
            blocks = shared_blocks(self._state, self._namespaces.find(cache_salt), ids, True)
        return block_ids_of(blocks.tolist())

    def match_blocks(self, token_ids: TokenIds, cache_salt: str = "") -> int:
        """Return how many leading tokens stand in whole blocks of the index; changes nothing.

        With recurrent states these may be more than ``match_prefix`` finds: what is behind the last snapshot cannot be
        reused yet. Their end is where texts part, so a good place for the next snapshot.
        """
        return self._count_found(sequences.count_stored, token_ids, cache_salt)

    def state_slots(self, plan_or_seq_ids: BatchPlan | Ints) -> npt.NDArray[np.int32]:
        """Return the slots of the states of the sequences of a plan, or of these ids, int32 ``[n]``.

        Raises
        ------
        SequenceNotFound
        InvalidOperation
            If there are none, as ``num_states`` is 0.
        """
        given = plan_or_seq_ids
        keys = given.seq_ids if isinstance(given, BatchPlan) else sequence_keys(given, self._wide_ids)
        if not self.total_states:
            raise bad_argument("num_states", "at least 1, for states", "0", "make the books with num_states=…")
        with self._lock:
            self._settle()
            slots: npt.NDArray[np.int32] = self._state.sequence_states[rows_of(self._state, keys)] - 1
            return slots

    def take_state_copies(self) -> npt.NDArray[np.int32]:
        """Return the copies of states to be made, int32 ``[k, 2]`` of slots (source, destination), once.

        They are due before the next forward pass, in this order. A ``PagedKvCache`` has made them: it returns none.
        """
        with self._lock:
            self._settle()
            copies, self._state_copies = np.array(self._state_copies, np.int32).reshape(-1, 2), []
            return copies

    def blocks_to_allocate(self, tokens: Tokens, cache_salt: str = "") -> int:
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
            matched = self._state.blocks[shared_blocks(self._state, self._namespaces.find(cache_salt), ids, known)]
            held = (matched["ref_count"] > 0) | (matched["pins"] > 0)
            return -(-count // self.block_size) - int(np.count_nonzero(held))

    def evict_block(self, block_id: int) -> None:
        """Forget one cached block: its content can no longer be found, and the block is free.

        It has to be a leaf, so that no block is kept that cannot be reached: to give up what follows a prefix, evict
        from its tail, ``for block_id in reversed(manager.matching_block_ids(ids))``. The strategy is not asked.

        Raises
        ------
        BlockNotFound
            If the pool has no such block.
        InvalidOperation
            If a sequence holds the block, or it is free or pinned, or a findable block continues it.
        """
        number = int(self.block(block_id).id)
        with self._lock:
            self._begin()
            require_leaf(self._state, number)
            self._order([(RECLAIM, number, 0)])
            sequences.carry_out_reclaims(self._state.packed)
            self._finish(0)

    def clear_prefix_cache(self) -> int:
        """Make everything stored so far unfindable, pinned blocks too; returns how many blocks became free.

        Live sequences keep their blocks but are never committed again: their prefix belongs to what was cleared.
        """
        with self._lock:
            self._begin()
            self._pins.clear(self._state)
            freed = int(prefix.clear(self._state.packed))
            self._recover()
            return freed

    def subscribe(self, callback: Callable[[CacheEvent], None]) -> Callable[[], None]:
        """Call `callback` with every ``BlockStored``, ``BlockRemoved`` and ``AllBlocksCleared``, in order.

        It is called while the cache is consistent and locked, and may call it itself. An exception in it is logged.

        Returns
        -------
        callable
            Call it to unsubscribe.
        """
        if not callable(callback):
            raise bad_argument("callback", "a callable", shown(callback), "give a function of one event")
        with self._lock:
            self._settle()
            if len(self._state.log) == 1:
                self._state = with_log(self._state)
            self._listens = True
            return self._feed.subscribe(callback, self._state)

    # What only reads.

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
    def total_states(self) -> int:
        """Slots for states of recurrent layers."""
        return len(self._state.states)

    @property
    def free_state_count(self) -> int:
        """Slots that a sequence can have now: free, or of snapshots of unpinned blocks."""
        return int(count_available_slots(self._state.packed))

    @property
    def used_state_count(self) -> int:
        """Slots that sequences hold."""
        return self._state.counter("states_used")

    @property
    def cached_state_count(self) -> int:
        """Snapshots at block boundaries."""
        return self._state.counter("states_cached")

    @property
    def table_memory_bytes(self) -> int:
        """Bytes of the block tables: in proportion to the blocks that sequences hold, each as often as it is shared."""
        return self._state.tables.nbytes

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
        """What is evicted first."""
        return self._strategy

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return self._state.counter("num_sequences")

    @property
    def sequence_ids(self) -> list[SeqId]:
        """The ids of the live sequences, ascending."""
        with self._lock:
            return sorted(seq_id_of(self._state, row) for row in live_rows(self._state))

    @property
    def stats(self) -> CacheStats:
        """The counters since the cache was made."""
        with self._lock:  # all of one moment
            return stats_of(self._state)

    def get_sequence(self, seq_id: int) -> SequenceInfo:
        """Return a snapshot of a sequence.

        Raises
        ------
        SequenceNotFound
        """
        with self._lock:
            return sequence_info(self._state, row_of(self._state, seq_id))

    def block(self, block_id: int) -> KvBlock:
        """Return a live view of a block.

        Raises
        ------
        BlockNotFound
            If the pool has no such block.
        """
        number = require_int("block_id", block_id, 0, 2**32 - 1)
        if number >= self.total_blocks:
            raise BlockNotFound(number)
        return KvBlock(self, number)

    def snapshot(self) -> CacheSnapshot:
        """Return the whole pool at this moment, frozen."""
        with self._lock:
            return snapshot_of(self._state, str(self._strategy))

    def hottest_prefixes(self, limit: int = 8, max_tokens: int = 0) -> tuple[HotPrefix, ...]:
        """Rank the findable prefixes by the tokens that their reuse saved.

        A prefix ends where its uses do: at a block that was used more often than each block that continues it. What it
        saved is its length times its uses beyond the first.

        Parameters
        ----------
        limit : int
            The most prefixes.
        max_tokens : int
            The first so many token ids of each prefix are returned with it; 0 for none.

        Returns
        -------
        tuple of HotPrefix
            The best first; ties go to the lower block id.
        """
        limit, max_tokens = require_int("limit", limit), require_int("max_tokens", max_tokens)
        with self._lock:
            return hottest_prefixes(self._state, limit, max_tokens)

    def block_records(self, block_ids: Ints) -> npt.NDArray[np.void]:
        """Return copies of the records of some blocks, with the fields of ``control.state.BLOCK``."""
        blocks = parse_ids("block_ids", block_ids)
        if len(blocks) and (highest := int(blocks.max())) >= self.total_blocks:
            raise BlockNotFound(highest)
        with self._lock:
            records: npt.NDArray[np.void] = self._state.blocks[blocks]
            return records

    def check(self) -> None:
        """Verify every invariant of the cache, in time linear in the pool.

        Raises
        ------
        CorruptedState
            With what is wrong and the state around it: a bug in pagedkv.
        """
        with self._lock:
            self._settle()
            check_state(self._state, self._pins.blocks)

    def __contains__(self, seq_id: object) -> bool:
        try:
            key = sequence_key(seq_id)
        except InvalidOperation:
            return False
        with self._lock:
            return bool(sequence_table.find_row(self._state.packed, key) >= 0)

    def __len__(self) -> int:
        return self.num_sequences

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> NoReturn:
        # A shallow copy would write into the same books, and a deep one stops at the lock without saying why.
        name = type(self).__name__
        raise InvalidOperation(f"a {name} cannot be copied or pickled: fork() its sequences, or take a snapshot()")

    def __str__(self) -> str:
        with self._lock:
            blocks = (
                f"Blocks: {self.used_block_count}/{self.total_blocks} used ({self.utilization:.1%}), "
                f"{self.cached_block_count} cached, {self.free_block_count} free"
            )
            strategy = f"Strategy: {self._strategy} (block_size={self.block_size})"
            live = f"Sequences: {self.num_sequences} active"
            lines = [strategy, blocks, *self._report_lines(), live, *self.stats.report()]
            return "\n  ".join([type(self).__name__, *lines])

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"{type(self).__name__}(num_blocks={self.total_blocks}, block_size={self.block_size}, "
                f"strategy={str(self._strategy)!r}, used={self.used_block_count}, cached={self.cached_block_count})"
            )

    # Under the lock: what the calls above share.

    def _settle(self) -> None:
        """Finish what an interrupted call left to do: every call that reads or changes it begins with this."""
        if self._is_open:
            self._recover()
        if self._clock is not None:
            tell_time(self._state, self._clock())

    def _begin(self) -> None:
        """Begin a call that leaves something to do beside the books."""
        self._settle()
        self._is_open = True

    def _finish(self, num_copies: int) -> None:
        """Do what a call leaves to do beside the books."""
        if num_copies:
            self._make_copies()
        if self._listens:
            self._publish()
        self._is_open = self._listens and self._feed.is_delivering

    def _recover(self) -> None:
        """Do whatever the books say is left to do; this may be interrupted as well, and begin again."""
        state = self._state
        self._pins.settle(state)
        state.counters[0].num_orders = 0
        if state.counter("was_cleared"):
            forget_blocks(state)
            state.counters[0].was_cleared = 0
        self._finish(state.counter("num_copies") + state.counter("num_state_copies"))

    def _grow(self, keys: Any, counts: Any, ids: Any, known: bool, given: Any = None) -> tuple[int, int, Any, Copies]:
        while True:
            if self._hooks.decide_reclaims:
                if (orders := self._hooks.orders_to_grow(self._state, keys, counts)) is not None:
                    self._order(orders)
            try:
                answer = sequences.grow_rows(self._state.packed, keys, counts, ids, known)
            except MemoryError as error:
                raise sequences.too_large_plan(self._state, keys) from error
            status, a, b, num_copies, wide, narrow = answer
            if status == sequence_table.OK:
                break
            sequence_table.refuse(status, a, keys, given)
            growing = rows_of(self._state, keys)
            entries = entries_to_grow(self._state, growing, counts)
            tails = sequence_eviction.written_tails(self._state, growing, counts)
            ask = partial(self._hooks.orders_to_grow, keys=keys, counts=counts)
            self._make_room(status, a, b, Demand(ask, entries, frozenset(growing), tails=tails))
        self._finish(num_copies)
        return a, b, wide, narrow

    def _require_fresh(self, plan: BatchPlan) -> None:
        """Refuse a plan whose query tokens have other slots by now, or none."""
        with self._lock:
            sequences.require_fresh(self._state, plan)

    def _make_room(self, status: int, a: int, b: int, demand: Demand) -> None:
        """Grow the arrays, or order evictions, so that the compiled call can be made again."""
        self._state, orders = self._room.make(self._state, status, a, b, demand)
        if orders:
            self._order(orders)

    def _order(self, orders: Sequence[Order]) -> None:
        """Leave orders in the books, for the compiled call that follows."""
        self._state = with_orders(self._state, orders)
        self._state.counters[0].num_orders = len(orders)

    def _score_before_release(self, rows: Sequence[int], first: int = 0) -> None:
        if self._is_scored_in_numpy:
            sequence_eviction.score_releases(self._state, self._strategy, rows, first)

    def _make_copies(self) -> None:
        """Make the copies that the books name, and note them for the next plan."""
        state = self._state
        num_copies = state.counter("num_copies")
        if num_copies and not self._untold.has_heard(changes := state.counter("changes")):
            copies = state.copies[:num_copies].copy()
            self._copy(copies)
            self._untold.note(changes, copies)
        state.counters[0].num_copies = 0
        if state.counter("num_state_copies"):
            self._copy_states(state.state_copies[: state.counter("num_state_copies")].copy())
            state.counters[0].num_state_copies = 0

    def _copy(self, copies: Copies) -> None:
        """Copy K and V; if this is interrupted, it is done again from the start."""

    def _copy_states(self, copies: Copies) -> None:
        """Copy states, or empty those that are copied to themselves; if this is interrupted, it is done again."""
        self._state_copies += [(source, slot) for source, slot in copies.tolist() if source != slot]

    def _planned(self, keys: Any, wide: Any, narrow: Any, width: int, tick: int) -> BatchPlan:
        """Return the plan, and with it the copies that no plan has told of."""
        if not self._untold.noted[1]:
            return self._made(sequences.plan_from(keys, wide, narrow, width, NO_COPIES, tick))
        return self._untold.tell(
            lambda copies: self._made(sequences.plan_from(keys, wide, narrow, width, copies, tick))
        )

    def _made(self, plan: BatchPlan) -> BatchPlan:
        """Return a plan that was made just now."""
        return plan

    def _report_lines(self) -> list[str]:
        return []

    def _count_found(self, count: Callable[[State, int, Any], int], token_ids: Any, cache_salt: str) -> int:
        """Count leading tokens in the index by a kernel."""
        ids = parse_ids("token_ids", token_ids)
        with self._lock:
            namespace = self._namespaces.find(cache_salt)
            return (
                int(count(self._state.packed, namespace, ids)) if namespace is not None and self.prefix_caching else 0
            )

    def _enter_namespace(self, cache_salt: str) -> int:
        self._state, number = self._namespaces.enter(self._state, cache_salt)
        return number

    def _publish(self) -> None:
        try:
            if self._hooks.see_stores:
                self._hooks.stored(self._state, stored_blocks(self._state))
        finally:
            self._feed.publish(self._state)
            self._listens = self._hooks.see_stores or self._feed.is_active

    def _block_keys(self, block: int) -> BlockContent:
        raise InvalidOperation("a BlockManager holds no keys; use a PagedKvCache")

    def _block_values(self, block: int) -> BlockContent:
        raise InvalidOperation("a BlockManager holds no values; use a PagedKvCache")
