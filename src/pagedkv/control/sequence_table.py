"""Rows of the sequence arrays: each sequence's record, found by its id through open addressing."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.arguments import sequence_key, sequence_number
from pagedkv.control.pool import unpin_block
from pagedkv.control.state import DIRTY, LIVE, MAX_PINS, PINNED, SEQUENCE, State, power_of_two
from pagedkv.errors import InvalidOperation, SequenceNotFound, bad_argument
from pagedkv.jit import borrowed, compiled, inlined
from pagedkv.validate import require_int

OK, NOT_FOUND, REPEATED, EXISTS, NO_ROOM, NEEDS_TABLES, NEEDS_ROWS, STALE, TOO_LONG, NO_SLOT = range(10)
"""What a compiled function answers; the doors turn it into a typed error, or make room and call again."""

MAX_TOKENS = 2**31 - 1
"""The most tokens of a sequence, those in its hole included: plans hold lengths as int32."""

Ints = npt.NDArray[np.int64]
Narrow = npt.NDArray[np.int32]


def refuse(status: int, place: int, keys: Any, given: Any = None) -> None:
    """Raise what an answer means for the sequence at `place` of a call, if it is an error of the caller."""
    if status == NOT_FOUND:
        if given is not None:
            listed = given.tolist() if hasattr(given, "tolist") else given
            sequence_key(listed[place], "seq_ids")  # a negative id was not looked for: say so
        raise SequenceNotFound(sequence_number(keys[place]))
    if status == REPEATED:
        raise bad_argument("seq_ids", "each sequence once", f"S{sequence_number(keys[place])} twice", "name it once")
    if status == TOO_LONG:
        raise bad_argument("tokens", f"sequences of at most {MAX_TOKENS} tokens", f"{place}")


_STEP = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


@inlined
def _slot_of(state: State, seq_id: int) -> int:
    """Return where the search for an id begins: for ids that somebody chose, too, hardly ever at one place.

    Multiply-shift with a secret odd factor is universal (Dietzfelbinger et al. 1997, "A reliable randomized algorithm
    for the closest-pair problem"); the step before it, a bijection, breaks up ids in a row.
    """
    mixed = np.uint64(np.int64(seq_id)) * _STEP
    mixed = ((mixed ^ (mixed >> _HALF)) * np.uint64(state.counters[0].factor)) >> _HALF
    return np.int64((mixed * np.uint64(len(state.seq_table))) >> _HALF)  # its highest bits


@compiled
def find_row(state: State, seq_id: int) -> int:
    """Return the row of a live sequence, or -1."""
    state = borrowed(state)
    mask = len(state.seq_table) - 1
    slot = _slot_of(state, seq_id)
    while state.seq_table[slot] != 0:
        row = state.seq_table[slot] - 1
        if state.sequences[row].seq_id == seq_id:
            return row
        slot = (slot + 1) & mask
    return -1


@inlined
def _enter(state: State, row: int) -> None:
    mask = len(state.seq_table) - 1
    slot = _slot_of(state, state.sequences[row].seq_id)
    while state.seq_table[slot] != 0:
        slot = (slot + 1) & mask
    state.seq_table[slot] = row + 1


@inlined
def has_spare_row(state: State) -> bool:
    """Return whether another sequence fits without growing the arrays."""
    counters = state.counters[0]
    return counters.free_row != 0 or counters.rows_used < len(state.sequences)


@inlined
def spare_row(state: State) -> int:
    """Return the row that the next sequence gets."""
    counters = state.counters[0]
    return counters.free_row - 1 if counters.free_row != 0 else counters.rows_used


@inlined
def next_epoch(state: State, least: int) -> int:
    """Return a tick of at least `least` that is later than that of any plan so far, whichever sequences are in it."""
    counters = state.counters[0]
    epoch: int = max(least, counters.newest_epoch + 1)
    counters.newest_epoch = epoch
    return epoch


@inlined
def new_row(state: State, seq_id: int, namespace: int, priority: int) -> int:
    """Enter a live sequence without tokens and return its row; there is a spare row."""
    counters = state.counters[0]
    row = spare_row(state)
    if counters.free_row != 0:
        counters.free_row = state.sequences[row].num_blocks
    else:
        counters.rows_used += 1
    record = state.sequences[row]
    record.seq_id = seq_id
    record.num_tokens = 0
    record.num_committed = 0
    record.num_known = 0
    record.num_cached = 0
    record.num_dropped = 0
    record.num_outputs = 0
    record.access_count = 0
    record.created = counters.tick
    record.epoch = next_epoch(state, counters.tick)
    record.stamp = 0
    record.num_blocks = 0
    record.num_indexed = 0
    record.priority = priority
    record.namespace = namespace
    record.hole_start = 0
    record.hole_len = 0
    record.pinned_blocks = 0
    record.marks = LIVE | (record.marks & DIRTY)
    _enter(state, row)
    counters.num_sequences += 1
    state.roots[namespace, 2] += 1
    return row


@inlined
def drop_row(state: State, row: int) -> None:
    """Forget a sequence; the entries behind it in its probe chain close up (no tombstones)."""
    counters = state.counters[0]
    mask = len(state.seq_table) - 1
    record = state.sequences[row]
    slot = _slot_of(state, record.seq_id)
    while state.seq_table[slot] != row + 1:
        slot = (slot + 1) & mask
    following = (slot + 1) & mask
    while state.seq_table[following] != 0:
        home = _slot_of(state, state.sequences[state.seq_table[following] - 1].seq_id)
        if ((following - home) & mask) >= ((following - slot) & mask):
            state.seq_table[slot] = state.seq_table[following]
            slot = following
        following = (following + 1) & mask
    state.seq_table[slot] = 0
    state.roots[record.namespace, 2] -= 1
    record.marks &= DIRTY
    record.num_blocks = counters.free_row  # a free row's link to the next free row
    counters.free_row = row + 1
    counters.num_sequences -= 1


@inlined
def touch_row(state: State, row: int) -> None:
    """Count an access at the current tick; the sequence is to be ranked anew before the next eviction."""
    record = state.sequences[row]
    record.last_access = state.counters[0].tick
    record.access_count += 1
    mark_dirty(state, row)


@inlined
def mark_dirty(state: State, row: int) -> None:
    """List a changed sequence, once, for the eviction order."""
    record = state.sequences[row]
    if record.marks & DIRTY == 0:
        record.marks |= DIRTY
        counters = state.counters[0]
        state.dirty[counters.num_dirty] = row
        counters.num_dirty += 1


@compiled
def clear_dirty(state: State) -> None:
    """Empty the list of changed sequences: all of them are ranked."""
    state = borrowed(state)
    counters = state.counters[0]
    for i in range(counters.num_dirty):
        state.sequences[state.dirty[i]].marks &= ~DIRTY
    counters.num_dirty = 0


@compiled
def access_row(state: State, row: int) -> None:
    """Count an access of its own."""
    state = borrowed(state)
    state.counters[0].tick += 1
    touch_row(state, row)


@compiled
def set_row_priority(state: State, row: int, priority: int) -> None:
    """Change the priority of a sequence."""
    state = borrowed(state)
    state.sequences[row].priority = priority
    mark_dirty(state, row)


@compiled
def pin_row(state: State, row: int, num_blocks: int) -> None:
    """Keep a sequence from being evicted, and its first blocks from being reclaimed once it is freed."""
    state = borrowed(state)
    state.sequences[row].pinned_blocks = num_blocks
    state.sequences[row].marks |= PINNED


@compiled
def unpin_row(state: State, row: int, kept: Narrow) -> None:
    """Take the pin of a sequence back (row -1: of none), and those that freed sequences left on `kept` blocks."""
    state = borrowed(state)
    state.counters[0].changes += 1
    for block in kept:
        unpin_block(state, block)
    if row >= 0:
        state.sequences[row].pinned_blocks = 0
        state.sequences[row].marks &= ~PINNED


@inlined
def resolve_rows(state: State, seq_ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Find the rows of a batch; answers NOT_FOUND or REPEATED with the place in the batch."""
    counters = state.counters[0]
    counters.stamp += 1
    row, used = -1, counters.rows_used
    for i in range(len(seq_ids)):
        row += 1  # sequences that came one after the other often go on together: no search then
        if row >= used or state.sequences[row].seq_id != seq_ids[i] or state.sequences[row].marks & LIVE == 0:
            row = find_row(state, seq_ids[i])
        if row < 0:
            return NOT_FOUND, i
        record = state.sequences[row]
        if record.stamp == counters.stamp:
            return REPEATED, i
        record.stamp = counters.stamp
        rows[i] = row
    return OK, 0


@compiled
def _enter_all(state: State) -> None:
    state = borrowed(state)
    for row in range(state.counters[0].rows_used):
        if state.sequences[row].marks & LIVE:
            _enter(state, row)


def row_of(state: State, seq_id: int, name: str = "seq_id") -> int:
    """Return the row of a sequence; SequenceNotFound if there is none."""
    row = int(find_row(state.packed, sequence_key(seq_id, name)))
    if row < 0:
        raise SequenceNotFound(int(seq_id))
    return row


def exists(seq_id: int, argument: str = "seq_id") -> InvalidOperation:
    """Return the error for a sequence that is to begin and is there already."""
    error = InvalidOperation(f"sequence S{int(seq_id)} exists already", argument)
    error.add_note(f"append({int(seq_id)}, …) goes on with it, free({int(seq_id)}) ends it.")
    return error


def rows_of(state: State, keys: Ints) -> list[int]:
    """Return the rows of these sequences; SequenceNotFound at the first that is none."""
    rows = [int(find_row(state.packed, key)) for key in keys.tolist()]
    if -1 in rows:
        raise SequenceNotFound(sequence_number(keys[rows.index(-1)]))
    return rows


def require_tokens(name: str, state: State, keys: Ints, counts: Ints, limits: Ints | None) -> None:
    """Refuse counts beyond the tokens of these sequences, or beyond `limits`."""
    if limits is None:
        limits = state.sequences["num_tokens"][rows_of(state, keys)]
    beyond = np.flatnonzero(counts > limits)
    if len(beyond):
        place = beyond[0]
        expected = f"at most the {limits[place]} tokens of S{sequence_number(keys[place])}"
        raise bad_argument(name, expected, f"{counts[place]}", "append() the rest first")


def blocks_to_pin(state: State, row: int, num_tokens: int | None) -> int:
    """Return how many first blocks of a sequence hold its first `num_tokens`; all for None."""
    record = state.sequence(row)
    if num_tokens is None:
        return record.num_blocks
    num_tokens = require_int("num_tokens", num_tokens, 0, record.num_tokens)
    hole = record.hole_len if num_tokens > record.hole_start else 0
    return -(-(num_tokens + hole) // state.counter("block_size"))


def live_rows(state: State) -> list[int]:
    """Return the rows of the live sequences."""
    marks = state.sequences["marks"][: state.counter("rows_used")]
    live: list[int] = np.flatnonzero(marks & LIVE).tolist()
    return live


def with_more_rows(state: State) -> State:
    """Return the state with room for twice as many sequences."""
    old = len(state.sequences)
    sequences = np.zeros(2 * old, SEQUENCE)
    sequences[:old] = state.sequences
    dirty = np.zeros(2 * old, np.int32)
    dirty[:old] = state.dirty
    seq_table = np.zeros(power_of_two(4 * old), np.int32)
    grown = state._replace(sequences=sequences, dirty=dirty, seq_table=seq_table)
    if len(state.states):
        grown = grown._replace(sequence_states=np.concatenate([state.sequence_states, np.zeros(old, np.int32)]))
    _enter_all(grown.packed)
    return grown


class KeptPins:
    """Pins that outlive their sequences. A change counts once the books have changed as well, and not before."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[int]] = {}  # by sequence key: those that stayed pinned when it was freed
        self._next: tuple[int, dict[int, list[int]]] = (0, self.blocks)

    @property
    def all_blocks(self) -> list[int]:
        """All of these blocks, each as often as it is pinned."""
        return [block for blocks in self.blocks.values() for block in blocks]

    def keep(self, state: State, row: int) -> None:
        """Note which blocks stay pinned when this sequence is freed, which is the next change of the books."""
        record = state.sequence(row)
        table = state.table(row)[: record.pinned_blocks]
        pinned = table[state.blocks["indexed"][table] != 0].tolist()
        if pinned and state.blocks["pins"][pinned].max() == MAX_PINS:
            raise InvalidOperation(f"a block has at most {MAX_PINS} pins; unpin sequences that were freed")
        kept = self.blocks.get(record.seq_id, [])
        self._after_this(state, {**self.blocks, record.seq_id: kept + pinned})

    def held_by(self, state: State, key: int) -> tuple[int, list[int]]:
        """Return the row of a sequence, or -1, and the blocks that its pins keep since it was freed.

        Raises
        ------
        SequenceNotFound
            If there is neither.
        InvalidOperation
            If the sequence is not pinned.
        """
        row = int(find_row(state.packed, key))
        if key not in self.blocks:
            if row < 0:
                raise SequenceNotFound(sequence_number(key))
            if not state.sequences[row].marks & PINNED:
                number = sequence_number(key)
                raise bad_argument("seq_id", "a pinned sequence", f"another: S{number} is not pinned", "pin() it first")
        return row, self.blocks.get(key, [])

    def drop(self, state: State, key: int) -> None:
        """Note that the pins of one sequence are taken back by the next change of the books."""
        self._after_this(state, {other: blocks for other, blocks in self.blocks.items() if other != key})

    def clear(self, state: State) -> None:
        """Note that all pins go with the next change of the books."""
        self._after_this(state, {})

    def settle(self, state: State) -> None:
        """Find out whether the change that was noted last has happened."""
        changes, pins = self._next
        if state.counter("changes") >= changes:
            self.blocks = pins
        self._next = (0, self.blocks)

    def _after_this(self, state: State, pins: dict[int, list[int]]) -> None:
        self._next = (state.counter("changes") + 1, pins)
