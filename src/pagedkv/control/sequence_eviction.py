"""Which sequence goes first: kept in order by what changed, never by a scan of all sequences.

Every access lists its sequence once as dirty, O(1). Only when somebody asks for a victim are the dirty ones scored, in
one call to the strategy, and pushed; entries that a newer one has overtaken are skipped when they come up.
"""

from __future__ import annotations

import heapq

import numpy as np

from pagedkv.control.protocol import EvictionStrategy, checked_scores
from pagedkv.control.state import DIRTY, LIVE, PINNED, State
from pagedkv.control.views import SequenceView


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
