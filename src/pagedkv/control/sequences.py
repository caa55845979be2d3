"""The hot path: a whole batch grows, is planned and is committed in one compiled call.

The new tokens of a sequence own the cache positions [num_tokens, num_tokens + count). Position p lies in slot p of the
sequence's table, or in slot p + hole_len behind a hole that streaming left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.layout import NO_NARROW, NO_WIDE, lay_out
from pagedkv.control.pool import available_blocks, drop_block, replace_by_copy, share_block, take_block
from pagedkv.control.prefix import find_child, link_child
from pagedkv.control.reclaim import forget
from pagedkv.control.rows import NEEDS_WIDTH, NO_ROOM, OK, STALE, resolve_rows, touch_row
from pagedkv.control.state import OPAQUE, TRUNCATED, State
from pagedkv.jit import borrowed, compiled

Ints = npt.NDArray[np.int64]


@compiled
def _must_copy(state: State, block: int) -> bool:
    """Tell whether a write into the tail `block` would be seen by somebody else, orphan its children or lose a pin."""
    record = state.blocks[block]
    return record.ref_count > 1 or record.pins > 0 or (record.indexed and record.num_children > 0)


@compiled
def _surely_fits(state: State, rows: npt.NDArray[np.int32], counts: Ints) -> bool:
    """Tell whether there is room even if all sequences grow as much as the one that grows most, and copy a block."""
    widest, most = 0, 0
    for i in range(len(rows)):
        widest = max(widest, state.sequences[rows[i]].num_blocks)
        most = max(most, counts[i])
    more = most // state.counters[0].block_size + 1
    return len(rows) * (more + 1) <= available_blocks(state) and widest + more <= state.tables.shape[1]


@compiled
def _room_to_grow(state: State, rows: npt.NDArray[np.int32], counts: Ints) -> tuple[int, int, int]:
    """Answer OK, NO_ROOM with needed and available blocks, or NEEDS_WIDTH with the columns needed."""
    size = state.counters[0].block_size
    needed, width = 0, 0
    lent = np.zeros(len(rows), np.bool_)
    for i in range(len(rows)):
        if counts[i] == 0:
            continue
        record = state.sequences[rows[i]]
        spare = record.num_blocks * size - record.num_tokens - record.hole_len
        if counts[i] > spare:
            more = (counts[i] - spare + size - 1) // size
            needed += more
            width = max(width, record.num_blocks + more)
        if spare > 0:
            tail = state.tables[rows[i], record.num_blocks - 1]
            if _must_copy(state, tail):
                needed += 1
                # Forks of one batch may share this tail: the last of them to write finds it its own.
                if state.blocks[tail].ref_count > 1:
                    state.blocks[tail].ref_count -= 1
                    lent[i] = True
    for i in range(len(rows)):
        if lent[i]:
            state.blocks[state.tables[rows[i], state.sequences[rows[i]].num_blocks - 1]].ref_count += 1
    available = available_blocks(state)
    if needed > available:
        return NO_ROOM, needed, available
    if width > state.tables.shape[1]:
        return NEEDS_WIDTH, width, 0
    return OK, needed, 0


@compiled
def blocks_to_grow(state: State, seq_ids: Ints, counts: Ints) -> tuple[int, int]:
    """Return OK and how many blocks a batch takes to grow by `counts`, or another status."""
    state = borrowed(state)
    rows = np.empty(len(seq_ids), np.int32)
    status, needed = resolve_rows(state, seq_ids, rows)
    if status == OK:
        status, needed, _ = _room_to_grow(state, rows, counts)
    return status, needed


@compiled
def _own_tail(state: State, row: int, copies: npt.NDArray[np.int32], num_copies: int) -> int:
    """Make the tail block of `row` writable; returns the new number of copies."""
    place = state.sequences[row].num_blocks - 1
    tail = state.tables[row, place]
    if _must_copy(state, tail):
        replace_by_copy(state, row, place, copies, num_copies)
        return num_copies + 1
    if state.blocks[tail].indexed:
        forget(state, tail)
    return num_copies


@compiled
def _fill(state: State, block: int, start: int, stop: int, ids: Ints, first: int, known: bool) -> None:
    """Give the slots [start, stop) of `block` tokens, ``ids[first], …`` if they are known."""
    if known:
        base = block * state.counters[0].block_size
        for j in range(start, stop):
            state.contents[base + j] = ids[first + j - start]
    state.blocks[block].num_tokens = stop


@compiled
def _extend(
    state: State, row: int, count: int, ids: Ints, first: int, known: bool, copies: npt.NDArray[np.int32], k: int
) -> int:
    """Give `row` another `count` tokens, ``ids[first : first + count]`` if they are known."""
    record, table = state.sequences[row], state.tables[row]
    size = state.counters[0].block_size
    slot = record.num_tokens + record.hole_len
    end = slot + count
    if count > 0:
        known = known and record.num_known == record.num_tokens
        base = record.num_blocks * size
        if slot < base:
            base -= size
            k = _own_tail(state, row, copies, k)
            _fill(state, table[record.num_blocks - 1], slot - base, min(end - base, size), ids, first, known)
            base += size
        while base < end:
            block = take_block(state)
            state.blocks[block].priority = record.priority
            table[record.num_blocks] = block
            record.num_blocks += 1
            _fill(state, block, 0, min(end - base, size), ids, first + base - slot, known)
            base += size
        record.num_tokens += count
        if known:
            record.num_known = record.num_tokens
        if record.marks & TRUNCATED:
            record.marks &= ~TRUNCATED
            record.epoch = state.counters[0].tick
    touch_row(state, row)
    return k


@compiled
def grow_rows(
    state: State, seq_ids: Ints, counts: Ints, ids: Ints, known: bool
) -> tuple[int, int, int, int, Ints, npt.NDArray[np.int32]]:
    """Append to a whole batch and plan it; all sequences grow or none does.

    Answers (status, a, b, number of copies, plan): for OK a is the tick and b the width of the block tables; else as
    ``_room_to_grow`` and ``resolve_rows`` do.
    """
    state, counts, ids = borrowed(state), borrowed(counts), borrowed(ids)
    rows = np.empty(len(seq_ids), np.int32)
    copies = np.empty((len(seq_ids), 2), np.int32)
    copied = borrowed(copies)
    status, place = resolve_rows(state, seq_ids, rows)
    a, b, k = place, 0, 0
    if status == OK and not _surely_fits(state, rows, counts):
        status, a, b = _room_to_grow(state, rows, counts)
    if status != OK:
        return status, a, b, 0, NO_WIDE, NO_NARROW
    state.counters[0].tick += 1
    first = 0
    for i in range(len(rows)):
        k = _extend(state, rows[i], counts[i], ids, first, known, copied, k)
        first += counts[i]
    width, wide, narrow = lay_out(state, rows, counts, copies[:k])
    return OK, state.counters[0].tick, width, k, wide, narrow


@compiled
def _index_committed(state: State, row: int) -> None:
    """Make the full committed blocks of `row` findable.

    Where the index already holds the same block, the sequence takes that one and gives its own back: so the indexed
    blocks of a sequence are always a path of the trie, and equal prefixes are stored once. A duplicate that forks
    still share stays as it is for now: whoever holds a node must hold all its ancestors, forks included.
    """
    record, table = state.sequences[row], state.tables[row]
    size = state.counters[0].block_size
    stop = min(record.num_committed, record.num_known) // size
    while record.num_indexed < stop:
        block = table[record.num_indexed]
        if not state.blocks[block].indexed:
            parent = table[record.num_indexed - 1] if record.num_indexed > 0 else -1 - record.namespace
            twin = find_child(state, parent, state.contents, block * size)
            if twin < 0:
                link_child(state, parent, block)
            elif state.blocks[block].ref_count > 1:
                return
            else:
                table[record.num_indexed] = twin
                share_block(state, twin)
                state.blocks[twin].priority = max(state.blocks[twin].priority, record.priority)
                drop_block(state, block)
        record.num_indexed += 1


@compiled
def commit_rows(state: State, seq_ids: Ints, seq_lens: Ints, made_at: int) -> tuple[int, int]:
    """Note that K and V of the first ``seq_lens[i]`` tokens are written (a negative number: of all tokens)."""
    state = borrowed(state)
    rows = np.empty(len(seq_ids), np.int32)
    status, place = resolve_rows(state, seq_ids, rows)
    if status != OK:
        return status, place
    for i in range(len(rows)):
        if made_at < state.sequences[rows[i]].epoch:
            return STALE, i
    for i in range(len(rows)):
        record = state.sequences[rows[i]]
        upto = record.num_tokens if seq_lens[i] < 0 else min(seq_lens[i], record.num_tokens)
        record.num_committed = max(record.num_committed, upto)
        if state.counters[0].prefix_caching != 0 and record.marks & OPAQUE == 0:
            _index_committed(state, rows[i])
    return OK, 0
