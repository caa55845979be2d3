"""Which sequence goes first: kept in order by what changed, never by a scan of all sequences.

Every access lists its sequence once as dirty, O(1). Only when somebody asks for a victim are the dirty ones scored, in
one call to the strategy, and pushed; entries that a newer one has overtaken are skipped when they come up.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.control.block_tables import with_room_for_tables
from pagedkv.control.protocol import EvictionStrategy, Hooks, Order, block_scores, block_view, checked_scores
from pagedkv.control.sequence_table import NEEDS_ROWS, NEEDS_TABLES, NO_SLOT, KeptPins, clear_dirty, with_more_rows
from pagedkv.control.sequences import count_leaving, evict_rows, release_candidates
from pagedkv.control.state import EVICT, LIVE, PINNED, State
from pagedkv.control.types import SequenceView
from pagedkv.errors import OutOfMemory

_Entry = tuple[int, int, int, int]  # score, seq_id, row, entry number


class VictimOrder:
    """The order in which sequences are evicted: by score, ties by id."""

    def __init__(self, strategy: EvictionStrategy) -> None:
        self._strategy = strategy
        self._heap: list[_Entry] = []
        self._entries = 0

    def first(self, state: State, spared: frozenset[int] = frozenset()) -> int | None:
        """Return the row of the first victim that is neither pinned nor `spared`, or None."""
        return next(self.in_order(state, spared), None)

    def in_order(self, state: State, spared: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield the rows of all victims, the first one first; nothing may change meanwhile."""
        self._rank_dirty(state)
        while self._heap and not _is_valid(state, self._heap[0]):
            heapq.heappop(self._heap)
        # Best first through the binary heap, which stays as it is.
        frontier = [(self._heap[0], 0)] if self._heap else []
        while frontier:
            entry, place = heapq.heappop(frontier)
            for below in range(2 * place + 1, min(2 * place + 3, len(self._heap))):
                heapq.heappush(frontier, (self._heap[below], below))
            row = entry[2]
            if _is_valid(state, entry) and row not in spared and not state.sequence(row).marks & PINNED:
                yield row

    def _rank_dirty(self, state: State) -> None:
        counters = state.counters[0]
        if counters.num_dirty == 0:
            return
        rows = state.dirty[: counters.num_dirty].copy()
        live = rows[(state.sequences["marks"][rows] & LIVE) != 0]
        if len(live):
            view = SequenceView(state.sequences[live], live)
            scores = checked_scores(
                self._strategy,
                "score_sequences",
                self._strategy.score_sequences(view, int(counters.tick)),
                len(live),
            )
            state.sequences["ranked"][live] = np.arange(self._entries + 1, self._entries + 1 + len(live))
            for score, seq_id, row in zip(scores.tolist(), view.seq_id.tolist(), live.tolist(), strict=True):
                self._entries += 1
                heapq.heappush(self._heap, (score, seq_id, row, self._entries))
        clear_dirty(state.packed)
        if len(self._heap) > 4 * int(counters.num_sequences) + 64:
            self._compact(state)

    def _compact(self, state: State) -> None:
        valid = [entry for entry in self._heap if _is_valid(state, entry)]
        heapq.heapify(valid)
        self._heap = valid


def _is_valid(state: State, entry: _Entry) -> bool:
    record = state.sequence(entry[2])
    return bool(record.ranked == entry[3] and record.marks & LIVE)


def rows_to_evict(state: State, order: Iterable[int], num_blocks: int) -> npt.NDArray[np.int32]:
    """Return the first rows of `order` whose end leaves `num_blocks` blocks without an owner; all if none do."""
    rows: list[int] = []
    order = iter(order)
    while more := list(islice(order, max(1, len(rows)))):
        rows += more
        count = int(count_leaving(state.packed, np.array(rows, np.int32), num_blocks))
        if count <= len(rows):
            return np.array(rows[:count], np.int32)
    return np.array(rows, np.int32)


def most_blocks(total: int, utilization: float) -> int:
    """Return how many of `total` blocks may be used so that the utilization is no higher."""
    most = int(utilization * total) + 1
    while most > 0 and most / max(1, total) > utilization:
        most -= 1
    return most


def orders_behind(state: State, rows: npt.NDArray[np.int32], ask: Callable[[State], list[Order] | None]) -> list[Order]:
    """Ask for the orders that make room once enough of `rows` are evicted: on a copy of the books."""
    trial = state.copied()
    for place in range(len(rows)):
        evict_rows(trial.packed, rows[place : place + 1])
        orders = ask(trial)
        if orders is not None:
            return orders
    return []


def score_releases(state: State, strategy: EvictionStrategy, rows: Sequence[int], first: int) -> None:
    """Let a strategy in NumPy score what sequences leave cached when they end one after the other.

    The last one releases what it has from table place `first` on. A strategy that fails changes nothing.
    """
    scored = []
    for place in range(len(rows)):
        ids = release_candidates(state.packed, np.array(rows[: place + 1], np.int32), first)
        if not len(ids):
            continue
        view = block_view(state, ids)
        view.records["ref_count"] = 1
        for row in rows[: place + 1]:
            record = state.sequence(row)
            held = np.isin(ids, state.table(row))
            for field in ("last_access", "priority"):
                view.records[field][held] = np.maximum(view.records[field][held], getattr(record, field))
        scored.append((ids, block_scores(strategy, view, state.counter("tick"))))
    for ids, scores in scored:
        state.blocks["score"][ids] = scores  # of blocks in use, where it means nothing yet


# Would evicting sequences make room? Asked before the first one goes, so that nothing is evicted in vain.


def written_tails(state: State, rows: Sequence[int], counts: npt.NDArray[np.int64]) -> list[int]:
    """Return the partly filled last blocks that sequences write to when they grow by `counts`, one for each writer."""
    size = int(state.counters[0].block_size)
    growing = [state.sequences[row] for row in rows]
    return [
        int(state.table(row)[-1])
        for row, record, count in zip(rows, growing, counts.tolist(), strict=True)
        if count > 0 and (record.num_tokens + record.hole_len) % size
    ]


def rows_for_room(
    state: State,
    victims: VictimOrder,
    missing: int,
    spared: frozenset[int],
    matched: Sequence[int],
    tails: Sequence[int],
    kept: Sequence[int],
) -> npt.NDArray[np.int32]:
    """Return the rows whose end makes up for `missing` blocks, none if nothing does; else as `_fits_after_evicting`."""
    if not _fits_after_evicting(state, missing, spared, matched, tails, kept):
        return np.empty(0, np.int32)
    # Blocks that the call shares or that pins keep are left by their owners, but not free.
    return rows_to_evict(state, victims.in_order(state, spared), missing + len(matched) + len(kept))


def _fits_after_evicting(
    state: State,
    missing: int,
    spared: frozenset[int],
    matched: Iterable[int],
    tails: Sequence[int],
    kept: Iterable[int],
) -> bool:
    """Tell whether evicting every sequence that may go makes up for `missing` blocks.

    Pinned and `spared` rows stay. Blocks that the call shares (`matched`) are not freed for it, whoever releases
    them, nor are those that pins of freed sequences keep (`kept`); a shared tail among `tails` need not be copied once
    only its writers hold it.
    """
    marks = state.sequences["marks"][: int(state.counters[0].rows_used)]
    pinned = np.flatnonzero((marks & (LIVE | PINNED)) == (LIVE | PINNED)).tolist()
    owners: Counter[int] = Counter()
    for row in spared.union(pinned):
        owners.update(state.table(row).tolist())
    staying = {int(block) for block in chain(matched, kept) if state.blocks[block].ref_count > 0}
    freed = int(state.counters[0].used) - len(owners.keys() | staying)
    return freed + _copies_saved(state, tails, owners) >= missing


def _copies_saved(state: State, tails: Sequence[int], owners: Counter[int]) -> int:
    saved = 0
    for tail, writers in Counter(tails).items():
        block = state.blocks[tail]
        is_copied_anyway = block.pins > 0 or (block.indexed and block.num_children > 0)
        saved += bool(block.ref_count > writers == owners[tail] and not is_copied_anyway)
    return saved


class Demand(NamedTuple):
    """What a call wants that was refused for want of room.

    `ask` gives the strategy's orders on a state, `entries` are those of block tables; the rest is for `rows_for_room`.
    """

    ask: Callable[[State], list[Order] | None] = lambda state: None
    entries: int = 0
    spared: frozenset[int] = frozenset()
    matched: Sequence[int] = ()
    tails: Sequence[int] = ()


class Room:
    """Makes room for a compiled call that was refused: larger arrays, or evictions as the strategy ranks them."""

    def __init__(
        self,
        strategy: EvictionStrategy,
        victims: VictimOrder,
        hooks: Hooks,
        pins: KeptPins,
        is_evicting: bool,
        is_scored_in_numpy: bool,
    ) -> None:
        self._strategy = strategy
        self._is_scored_in_numpy = is_scored_in_numpy
        self._victims = victims
        self._hooks = hooks
        self._pins = pins
        self._is_evicting = is_evicting

    def make(self, state: State, status: int, a: int, b: int, demand: Demand) -> tuple[State, list[Order]]:
        """Return a state with which the call can be made again, and the evictions that are to happen with it.

        Raises
        ------
        OutOfMemory
            If nobody may be evicted, or that makes no room.
        """
        if status == NEEDS_ROWS:
            return with_more_rows(state), []
        if status == NEEDS_TABLES:
            return with_room_for_tables(state, a), []
        shortage = _no_slot(state) if status == NO_SLOT else OutOfMemory(a, b)
        shortage.add_note(self._way_out(state, a))
        if not self._is_evicting or state.counter("num_orders"):
            raise shortage
        rows = self._row_for_slot(state) if status == NO_SLOT else self._rows_for_blocks(state, a - b, demand)
        if not len(rows):
            raise shortage
        state = with_room_for_tables(state, demand.entries)
        if self._is_scored_in_numpy:
            score_releases(state, self._strategy, rows.tolist(), 0)
        behind = orders_behind(state, rows, demand.ask) if self._hooks.decide_reclaims else []
        return state, [(EVICT, row, 0) for row in rows.tolist()] + behind

    def _way_out(self, state: State, requested: int) -> str:
        """Return what to do where blocks are missing."""
        if requested > len(state.blocks):
            return f"The pool has {len(state.blocks)} in all: give it more with num_blocks."
        if self._is_evicting:
            return "What is left is pinned, or is needed itself: unpin() some."
        return 'Let free() or evict() make room, or on_full="evict".'

    def _row_for_slot(self, state: State) -> npt.NDArray[np.int32]:
        row = self._victims.first(state)
        return np.array([] if row is None else [row], np.int32)

    def _rows_for_blocks(self, state: State, missing: int, demand: Demand) -> npt.NDArray[np.int32]:
        kept = self._pins.all_blocks
        return rows_for_room(state, self._victims, missing, demand.spared, demand.matched, demand.tails, kept)


def _no_slot(state: State) -> OutOfMemory:
    """Return the error for a sequence that finds no slot for its state."""
    hint = f"all {len(state.states)} are held by sequences or by pinned snapshots"
    return OutOfMemory(1, 0, hint, "slots for states")
