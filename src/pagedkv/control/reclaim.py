"""Eviction order of cached blocks: an indexed binary heap of the cached leaves for each queue.

Only a leaf (no cached or active child) is ever in a heap, so a chain shrinks from its tail and no unreachable block
is kept. The order is total: by score, then by block id. All operations are O(log n).

While turns rule, leaves are in a second heap, too: the first one is in the order in which they were released, and that
one in the order in which they are expected, the last one first. What goes is one of these two, whatever time it is.
"""

from __future__ import annotations

from pagedkv.control.prefix import unlink_leaf
from pagedkv.control.state import TURNS, State
from pagedkv.control.turns import expected_end, waited
from pagedkv.errors import bad_argument
from pagedkv.jit import borrowed, call_kernel, called, compiled, inlined

# S3-FIFO: a tenth of the cache is for newcomers.
PROBATION_SHARE = 10


@inlined
def _base(state: State, block: int) -> int:
    """Return where the heap of the queue of `block` begins."""
    return (state.blocks[block].indexed - 1) * state.counters[0].num_blocks


@inlined
def _resize(state: State, base: int, change: int) -> int:
    """Let the heap at `base` grow or shrink by one; returns its new size."""
    counters = state.counters[0]
    if base == 0:
        counters.heap_size += change
        return counters.heap_size
    counters.probation_heap_size += change
    return counters.probation_heap_size


# A heap: of a queue by score, or the second one of those that have two.


@inlined
def _goes_before(state: State, is_second: bool, a: int, b: int) -> bool:
    if is_second:
        first, second = state.expected[a].score, state.expected[b].score
    else:
        first, second = state.blocks[a].score, state.blocks[b].score
    return first < second or (first == second and a < b)


@inlined
def _place(state: State, is_second: bool, block: int, base: int, position: int) -> None:
    state.heap[base + position] = block
    if is_second:
        state.expected[block].heap_pos = position + 1
    else:
        state.blocks[block].heap_pos = position + 1


@inlined
def _rise(state: State, is_second: bool, block: int, base: int, position: int) -> None:
    while position > 0:
        above = (position - 1) >> 1
        other = state.heap[base + above]
        if not _goes_before(state, is_second, block, other):
            break
        _place(state, is_second, other, base, position)
        position = above
    _place(state, is_second, block, base, position)


@inlined
def _sink(state: State, is_second: bool, block: int, base: int, position: int, size: int) -> None:
    while True:
        below = 2 * position + 1
        if below >= size:
            break
        if below + 1 < size and _goes_before(state, is_second, state.heap[base + below + 1], state.heap[base + below]):
            below += 1
        other = state.heap[base + below]
        if not _goes_before(state, is_second, other, block):
            break
        _place(state, is_second, other, base, position)
        position = below
    _place(state, is_second, block, base, position)


@inlined
def _leave(state: State, is_second: bool, block: int, base: int, position: int, size: int) -> None:
    """Close the gap at a position of a heap, which has this size without it."""
    last = state.heap[base + size]
    if last != block:
        if position > 0 and _goes_before(state, is_second, last, state.heap[base + ((position - 1) >> 1)]):
            _rise(state, is_second, last, base, position)
        else:
            _sink(state, is_second, last, base, position, size)


@inlined
def _sort(state: State, is_second: bool, base: int, size: int) -> None:
    """Make a heap of blocks in any order, O(n)."""
    for position in range(size // 2 - 1, -1, -1):
        _sink(state, is_second, state.heap[base + position], base, position, size)


# The order in which leaves are expected, while turns rule.


@inlined
def _expect(state: State, block: int) -> None:
    wait = state.learner.waits[block]
    state.expected[block].score = -expected_end(state.learner.totals[0].time, wait.time, wait.expected)


@called
def _enter_expected(state: State, block: int) -> None:
    """Put a leaf into the second heap that has just entered the first one."""
    state = borrowed(state)
    counters = state.counters[0]
    _expect(state, block)
    _rise(state, True, block, counters.num_blocks, counters.heap_size - 1)


@called
def _leave_expected(state: State, block: int) -> None:
    """Take a leaf out of the second heap that has just left the first one."""
    state = borrowed(state)
    counters = state.counters[0]
    position = state.expected[block].heap_pos - 1
    state.expected[block].heap_pos = 0
    _leave(state, True, block, counters.num_blocks, position, counters.heap_size)


@called
def _rank_expected(state: State) -> None:
    """Let all leaves be in the second heap if turns rule by now, and none else."""
    state = borrowed(state)
    counters = state.counters[0]
    counters.by_turns = state.learner.totals[0].rules == TURNS
    for position in range(counters.heap_size):
        block = state.heap[position]
        state.expected[block].heap_pos = 0
        if counters.by_turns != 0:
            _expect(state, block)
            _place(state, True, block, counters.num_blocks, position)
    if counters.by_turns != 0:
        _sort(state, True, counters.num_blocks, counters.heap_size)


@called
def _first_by_turns(state: State) -> int:
    """Return who waits longest, or who is expected last if that is for longer."""
    state = borrowed(state)
    now, num_blocks = state.learner.totals[0].time, state.counters[0].num_blocks
    oldest, last = state.heap[0], state.heap[num_blocks]
    age = waited(now, state.learner.waits[oldest].time)
    return last if -state.expected[last].score - now > age else oldest


# All of them.


@inlined
def _enter(state: State, block: int) -> None:
    base = _base(state, block)
    _rise(state, False, block, base, _resize(state, base, 1) - 1)


@inlined
def _score(state: State, block: int) -> int:
    return call_kernel(state.kernels.score, state, block) if state.kernels.score else state.blocks[block].last_access


@compiled
def offer(state: State, block: int) -> None:
    """Put `block` into its heap if it can be reclaimed: cached, unpinned, a leaf, not there yet."""
    state = borrowed(state)
    record = state.blocks[block]
    if record.indexed and record.ref_count == 0 and record.pins == 0 and record.num_children == 0:
        if record.heap_pos == 0:
            record.score = _score(state, block)
            _enter(state, block)
            if state.counters[0].by_turns != 0:
                _enter_expected(state, block)


@compiled
def withdraw(state: State, block: int) -> None:
    """Take `block` out of its heap if it is there."""
    state = borrowed(state)
    record = state.blocks[block]
    if record.heap_pos == 0:
        return
    position = record.heap_pos - 1
    record.heap_pos = 0
    base = _base(state, block)
    _leave(state, False, block, base, position, _resize(state, base, -1))
    if state.counters[0].by_turns != 0:
        _leave_expected(state, block)


@compiled
def rescore(state: State, block: int, score: int, queue: int) -> None:
    """Move a cached leaf to another place in the order, and to `queue`."""
    state = borrowed(state)
    record = state.blocks[block]
    withdraw(state, block)
    state.counters[0].probation += queue - (record.indexed - 1)
    record.indexed = 1 + queue
    record.score = score
    _enter(state, block)


@called
def rank_leaves(state: State) -> None:
    """Score all cached leaves of the main queue anew and put them in order, O(n)."""
    state = borrowed(state)
    size = state.counters[0].heap_size
    for position in range(size):
        block = state.heap[position]
        state.blocks[block].score = _score(state, block)
    _sort(state, False, 0, size)
    if len(state.expected) > 0:
        _rank_expected(state)


@inlined
def forget(state: State, block: int) -> None:
    """Take a childless block out of the index; its parent may have become a reclaimable leaf."""
    parent = unlink_leaf(state, block)
    if parent >= 0:
        offer(state, parent)


@inlined
def _prefers_probation(state: State) -> bool:
    """Tell whether a newcomer is to be evicted rather than a proven block."""
    counters = state.counters[0]
    return counters.probation >= max(1, counters.num_blocks // PROBATION_SHARE)


@compiled
def lowest_leaf(state: State) -> int:
    """Return the cached leaf that comes first in the queue that is to be drained, or -1 if nothing is cached."""
    state = borrowed(state)
    counters = state.counters[0]
    if counters.probation_heap_size > 0 and (counters.heap_size == 0 or _prefers_probation(state)):
        return state.heap[counters.num_blocks]
    if counters.heap_size == 0:
        return -1
    return _first_by_turns(state) if counters.by_turns != 0 else state.heap[0]


@compiled
def evict_leaf(state: State, block: int) -> None:
    """Take a cached leaf out of its heap and out of the index; its content is gone."""
    state = borrowed(state)
    if state.kernels.on_evict:
        call_kernel(state.kernels.on_evict, state, block)
    withdraw(state, block)
    forget(state, block)
    counters = state.counters[0]
    counters.cached -= 1
    counters.reclaimed += 1
    if state.kernels.after_evict:
        call_kernel(state.kernels.after_evict, state, lowest_leaf(state))


def require_leaf(state: State, block: int) -> None:
    """Refuse a block that is not a cached leaf without a pin."""
    record = state.blocks[block]
    if record.ref_count > 0:
        found, hint = f"{record.ref_count} sequences hold", "free() them first"
    elif not record.indexed:
        found, hint = "is free", "there is nothing to forget"
    elif record.pins > 0:
        found, hint = "is pinned", "unpin() its sequence first"
    elif record.num_children > 0:
        found, hint = f"{record.num_children} cached blocks continue", "evict these first"
    else:
        return
    expected = "a cached block that nobody holds and nothing continues"
    raise bad_argument("block_id", expected, f"B{block}, which {found}", hint)


@inlined
def reclaim_lowest(state: State) -> int:
    """Evict the cached block that the strategy ranks lowest and return it, free of content."""
    block = lowest_leaf(state)
    if state.kernels.second_chance:
        while call_kernel(state.kernels.second_chance, state, block):
            block = lowest_leaf(state)
    evict_leaf(state, block)
    return block
