"""Which sequence goes first: kept in order by what changed, never by a scan of all sequences.

Every access lists its sequence once as dirty, O(1). Only when somebody asks for a victim are the dirty ones scored, in
one call to the strategy, and pushed; entries that a newer one has overtaken are skipped when they come up.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from pagedkv.control.protocol import EvictionStrategy, checked_scores
from pagedkv.control.state import DIRTY, LIVE, PINNED, State
from pagedkv.control.types import SequenceView


class VictimOrder:
    """The order in which sequences are evicted: by score, ties by id."""

    def __init__(self, strategy: EvictionStrategy) -> None:
        self._strategy = strategy
        self._heap: list[tuple[int, int, int, int]] = []  # score, seq_id, row, entry number
        self._entries = 0

    def first(self, state: State, spared: frozenset[int] = frozenset()) -> int | None:
        """Return the row of the first victim that is neither pinned nor `spared`, or None."""
        self._rank_dirty(state)
        set_aside = []
        chosen = None
        while self._heap:
            entry = self._heap[0]
            row = entry[2]
            record = state.sequence(row)
            if record.ranked != entry[3] or not record.marks & LIVE:
                heapq.heappop(self._heap)
            elif record.marks & PINNED or row in spared:
                set_aside.append(heapq.heappop(self._heap))
            else:
                chosen = row
                break
        for entry in set_aside:
            heapq.heappush(self._heap, entry)
        return chosen

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
        state.sequences["marks"][rows] &= ~DIRTY
        counters.num_dirty = 0
        if len(self._heap) > 4 * int(counters.num_sequences) + 64:
            self._compact(state)

    def _compact(self, state: State) -> None:
        sequences = state.sequences
        self._heap = [e for e in self._heap if sequences[e[2]].ranked == e[3] and sequences[e[2]].marks & LIVE]
        heapq.heapify(self._heap)


# Would evicting sequences make room? Asked before the first one goes, so that nothing is evicted in vain.


def written_tails(state: State, rows: Sequence[int], counts: npt.NDArray[np.int64]) -> list[int]:
    """Return the partly filled last blocks that sequences write to when they grow by `counts`, one for each writer."""
    size = int(state.counters[0].block_size)
    growing = [state.sequences[row] for row in rows]
    return [
        int(state.tables[row, record.num_blocks - 1])
        for row, record, count in zip(rows, growing, counts.tolist(), strict=True)
        if count > 0 and (record.num_tokens + record.hole_len) % size
    ]


def fits_after_evicting(
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
        owners.update(state.tables[row, : state.sequences[row].num_blocks].tolist())
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
