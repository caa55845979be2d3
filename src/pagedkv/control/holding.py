"""What the doors of a BlockManager share: growing, making room, releasing, copying. Called under the lock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control import lifecycle, rows, sequences
from pagedkv.control.arguments import (
    sequence_key,
    sequence_number,
    whole_number,
)
from pagedkv.control.hooks import block_view
from pagedkv.control.inspection import Inspection
from pagedkv.control.layout import copies_in
from pagedkv.control.protocol import checked_scores
from pagedkv.control.room import fits_after_evicting, written_tails
from pagedkv.control.rules import CUSTOM
from pagedkv.control.state import MAX_PINS, PINNED
from pagedkv.control.strategies import MAX_PRIORITY, Priority
from pagedkv.control.types import SeqId
from pagedkv.errors import InvalidOperation, OutOfMemory, SequenceNotFound

Copies = npt.NDArray[np.int32]
_NO_COPIES = np.empty((0, 2), np.int32)


class Holding(Inspection):
    """The steps that public calls are made of."""

    _on_full: str

    def _grow(self, keys: Any, counts: Any, ids: Any, known: bool, given: Any = None) -> tuple[int, int, Any, Copies]:
        while True:
            if self._hooks.decide_reclaims:
                self._reclaim_to_grow(keys, counts)
            status, a, b, num_copies, wide, narrow = sequences.grow_rows(self._state.packed, keys, counts, ids, known)
            if status == rows.OK:
                break
            self._refuse(status, a, keys, given)
            growing = [int(rows.find_row(self._state.packed, key)) for key in keys.tolist()]
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
        elif self._on_full == "raise" or not fits_after_evicting(
            self._state, a - b, spared, matched, tails, chain.from_iterable(self._kept_pins.values())
        ):
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
        record = self._state.sequence(row)
        if record.marks & PINNED:
            table = self._table(row)[: record.pinned_blocks]
            pinned = table[self._state.blocks["indexed"][table] != 0].tolist()
            if pinned and self._state.blocks["pins"][pinned].max() == MAX_PINS:
                raise InvalidOperation(f"a block has at most {MAX_PINS} pins; unpin sequences that were freed")
            self._kept_pins.setdefault(record.seq_id, []).extend(pinned)
        lifecycle.free_row(self._state.packed, row)

    def _score_before_release(self, row: int, first: int) -> None:
        """Let the strategy score what this sequence may leave cached; done first, so that its errors change nothing."""
        if self._state.counter("rule") == CUSTOM:
            ids = lifecycle.release_candidates(self._state.packed, row, first)
            record, blocks = self._state.sequence(row), self._state.blocks
            blocks["last_access"][ids] = np.maximum(blocks["last_access"][ids], record.last_access)
            blocks["priority"][ids] = np.maximum(blocks["priority"][ids], record.priority)
            self._score_blocks(ids)
        lifecycle.hand_over_use(self._state.packed, row, first)

    def _reclaim_for(
        self, namespace: int, count: int, ids: Any, known: bool, *, as_far_as_it_fits: bool = False
    ) -> None:
        """Let a strategy that decides over reclaims make room for an allocation, if it fits."""
        if not self._hooks.decide_reclaims:
            return
        matched, needed, available = self._room_for(namespace, count, ids, known)
        if needed <= available or as_far_as_it_fits:
            self._let_strategy_make_room(min(needed, available), int(matched[-1]) if len(matched) else -1)

    def _room_for(self, namespace: int, count: int, ids: Any, known: bool) -> tuple[npt.NDArray[np.int32], int, int]:
        """Return the blocks that an allocation would share, how many more it needs, and how many it can have."""
        state = self._state
        matched = lifecycle.matching_blocks(state.packed, namespace, ids) if known else np.empty(0, np.int32)
        idle = (state.blocks["ref_count"][matched] == 0) & (state.blocks["pins"][matched] == 0)
        return matched, -(-count // self.block_size) - len(matched), self.free_block_count - int(idle.sum())

    def _reclaim_to_grow(self, keys: Any, counts: Any) -> None:
        """Let a strategy that decides over reclaims make room for more tokens, if they fit."""
        status, needed = sequences.blocks_to_grow(self._state.packed, keys, counts)
        if status == rows.OK:
            self._let_strategy_make_room(needed)

    def _let_strategy_make_room(self, needed: int, spared: int = -1) -> None:
        try:
            self._hooks.make_room(self._state, needed, spared)
        except BaseException:
            self._publish()  # what it gave up before it failed is gone
            raise

    def _tell_hits(self, row: int) -> None:
        """Tell the strategy what the new sequence `row` found; if it fails, the sequence never was."""
        if not self._hooks.see_hits:
            return
        try:
            self._hooks.hit(self._state, self._table(row)[: self._state.sequence(row).num_indexed])
        except BaseException:
            lifecycle.free_row(self._state.packed, row)
            self._publish()
            raise

    def _score_blocks(self, ids: npt.NDArray[np.int32]) -> None:
        if len(ids):
            view, now = block_view(self._state, ids), self._state.counter("tick")
            scores = self.eviction_strategy.score_blocks(view, now)
            checked = checked_scores(self.eviction_strategy, "score_blocks", scores, len(ids))
            self._state.blocks["score"][ids] = checked

    def _checked_priority(self, priority: Any) -> int:
        strategy = self.eviction_strategy
        highest = strategy.levels - 1 if isinstance(strategy, Priority) else MAX_PRIORITY
        return whole_number("priority", priority, 0, highest)

    def _copy(self, copies: Copies) -> None:
        """Note copies for the next plan; a cache with K and V makes them at once as well."""
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
