"""The arrays of a plan, laid out in two buffers: handing arrays out of compiled code costs more than filling them.

For n sequences, t query tokens, tables of w columns and k copies::

    wide    int64   [0, t) slot_mapping   [t, 2t) positions   [2t, 2t + n) num_dropped
    narrow  int32   [0, nw) block_tables  then n seq_lens, n + 1 cu_seqlens_q, 2n holes, 2k copies
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.plan import BatchPlan
from pagedkv.control.rows import NO_ROOM, OK, resolve_rows
from pagedkv.control.state import State
from pagedkv.jit import borrowed, compiled

Ints = npt.NDArray[np.int64]
Narrow = npt.NDArray[np.int32]

NO_WIDE = np.empty(0, np.int64)
NO_NARROW = np.empty(0, np.int32)


@compiled
def _cut_wide(wide: Ints, n: int) -> tuple[Ints, Ints, Ints]:
    total = (len(wide) - n) // 2
    return wide[:total], wide[total : 2 * total], wide[2 * total :]


@compiled
def _cut_narrow(narrow: Narrow, n: int, width: int) -> tuple[Narrow, Narrow, Narrow, Narrow]:
    lens, starts, holes = n * width, n * width + n, n * width + 2 * n + 1
    return (
        narrow[:lens].reshape(n, width),
        narrow[lens:starts],
        narrow[starts:holes],
        narrow[holes : holes + 2 * n].reshape(n, 2),
    )


@compiled
def lay_out(state: State, rows: Narrow, num_query: Ints, copies: Narrow) -> tuple[int, Ints, Narrow]:
    """Lay out one forward pass over the last ``num_query[i]`` tokens of every sequence; returns the table width too."""
    n, size = len(rows), state.counters[0].block_size
    total, width = 0, 1
    for i in range(n):
        total += num_query[i]
        width = max(width, state.sequences[rows[i]].num_blocks)
    wide = np.empty(2 * total + n, np.int64)
    narrow = np.empty(n * width + 4 * n + 1 + 2 * len(copies), np.int32)
    slot_mapping, positions, dropped = _cut_wide(borrowed(wide), n)
    block_tables, seq_lens, starts, holes = _cut_narrow(borrowed(narrow), n, width)
    copied = borrowed(narrow)[len(narrow) - 2 * len(copies) :].reshape(len(copies), 2)
    for k in range(len(copies)):
        copied[k, 0] = copies[k, 0]
        copied[k, 1] = copies[k, 1]
    token = 0
    for i in range(n):
        record, table = state.sequences[rows[i]], state.tables[rows[i]]
        num_blocks, num_tokens = record.num_blocks, record.num_tokens
        hole_start, hole_len = record.hole_start, record.hole_len
        columns = block_tables[i]
        for j in range(num_blocks):  # an assignment of slices would take three times as long
            columns[j] = table[j]
        for j in range(num_blocks, width):
            columns[j] = 0
        seq_lens[i] = num_tokens
        starts[i] = token
        holes[i, 0] = hole_start
        holes[i, 1] = hole_start + hole_len
        dropped[i] = record.num_dropped
        for position in range(num_tokens - num_query[i], num_tokens):
            slot = position if position < hole_start else position + hole_len
            # Most often the last block: a division would take longer than all the rest.
            place = num_blocks - 1 if slot >= (num_blocks - 1) * size else slot // size
            slot_mapping[token] = np.int64(table[place]) * size + slot - place * size
            positions[token] = position
            token += 1
    starts[n] = token
    return width, wide, narrow


@compiled
def plan_rows(state: State, seq_ids: Ints, num_query: Ints) -> tuple[int, int, int, Ints, Narrow]:
    """Plan a batch; a negative number of query tokens stands for all that are not committed.

    Answers (status, a, width, plan): for OK a is the tick, for NO_ROOM the place of a sequence with too few tokens.
    """
    state = borrowed(state)
    rows = np.empty(len(seq_ids), np.int32)
    wanted = np.empty(len(seq_ids), np.int64)
    status, place = resolve_rows(state, seq_ids, rows)
    if status != OK:
        return status, place, 0, NO_WIDE, NO_NARROW
    for i in range(len(rows)):
        record = state.sequences[rows[i]]
        wanted[i] = record.num_tokens - record.num_committed if num_query[i] < 0 else num_query[i]
        if wanted[i] > record.num_tokens:
            return NO_ROOM, i, 0, NO_WIDE, NO_NARROW
    width, wide, narrow = lay_out(state, rows, wanted, np.empty((0, 2), np.int32))
    return OK, state.counters[0].tick, width, wide, narrow


def copies_in(narrow: Narrow, num_copies: int) -> Narrow:
    """Return the copies at the end of the narrow buffer, int32 ``[num_copies, 2]``."""
    return narrow[len(narrow) - 2 * num_copies :].reshape(num_copies, 2)


def plan_from(seq_ids: Ints, wide: Ints, narrow: Narrow, width: int, copies: Narrow, tick: int) -> BatchPlan:
    """Cut the two buffers into the arrays of a plan."""
    n = len(seq_ids)
    total = (len(wide) - n) // 2
    lens, starts, holes = n * width, n * width + n, n * width + 2 * n + 1
    block_tables = narrow[:lens].reshape(n, width)
    seq_lens, cu_seqlens_q = narrow[lens:starts], narrow[starts:holes]
    slot_mapping, positions, num_dropped = wide[:total], wide[total : 2 * total], wide[2 * total :]
    hole_ends = narrow[holes : holes + 2 * n].reshape(n, 2)
    # Without keywords: ten of them take as long as four slices.
    return BatchPlan(
        seq_ids, slot_mapping, block_tables, seq_lens, cu_seqlens_q, positions, hole_ends, num_dropped, copies, tick
    )
