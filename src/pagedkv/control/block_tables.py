"""Block tables: each sequence has a segment of one flat array, and moves to a longer one when it grows out of it.

Segments are handed out one behind the other. A row keeps its own when its sequence ends, and the next sequence in that
row begins in it. Once the array is used up, the tables of the live sequences are laid out anew in one that is twice as
long as they need: so it is the blocks in use that cost memory, whatever they were before, and a move is rare. ::

    [0, tables_top)    segments of rows, ``tables_left`` entries among them left behind by moves
    [tables_top, …)    not handed out yet
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagedkv.control.state import FEWEST_ENTRIES, LIVE, State
from pagedkv.errors import OutOfMemory
from pagedkv.jit import borrowed, called, compiled, formula, inlined, stretch

SHORTEST = 16


@formula
def segment_length(num_blocks: int) -> int:
    """Return how many entries the segment has that a table of so many blocks moves to."""
    length = SHORTEST
    while length < num_blocks:
        length *= 2
    return length


@inlined
def table_of(state: State, row: int) -> npt.NDArray[np.int32]:
    """Return the segment of `row`: its blocks come first."""
    record = state.sequences[row]
    return stretch(state.tables, record.table, record.room)


@inlined
def entries_left(state: State) -> int:
    """Return how many entries are not handed out yet."""
    top: int = state.counters[0].tables_top
    return len(state.tables) - top


@inlined
def fits_table(state: State, row: int, num_blocks: int) -> bool:
    """Tell whether `reserve` has room."""
    return num_blocks <= state.sequences[row].room or segment_length(num_blocks) <= entries_left(state)


@called
def reserve(state: State, row: int, num_blocks: int) -> None:
    """Give the table of `row` room for so many blocks; the caller has made sure that there is some."""
    state = borrowed(state)
    record = state.sequences[row]
    if num_blocks <= record.room:
        return
    counters = state.counters[0]
    for i in range(record.num_blocks):
        state.tables[counters.tables_top + i] = state.tables[record.table + i]
    counters.tables_left += record.room
    record.table = counters.tables_top
    record.room = segment_length(num_blocks)
    counters.tables_top += record.room


@compiled
def _lay_out(state: State, old: npt.NDArray[np.int32]) -> None:
    """Give every live sequence the shortest segment that its table fits in, and take it there."""
    state = borrowed(state)
    counters = state.counters[0]
    counters.tables_top = counters.tables_left = 0
    for row in range(counters.rows_used):
        record = state.sequences[row]
        num_blocks = record.num_blocks if record.marks & LIVE else 0
        start = record.table
        record.table = counters.tables_top
        record.room = segment_length(num_blocks) if num_blocks else 0
        for i in range(num_blocks):
            state.tables[record.table + i] = old[start + i]
        counters.tables_top += record.room


def entries_to_grow(state: State, rows: Sequence[int], counts: npt.NDArray[np.int64]) -> int:
    """Return how many entries suffice for sequences that grow by `counts` tokens."""
    size = state.counter("block_size")
    lengths = state.sequences["num_blocks"][list(rows)] + counts // size + 1
    return sum(map(segment_length, lengths.tolist()))


def with_room_for_tables(state: State, entries: int) -> State:
    """Return the state with at least so many entries to hand out; OutOfMemory if the system has no room for them."""
    if entries <= len(state.tables) - state.counter("tables_top"):
        return state
    used = state.sequences[: state.counter("rows_used")]
    lengths = used["num_blocks"][(used["marks"] & LIVE) != 0].tolist()
    needed = entries + sum(segment_length(num_blocks) for num_blocks in lengths if num_blocks)
    grown = state._replace(
        tables=_new_tables(max(2 * needed, FEWEST_ENTRIES), needed, len(lengths)),
        sequences=state.sequences.copy(),
        counters=state.counters.copy(),
    )
    _lay_out(grown.packed, state.tables)
    return grown


def _new_tables(length: int, least: int, num_sequences: int) -> npt.NDArray[np.int32]:
    """Return an empty array, as short as `least` if the system has no room for `length`."""
    try:
        return np.zeros(length, np.int32)
    except (MemoryError, ValueError) as error:
        if least < length:
            return _new_tables(least, least, num_sequences)
        hint = f"block tables of {num_sequences} sequences take {4 * least:,} bytes, which the system refuses"
        raise OutOfMemory(least, 0, hint) from error
