"""The hot path: a whole batch grows, is planned and is committed in one compiled call.

The new tokens of a sequence own the cache positions [num_tokens, num_tokens + count). Position p lies in slot p of the
sequence's table, or in slot p + hole_len behind a hole that streaming left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.arguments import sequence_number
from pagedkv.control.block_tables import entries_left, fits_table, reserve, segment_length, table_of
from pagedkv.control.plan import BatchPlan, stale_plan
from pagedkv.control.pool import (
    available_blocks,
    drop_block,
    note_copy,
    pin_block,
    put_back,
    replace_by_copy,
    share_block,
    take_block,
)
from pagedkv.control.prefix import find_child, link_child, match_full_blocks, match_partial_block, walk
from pagedkv.control.reclaim import evict_leaf, forget, rescore
from pagedkv.control.recurrent import give_slot, keep_snapshot, lacks_slot, release_slot, snapshot_of
from pagedkv.control.sequence_table import (
    EXISTS,
    MAX_TOKENS,
    NEEDS_ROWS,
    NEEDS_TABLES,
    NO_ROOM,
    NO_SLOT,
    OK,
    STALE,
    TOO_LONG,
    Ints,
    Narrow,
    drop_row,
    find_row,
    has_spare_row,
    mark_dirty,
    new_row,
    next_epoch,
    resolve_rows,
    spare_row,
    touch_row,
)
from pagedkv.control.state import EVICT, MAIN, MAX_OUTPUTS, OPAQUE, RECLAIM, RESCORE, TRUNCATED, State
from pagedkv.control.turns import tell_output
from pagedkv.errors import OutOfMemory, SequenceNotFound
from pagedkv.jit import borrowed, call_kernel, called, compiled, inlined

# The arrays of a plan, laid out in two buffers: handing arrays out of compiled code costs more than filling them.
#
# For n sequences, t query tokens and tables of w columns::
#
#     wide    int64   [0, t) slot_mapping   [t, 2t) positions   [2t, 2t + n) num_dropped
#     narrow  int32   [0, nw) block_tables  then n seq_lens, n + 1 cu_seqlens_q, 2n holes


@inlined
def _no_plan() -> tuple[Ints, Narrow]:
    """Return empty buffers; an array that is a constant of the compiled code would make all of them read-only."""
    return np.empty(0, np.int64), np.empty(0, np.int32)


@inlined
def _cut_wide(wide: Ints, n: int) -> tuple[Ints, Ints, Ints]:
    total = (len(wide) - n) // 2
    return wide[:total], wide[total : 2 * total], wide[2 * total :]


@inlined
def _cut_narrow(narrow: Narrow, n: int, width: int) -> tuple[Narrow, Narrow, Narrow, Narrow]:
    lens, starts, holes = n * width, n * width + n, n * width + 2 * n + 1
    return (
        narrow[:lens].reshape(n, width),
        narrow[lens:starts],
        narrow[starts:holes],
        narrow[holes : holes + 2 * n].reshape(n, 2),
    )


@inlined
def _extent(state: State, rows: Narrow, counts: Ints) -> tuple[int, int, int, int]:
    """Return the sum of `counts`, the most of them, the widest table, and the least room that a table has left."""
    total, most, widest, spare = 0, 0, 1, MAX_TOKENS
    for i in range(len(rows)):
        record = state.sequences[rows[i]]
        total += counts[i]
        most = max(most, counts[i])
        widest = max(widest, record.num_blocks)
        spare = min(spare, record.room - record.num_blocks)
    return total, most, widest, spare


@inlined
def _buffers(n: int, total: int, width: int) -> tuple[Ints, Narrow]:
    """Return room for a plan over n sequences, before anything is changed."""
    return np.empty(2 * total + n, np.int64), np.empty(n * width + 4 * n + 1, np.int32)


@inlined
def lay_out(state: State, rows: Narrow, num_query: Ints, width: int, wide: Ints, narrow: Narrow) -> int:
    """Lay out one forward pass over the last ``num_query[i]`` tokens of every sequence; returns its tick.

    The tick is that of a sequence that streamed since the last one: by it the plan is told from those before.
    """
    n, size = len(rows), state.counters[0].block_size
    slot_mapping, positions, dropped = _cut_wide(borrowed(wide), n)
    block_tables, seq_lens, starts, holes = _cut_narrow(borrowed(narrow), n, width)
    token, tick = 0, state.counters[0].tick
    for i in range(n):
        record, table = state.sequences[rows[i]], table_of(state, rows[i])
        num_blocks, num_tokens = record.num_blocks, record.num_tokens
        tick = max(tick, record.epoch)
        hole_start, hole_len = record.hole_start, record.hole_len
        columns = block_tables[i]
        for j in range(num_blocks):  # an assignment of slices would take three times as long
            columns[j] = table[j]
        for j in range(num_blocks, width):
            columns[j] = 0
        seq_lens[i] = num_tokens
        starts[i] = token
        holes[i, 0] = min(hole_start, num_tokens)  # it is behind them all once the tokens after it are taken back
        holes[i, 1] = holes[i, 0] + hole_len
        dropped[i] = record.num_dropped
        for position in range(num_tokens - num_query[i], num_tokens):
            slot = position if position < hole_start else position + hole_len
            # Most often the last block: a division would take longer than all the rest.
            place = num_blocks - 1 if slot >= (num_blocks - 1) * size else slot // size
            slot_mapping[token] = np.int64(table[place]) * size + slot - place * size
            positions[token] = position
            token += 1
    starts[n] = token
    return tick


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
        wide, narrow = _no_plan()
        return status, place, 0, wide, narrow
    for i in range(len(rows)):
        record = state.sequences[rows[i]]
        wanted[i] = record.num_tokens - record.num_committed if num_query[i] < 0 else num_query[i]
        if wanted[i] > record.num_tokens:
            wide, narrow = _no_plan()
            return NO_ROOM, i, 0, wide, narrow
    total, _, width, _ = _extent(state, rows, wanted)
    wide, narrow = _buffers(len(rows), total, width)
    tick = lay_out(state, rows, wanted, width, wide, narrow)
    return OK, tick, width, wide, narrow


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


def too_large_plan(state: State, seq_ids: Ints) -> OutOfMemory:
    """Return the error for a plan that the system has no memory for."""
    rows = [find_row(state.packed, key) for key in seq_ids.tolist()]
    n, width = len(rows), int(state.sequences["num_blocks"][rows].max(initial=1))
    what = f"block tables of {n} sequences, {width} blocks each, take {4 * n * width:,} bytes"
    return OutOfMemory(n * width, 0, f"{what}, which the system refuses")


def plan_in_memory(state: State, seq_ids: Ints, num_query: Ints) -> tuple[int, int, int, Ints, Narrow]:
    """Do as `plan_rows`, or raise OutOfMemory."""
    try:
        return plan_rows(state.packed, seq_ids, num_query)
    except MemoryError as error:
        raise too_large_plan(state, seq_ids) from error


# Sequences come, fork, shrink and go: compiled, one call each.


@compiled
def count_matching(state: State, namespace: int, ids: npt.NDArray[np.int64]) -> int:
    """Return how many leading tokens of `ids` an allocation would find cached."""
    state = borrowed(state)
    size = state.counters[0].block_size
    blocks = np.empty(len(ids) // size + 1, np.int32)
    full, node = match_full_blocks(state, namespace, ids, blocks)
    _, partial = match_partial_block(state, node, ids, full * size)
    return full * size + partial


@compiled
def count_stored(state: State, namespace: int, ids: npt.NDArray[np.int64]) -> int:
    """Return how many leading tokens of `ids` are in full blocks of the index, with a snapshot or without."""
    state = borrowed(state)
    size = state.counters[0].block_size
    blocks = np.empty(len(ids) // size + 1, np.int32)
    return walk(state, namespace, ids, blocks)[0] * size


@compiled
def matching_blocks(state: State, namespace: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return the full blocks that an allocation of `ids` would share."""
    state = borrowed(state)
    blocks = np.empty(len(ids) // state.counters[0].block_size + 1, np.int32)
    return blocks[: match_full_blocks(state, namespace, ids, blocks)[0]]


@inlined
def _available_beside(state: State, shared: npt.NDArray[np.int32]) -> int:
    """Return the blocks an allocation can have, once it has taken the `shared` ones for itself."""
    available = available_blocks(state)
    for block in shared:
        if state.blocks[block].ref_count == 0 and state.blocks[block].pins == 0:
            available -= 1
    return available


@compiled
def allocate_row(
    state: State,
    seq_id: int,
    namespace: int,
    priority: int,
    num_tokens: int,
    ids: npt.NDArray[np.int64],
    known: bool,
    reuse: bool,
) -> tuple[int, int, int]:
    """Start a sequence: share its cached prefix if it may `reuse` one, take fresh blocks for the rest.

    Answers (status, a, b): for NO_ROOM a blocks are needed and b available; for OK a is the row, and b copies are due,
    of blocks and of states.
    """
    state = borrowed(state)
    counters = state.counters[0]
    size = counters.block_size
    if find_row(state, seq_id) >= 0:
        return EXISTS, 0, 0
    if not has_spare_row(state):
        return NEEDS_ROWS, 0, 0
    num_blocks = (num_tokens + size - 1) // size

    reuse = reuse and counters.prefix_caching != 0
    matched = np.empty(min(num_blocks, counters.num_blocks) + 1, np.int32)
    full, source, partial = 0, -1, 0
    if reuse:
        full, node = match_full_blocks(state, namespace, ids, matched)
        source, partial = match_partial_block(state, node, ids, full * size)
    available = _available_beside(state, matched[:full])
    while (num_blocks - full > available or lacks_slot(state)) and evict_as_ordered(state):
        available = _available_beside(state, matched[:full])
    if num_blocks - full > available:
        return NO_ROOM, num_blocks - full, available
    if lacks_slot(state):
        return NO_SLOT, 1, 0
    if num_tokens > MAX_TOKENS:
        return TOO_LONG, num_tokens, 0
    if not fits_table(state, spare_row(state), num_blocks):
        return NEEDS_TABLES, segment_length(num_blocks), 0

    if counters.num_orders > 0:
        reclaim_as_ordered(state)
    counters.tick += 1
    counters.changes += 1
    row = new_row(state, seq_id, namespace, priority)
    if len(state.states) > 0:
        give_slot(state, row, snapshot_of(state, matched[full - 1]) if full > 0 else -1)
    reserve(state, row, num_blocks)
    record, table = state.sequences[row], table_of(state, row)
    for i in range(full):
        table[i] = matched[i]
        share_block(state, matched[i])
        shared = state.blocks[matched[i]]
        shared.priority = max(shared.priority, priority)
    for i in range(full, num_blocks):
        block = take_block(state)
        table[i] = block
        state.blocks[block].num_tokens = min(size, num_tokens - i * size)
        state.blocks[block].priority = priority
        if known:
            for j in range(i * size, min(num_tokens, (i + 1) * size)):
                state.contents[block * size + j - i * size] = ids[j]
    record.num_tokens = num_tokens
    record.num_known = num_tokens if known else 0
    record.num_blocks = num_blocks
    record.num_indexed = full
    record.num_cached = full * size + partial
    record.num_committed = record.num_cached
    touch_row(state, row)
    if reuse:
        counters.queries += 1
        counters.hits += full * size + partial > 0
        counters.hit_tokens += full * size
        counters.partial_tokens += partial
    if partial > 0 and table[full] != source:
        note_copy(state, source, table[full])
    return OK, row, counters.num_copies + counters.num_state_copies


@compiled
def fork_row(state: State, row: int, dst: int) -> tuple[int, int]:
    """Let a new sequence share every block of `row`."""
    state = borrowed(state)
    if find_row(state, dst) >= 0:
        return EXISTS, 0
    if not has_spare_row(state):
        return NEEDS_ROWS, 0
    if lacks_slot(state):
        return NO_SLOT, 0
    source = state.sequences[row]
    if not fits_table(state, spare_row(state), source.num_blocks):
        return NEEDS_TABLES, segment_length(source.num_blocks)
    counters = state.counters[0]
    counters.tick += 1
    counters.changes += 1
    twin_row = new_row(state, dst, source.namespace, source.priority)
    if len(state.states) > 0:
        give_slot(state, twin_row, state.sequence_states[row] - 1)
    reserve(state, twin_row, source.num_blocks)
    twin = state.sequences[twin_row]
    twin.num_tokens = source.num_tokens
    twin.num_committed = source.num_committed
    twin.num_known = source.num_known
    twin.num_cached = source.num_cached
    twin.num_dropped = source.num_dropped
    twin.num_outputs = source.num_outputs
    twin.num_blocks = source.num_blocks
    twin.num_indexed = source.num_indexed
    twin.hole_start = source.hole_start
    twin.hole_len = source.hole_len
    twin.marks |= source.marks & (OPAQUE | TRUNCATED)
    table, twin_table = table_of(state, row), table_of(state, twin_row)
    for i in range(source.num_blocks):
        twin_table[i] = table[i]
        share_block(state, table[i])
    touch_row(state, twin_row)
    counters.forks += 1
    return OK, twin_row


@compiled
def release_candidates(state: State, rows: Narrow, first: int) -> Narrow:
    """Return the blocks that become cached when the last of `rows` releases all from table place `first` on.

    The rows before it have released all of theirs by then.
    """
    state = borrowed(state)
    row = rows[-1]
    table = table_of(state, row)
    found = np.empty(state.sequences[row].num_blocks, np.int32)
    count = 0
    _change_references(state, rows[:-1], -1)
    for i in range(first, state.sequences[row].num_blocks):
        block = state.blocks[table[i]]
        if block.indexed and block.ref_count == 1:
            found[count] = table[i]
            count += 1
    _change_references(state, rows[:-1], 1)
    return found[:count]


@inlined
def _change_references(state: State, rows: Narrow, change: int) -> int:
    """Count references of whole sequences up or down, for a trial; returns how many blocks have none."""
    bare = 0
    for row in rows:
        table = table_of(state, row)
        for i in range(state.sequences[row].num_blocks):
            block = state.blocks[table[i]]
            block.ref_count += change
            bare += block.ref_count == 0
    return bare


@compiled
def count_leaving(state: State, rows: Narrow, num_blocks: int) -> int:
    """Return how many of `rows`, the first ones, have to end until `num_blocks` blocks lose their last owner.

    All of them, and one more, if that many do not.
    """
    state = borrowed(state)
    bare = taken = 0
    while bare < num_blocks and taken < len(rows):
        bare += _change_references(state, rows[taken : taken + 1], -1)
        taken += 1
    _change_references(state, rows[:taken], 1)
    return taken if bare >= num_blocks else taken + 1


@inlined
def _indexed_block(state: State, row: int, place: int) -> int:
    """Return the last of the indexed blocks of a sequence, the one before it, …, or -1."""
    num_indexed = state.sequences[row].num_indexed
    return table_of(state, row)[num_indexed - place] if num_indexed >= place else -1


@inlined
def _hand_over_use(state: State, row: int, first: int) -> None:
    """Let the indexed blocks from table place `first` on know what the sequence knows of their use."""
    record, table = state.sequences[row], table_of(state, row)
    for i in range(first, record.num_blocks):
        block = state.blocks[table[i]]
        if block.indexed:
            block.last_access = max(block.last_access, record.last_access)
            block.priority = max(block.priority, record.priority)


@compiled
def free_row(state: State, row: int) -> None:
    """End a sequence: every block loses a reference, tail first; pins of findable blocks stay."""
    state = borrowed(state)
    state.counters[0].changes += 1
    record, table = state.sequences[row], table_of(state, row)
    _hand_over_use(state, row, 0)
    tell_output(state, record.num_outputs)
    for i in range(record.num_blocks - 1, -1, -1):
        block = table[i]
        if i < record.pinned_blocks and state.blocks[block].indexed:
            pin_block(state, block)
        drop_block(state, block)
    tell_output(state, 0)
    if len(state.states) > 0:
        release_slot(state, row, _indexed_block(state, row, 1))
    drop_row(state, row)
    if state.kernels.on_request_end:
        call_kernel(state.kernels.on_request_end, state, 0)


@compiled
def evict_rows(state: State, rows: Narrow) -> None:
    """End sequences that have to make room."""
    state = borrowed(state)
    for row in rows:
        free_row(state, row)
        state.counters[0].evictions += 1


# What was decided to make room waits in the books as orders, so that the call that needs the room and what makes it
# happen together or not at all.


@called
def evict_as_ordered(state: State) -> bool:
    """Evict the next sequence that orders name; returns whether there was one."""
    state = borrowed(state)
    for i in range(state.counters[0].num_orders):
        if state.orders[i, 0] == EVICT and state.orders[i, 1] >= 0:
            free_row(state, state.orders[i, 1])
            state.counters[0].evictions += 1
            state.orders[i, 1] = -1
            return True
    return False


@called
def reclaim_as_ordered(state: State) -> None:
    """Reclaim and rescore what orders name; those that are left are void."""
    state = borrowed(state)
    for i in range(state.counters[0].num_orders):
        block = state.orders[i, 1]
        if state.orders[i, 0] == RECLAIM:
            evict_leaf(state, block)
            put_back(state, block)
        elif state.orders[i, 0] == RESCORE:
            rescore(state, block, state.orders[i, 2], MAIN)
    state.counters[0].num_orders = 0


@compiled
def carry_out_reclaims(state: State) -> None:
    """Carry out orders without a call that needs the room."""
    state = borrowed(state)
    reclaim_as_ordered(state)


@compiled
def truncate_row(state: State, row: int, num_tokens: int) -> None:
    """Take back all tokens from cache position `num_tokens` on."""
    state = borrowed(state)
    state.counters[0].changes += 1
    record, table = state.sequences[row], table_of(state, row)
    size = state.counters[0].block_size
    if num_tokens <= record.hole_start:
        record.hole_len = 0
    end = num_tokens + record.hole_len
    num_blocks = (end + size - 1) // size
    _hand_over_use(state, row, end // size)
    for i in range(record.num_blocks - 1, num_blocks - 1, -1):
        drop_block(state, table[i])
    if end % size != 0:
        tail = state.blocks[table[num_blocks - 1]]
        if tail.ref_count == 1 and not tail.indexed:
            tail.num_tokens = end % size
    record.num_outputs = max(0, record.num_outputs - (record.num_tokens - num_tokens))
    record.num_tokens = num_tokens
    record.num_blocks = num_blocks
    record.num_committed = min(record.num_committed, num_tokens)
    record.num_known = min(record.num_known, num_tokens)
    record.num_cached = min(record.num_cached, num_tokens)
    record.num_indexed = min(record.num_indexed, end // size)
    record.pinned_blocks = min(record.pinned_blocks, num_blocks)
    record.marks |= TRUNCATED
    mark_dirty(state, row)


@inlined
def _must_copy(state: State, block: int) -> bool:
    """Tell whether a write into the tail `block` would be seen by somebody else, orphan its children or lose a pin."""
    record = state.blocks[block]
    return record.ref_count > 1 or record.pins > 0 or (record.indexed and record.num_children > 0)


@inlined
def _entries_to_move(state: State, rows: npt.NDArray[np.int32], more: int) -> int:
    """Return the entries of the segments that sequences move to when each grows by so many blocks."""
    entries = 0
    for i in range(len(rows)):
        record = state.sequences[rows[i]]
        if record.num_blocks + more > record.room:
            entries += segment_length(record.num_blocks + more)
    return entries


@inlined
def _surely_fits(state: State, rows: npt.NDArray[np.int32], more: int, widest: int, spare: int) -> bool:
    """Tell whether there is room even if every sequence grows by so many blocks, and copies one."""
    is_short = (widest + more) * state.counters[0].block_size <= MAX_TOKENS
    if not is_short or len(rows) * (more + 1) > available_blocks(state):
        return False
    return spare >= more or _entries_to_move(state, rows, more) <= entries_left(state)


@inlined
def _room_to_grow(state: State, rows: npt.NDArray[np.int32], counts: Ints) -> tuple[int, int, int]:
    """Answer OK, NO_ROOM with needed and available blocks, or NEEDS_TABLES with the entries needed, if all move."""
    size = state.counters[0].block_size
    needed, longest, entries, moved = 0, 0, 0, 0
    lent = np.zeros(len(rows), np.bool_)
    for i in range(len(rows)):
        if counts[i] == 0:
            continue
        record = state.sequences[rows[i]]
        longest = max(longest, record.num_tokens + record.hole_len + counts[i])
        spare = record.num_blocks * size - record.num_tokens - record.hole_len
        if counts[i] > spare:
            more = (counts[i] - spare + size - 1) // size
            needed += more
            length = segment_length(record.num_blocks + more)
            entries += length
            moved += length if record.num_blocks + more > record.room else 0
        if spare > 0:
            tail = state.tables[record.table + record.num_blocks - 1]
            if _must_copy(state, tail):
                needed += 1
                # Forks of one batch may share this tail: the last of them to write finds it its own.
                if state.blocks[tail].ref_count > 1:
                    state.blocks[tail].ref_count -= 1
                    lent[i] = True
    for i in range(len(rows)):
        if lent[i]:
            record = state.sequences[rows[i]]
            state.blocks[state.tables[record.table + record.num_blocks - 1]].ref_count += 1
    available = available_blocks(state)
    if needed > available:
        return NO_ROOM, needed, available
    if longest > MAX_TOKENS:
        return TOO_LONG, longest, 0
    if moved > entries_left(state):
        return NEEDS_TABLES, entries, 0
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


@inlined
def _own_tail(state: State, row: int) -> None:
    """Make the tail block of `row` writable."""
    place = state.sequences[row].num_blocks - 1
    tail = state.tables[state.sequences[row].table + place]
    if _must_copy(state, tail):
        replace_by_copy(state, row, place)
    elif state.blocks[tail].indexed:
        forget(state, tail)


@inlined
def _fill(state: State, block: int, start: int, stop: int, ids: Ints, first: int, known: bool) -> None:
    """Give the slots [start, stop) of `block` tokens, ``ids[first], …`` if they are known."""
    if known:
        base = block * state.counters[0].block_size
        for j in range(start, stop):
            state.contents[base + j] = ids[first + j - start]
    state.blocks[block].num_tokens = stop


@inlined
def _extend(state: State, row: int, count: int, ids: Ints, first: int, known: bool) -> None:
    """Give `row` another `count` tokens, ``ids[first : first + count]`` if they are known."""
    record = state.sequences[row]
    size = state.counters[0].block_size
    slot = record.num_tokens + record.hole_len
    end = slot + count
    if count > 0:
        known = known and record.num_known == record.num_tokens
        base = record.num_blocks * size
        if slot < base:
            base -= size
            _own_tail(state, row)
            tail = state.tables[record.table + record.num_blocks - 1]
            _fill(state, tail, slot - base, min(end - base, size), ids, first, known)
            base += size
        if base < end:
            reserve(state, row, record.num_blocks + (end - base + size - 1) // size)
        while base < end:
            block = take_block(state)
            state.blocks[block].priority = record.priority
            state.tables[record.table + record.num_blocks] = block
            record.num_blocks += 1
            _fill(state, block, 0, min(end - base, size), ids, first + base - slot, known)
            base += size
        record.num_tokens += count
        record.num_outputs = min(MAX_OUTPUTS, record.num_outputs + count)
        if known:
            record.num_known = record.num_tokens
        if record.marks & TRUNCATED:
            record.marks &= ~TRUNCATED
            record.epoch = next_epoch(state, state.counters[0].tick)
    touch_row(state, row)


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
    status, place = resolve_rows(state, seq_ids, rows)
    a, b = place, 0
    wide, narrow = _no_plan()
    if status == OK:
        total, most, widest, spare = _extent(state, rows, counts)
        more = most // state.counters[0].block_size + 1  # blocks that a sequence grows by, at most
        if not _surely_fits(state, rows, more, widest, spare):
            status, a, b = _room_to_grow(state, rows, counts)
        if status == OK or (status == NO_ROOM and state.counters[0].num_orders > 0):
            wide, narrow = _buffers(len(rows), total, widest + more)
    while status == NO_ROOM and evict_as_ordered(state):
        status, a, b = _room_to_grow(state, rows, counts)
    if status != OK:
        return status, a, b, 0, wide, narrow
    if state.counters[0].num_orders > 0:
        reclaim_as_ordered(state)
    state.counters[0].changes += 1
    state.counters[0].tick += 1
    first, width = 0, 1
    for i in range(len(rows)):
        _extend(state, rows[i], counts[i], ids, first, known)
        first += counts[i]
        width = max(width, state.sequences[rows[i]].num_blocks)
    tick = lay_out(state, rows, counts, width, wide, narrow)
    return OK, tick, width, state.counters[0].num_copies, wide, narrow


@inlined
def _index_committed(state: State, row: int) -> None:
    """Make the full committed blocks of `row` findable.

    Where the index already holds the same block, the sequence takes that one and gives its own back: so the indexed
    blocks of a sequence are always a path of the trie, and equal prefixes are stored once. A duplicate that forks
    still share stays as it is for now: whoever holds a node must hold all its ancestors, forks included.
    """
    record, table = state.sequences[row], table_of(state, row)
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
def commit_rows(state: State, seq_ids: Ints, seq_lens: Ints, made_at: int, has_states: bool) -> tuple[int, int]:
    """Note that K and V of the first ``seq_lens[i]`` tokens are written (a negative number: of all tokens).

    Snapshots are kept where slots have the states behind these tokens. Answers (status, a): for OK a is the number of
    states that are to be copied.
    """
    state = borrowed(state)
    rows = np.empty(len(seq_ids), np.int32)
    status, place = resolve_rows(state, seq_ids, rows)
    if status != OK:
        return status, place
    for i in range(len(rows)):
        if made_at < state.sequences[rows[i]].epoch:
            return STALE, i
    state.counters[0].changes += 1
    for i in range(len(rows)):
        record = state.sequences[rows[i]]
        upto = record.num_tokens if seq_lens[i] < 0 else min(seq_lens[i], record.num_tokens)
        num_new = upto - record.num_committed
        record.num_committed = max(record.num_committed, upto)
        if state.counters[0].prefix_caching != 0 and record.marks & OPAQUE == 0:
            _index_committed(state, rows[i])
            if len(state.states) > 0 and has_states and num_new > 0 and record.marks & TRUNCATED == 0:
                if record.num_indexed * state.counters[0].block_size == record.num_tokens:
                    last, before = _indexed_block(state, rows[i], 1), _indexed_block(state, rows[i], 2)
                    keep_snapshot(state, rows[i], last, before, num_new == 1)
    return OK, state.counters[0].num_state_copies


@compiled
def find_stale(state: State, seq_ids: Ints, made_at: int, seq_lens: Narrow, starts: Narrow, tables: Narrow) -> int:
    """Return the place of the first sequence whose query tokens lie elsewhere than the plan says, or -1."""
    state = borrowed(state)
    size = state.counters[0].block_size
    n = min(len(seq_lens), len(starts) - 1, len(tables))  # the arrays of a plan are its holder's to change
    for i in range(len(seq_ids)):
        row = find_row(state, seq_ids[i])
        if row < 0 or i >= n:
            return i
        record = state.sequences[row]
        if made_at < record.epoch or seq_lens[i] > record.num_tokens:
            return i
        first, last = np.int64(seq_lens[i] - starts[i + 1] + starts[i]), np.int64(seq_lens[i] - 1)
        first += record.hole_len if first >= record.hole_start else 0
        last += record.hole_len if last >= record.hole_start else 0
        for j in range(first // size, last // size + 1 if last >= first else 0):
            if j >= tables.shape[1] or state.tables[record.table + j] != tables[i, j]:
                return i
    return -1


def require_fresh(state: State, plan: BatchPlan) -> None:
    """Refuse a plan whose query tokens have other slots by now, or none."""
    place = find_stale(state.packed, plan.seq_ids, plan.tick, plan.seq_lens, plan.cu_seqlens_q, plan.block_tables)
    if place >= 0:
        number = sequence_number(plan.seq_ids[place])
        is_live = find_row(state.packed, plan.seq_ids[place]) >= 0
        raise stale_plan(number) if is_live else SequenceNotFound(number)


# Sinks and window inside one sequence, at token granularity.
#
# StreamingLLM (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2) keeps the
# first ``sink_tokens`` and the last ``window_tokens`` of a sequence. In slots of the block table::
#
#     [0, sink)                 sinks
#     [sink, sink + hole_len)   dropped: the rest of the last sink block and the front of the first window block
#     [sink + hole_len, end)    window
#
# Blocks that lie wholly between are given back. From then on K and V depend on what was dropped and not only on the
# token ids, so the sequence is never committed to the prefix index again.


@inlined
def _is_own(state: State, block: int, num_own_children: int) -> bool:
    """Tell whether only this sequence knows `block`: no other owner, no pin, no trie children but its own."""
    record = state.blocks[block]
    is_alone = record.ref_count == 1 and record.pins == 0
    return is_alone and (not record.indexed or record.num_children == num_own_children)


@inlined
def _count_foreign(state: State, row: int, first: int) -> int:
    """Return how many of the blocks from table place `first` on somebody else shares or builds upon."""
    record, table = state.sequences[row], table_of(state, row)
    foreign, own_children = 0, 0
    for place in range(record.num_blocks - 1, first - 1, -1):
        block = table[place]
        if _is_own(state, block, own_children):
            own_children = 1 if state.blocks[block].indexed else 0
        else:
            foreign += 1
            own_children = 0
    return foreign


@inlined
def _detach(state: State, row: int, first: int) -> None:
    """Make the blocks from table place `first` on private and unindexed, copying where others share them.

    Whoever holds a node of the trie must hold its ancestors, and this sequence is about to release some.
    """
    record, table = state.sequences[row], table_of(state, row)
    for place in range(record.num_blocks - 1, first - 1, -1):
        block = table[place]
        if not _is_own(state, block, 0):
            replace_by_copy(state, row, place)
        elif state.blocks[block].indexed:
            forget(state, block)


@inlined
def _cuts(state: State, row: int, sink: int, window: int) -> tuple[int, int, int]:
    """Return where the window begins, and the blocks [cut, keep) of the table that hold only dropped tokens."""
    record = state.sequences[row]
    size = state.counters[0].block_size
    cut = (sink + size - 1) // size
    resume = record.num_tokens - window + record.hole_len
    keep = resume // size if window > 0 else record.num_blocks
    return resume, cut, max(keep, cut)


@compiled
def blocks_to_stream(state: State, row: int, sink: int, window: int) -> int:
    """Return how many blocks ``stream_row`` takes for private copies of what others share."""
    state = borrowed(state)
    _, cut, keep = _cuts(state, row, sink, window)
    return _count_foreign(state, row, keep) if keep > cut else 0


@compiled
def stream_row(state: State, row: int, sink: int, window: int) -> int:
    """Drop everything between sinks and window; the caller has made sure of the blocks that it takes.

    Returns how many tokens were dropped, at least one.
    """
    state = borrowed(state)
    record, table = state.sequences[row], table_of(state, row)
    size = state.counters[0].block_size
    dropped = record.num_tokens - sink - window
    resume, cut, keep = _cuts(state, row, sink, window)
    if state.counters[0].num_orders > 0:
        reclaim_as_ordered(state)
    _hand_over_use(state, row, sink // size)
    if keep > cut:
        _detach(state, row, keep)
        for place in range(keep - 1, cut - 1, -1):
            drop_block(state, table[place])
        for place in range(keep, record.num_blocks):
            table[place - keep + cut] = table[place]
        record.num_blocks -= keep - cut
    record.hole_start = sink
    record.hole_len = resume - (keep - cut) * size - sink if window > 0 else 0
    record.num_tokens = sink + window
    record.num_dropped += dropped
    record.num_committed = max(min(record.num_committed, sink), record.num_committed - dropped)
    record.num_known = min(record.num_known, sink)
    record.num_indexed = min(record.num_indexed, sink // size)
    record.num_cached = min(record.num_cached, record.num_tokens)
    record.pinned_blocks = min(record.pinned_blocks, cut)
    record.marks |= OPAQUE
    record.marks &= ~TRUNCATED  # plans of before are stale by the epoch
    state.counters[0].changes += 1
    record.epoch = next_epoch(state, state.counters[0].tick + 1)
    mark_dirty(state, row)
    return dropped
