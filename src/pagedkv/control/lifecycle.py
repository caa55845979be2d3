"""Sequences come, fork, shrink and go: compiled, one call each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.adapting import end_of_request
from pagedkv.control.pool import available_blocks, drop_block, pin_block, share_block, take_block
from pagedkv.control.prefix import match_full_blocks, match_partial_block
from pagedkv.control.rows import (
    EXISTS,
    NEEDS_ROWS,
    NEEDS_WIDTH,
    NO_ROOM,
    OK,
    drop_row,
    find_row,
    has_spare_row,
    new_row,
    touch_row,
)
from pagedkv.control.state import OPAQUE, TRUNCATED, State
from pagedkv.jit import borrowed, compiled

NOBODY = -1


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
def matching_blocks(state: State, namespace: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return the full blocks that an allocation of `ids` would share."""
    state = borrowed(state)
    blocks = np.empty(len(ids) // state.counters[0].block_size + 1, np.int32)
    return blocks[: match_full_blocks(state, namespace, ids, blocks)[0]]


@compiled
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
) -> tuple[int, int, int, int, int]:
    """Start a sequence: share its cached prefix, take fresh blocks for the rest.

    Answers (status, a, b, source, destination): for NO_ROOM a blocks are needed and b available; for OK a is the row,
    and when source is not NOBODY, its K and V are to be copied to destination.
    """
    state = borrowed(state)
    counters = state.counters[0]
    size = counters.block_size
    if find_row(state, seq_id) >= 0:
        return EXISTS, 0, 0, NOBODY, NOBODY
    if not has_spare_row(state):
        return NEEDS_ROWS, 0, 0, NOBODY, NOBODY
    num_blocks = (num_tokens + size - 1) // size

    reuse = known and counters.prefix_caching != 0
    matched = np.empty(min(num_blocks, counters.num_blocks) + 1, np.int32)
    full, source, partial = 0, NOBODY, 0
    if reuse:
        full, node = match_full_blocks(state, namespace, ids, matched)
        source, partial = match_partial_block(state, node, ids, full * size)
    available = _available_beside(state, matched[:full])
    if num_blocks - full > available:
        return NO_ROOM, num_blocks - full, available, NOBODY, NOBODY
    if num_blocks > state.tables.shape[1]:
        return NEEDS_WIDTH, num_blocks, 0, NOBODY, NOBODY

    counters.tick += 1
    row = new_row(state, seq_id, namespace, priority)
    record, table = state.sequences[row], state.tables[row]
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
    if partial == 0 or table[full] == source:
        source = NOBODY

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
    if source == NOBODY:
        return OK, row, 0, NOBODY, NOBODY
    return OK, row, 0, source, table[full]


@compiled
def fork_row(state: State, row: int, dst: int) -> tuple[int, int]:
    """Let a new sequence share every block of `row`."""
    state = borrowed(state)
    if find_row(state, dst) >= 0:
        return EXISTS, 0
    if not has_spare_row(state):
        return NEEDS_ROWS, 0
    counters = state.counters[0]
    counters.tick += 1
    source = state.sequences[row]
    twin_row = new_row(state, dst, source.namespace, source.priority)
    twin = state.sequences[twin_row]
    twin.num_tokens = source.num_tokens
    twin.num_committed = source.num_committed
    twin.num_known = source.num_known
    twin.num_cached = source.num_cached
    twin.num_dropped = source.num_dropped
    twin.num_blocks = source.num_blocks
    twin.num_indexed = source.num_indexed
    twin.hole_start = source.hole_start
    twin.hole_len = source.hole_len
    twin.marks |= source.marks & (OPAQUE | TRUNCATED)
    for i in range(source.num_blocks):
        block = state.tables[row, i]
        state.tables[twin_row, i] = block
        share_block(state, block)
    touch_row(state, twin_row)
    counters.forks += 1
    return OK, twin_row


@compiled
def release_candidates(state: State, row: int, first: int) -> npt.NDArray[np.int32]:
    """Return the blocks of a sequence, from table place `first` on, that become cached if it lets go of them."""
    state = borrowed(state)
    record = state.sequences[row]
    found = np.empty(record.num_blocks, np.int32)
    count = 0
    for i in range(first, record.num_blocks):
        block = state.blocks[state.tables[row, i]]
        if block.indexed and block.ref_count == 1:
            found[count] = state.tables[row, i]
            count += 1
    return found[:count]


@compiled
def hand_over_use(state: State, row: int, first: int) -> None:
    """Let the indexed blocks from table place `first` on know what the sequence knows of their use."""
    state = borrowed(state)
    record = state.sequences[row]
    for i in range(first, record.num_blocks):
        block = state.blocks[state.tables[row, i]]
        if block.indexed:
            block.last_access = max(block.last_access, record.last_access)
            block.priority = max(block.priority, record.priority)


@compiled
def free_row(state: State, row: int) -> None:
    """End a sequence: every block loses a reference, tail first; pins of findable blocks stay."""
    state = borrowed(state)
    record = state.sequences[row]
    for i in range(record.num_blocks - 1, -1, -1):
        block = state.tables[row, i]
        if i < record.pinned_blocks and state.blocks[block].indexed:
            pin_block(state, block)
        drop_block(state, block)
    drop_row(state, row)
    end_of_request(state)


@compiled
def truncate_row(state: State, row: int, num_tokens: int) -> None:
    """Take back all tokens from cache position `num_tokens` on."""
    state = borrowed(state)
    record = state.sequences[row]
    size = state.counters[0].block_size
    if num_tokens <= record.hole_start:
        record.hole_len = 0
    end = num_tokens + record.hole_len
    num_blocks = (end + size - 1) // size
    for i in range(record.num_blocks - 1, num_blocks - 1, -1):
        drop_block(state, state.tables[row, i])
    if end % size != 0:
        tail = state.blocks[state.tables[row, num_blocks - 1]]
        if tail.ref_count == 1 and not tail.indexed:
            tail.num_tokens = end % size
    record.num_tokens = num_tokens
    record.num_blocks = num_blocks
    record.num_committed = min(record.num_committed, num_tokens)
    record.num_known = min(record.num_known, num_tokens)
    record.num_cached = min(record.num_cached, num_tokens)
    record.num_indexed = min(record.num_indexed, end // size)
    record.pinned_blocks = min(record.pinned_blocks, num_blocks)
    record.marks |= TRUNCATED
