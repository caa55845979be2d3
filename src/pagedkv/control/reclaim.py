"""The order in which cached blocks are given up: an indexed binary heap of the cached leaves.

Only a leaf (no cached or active child) is ever in the heap, so a chain shrinks from its tail and no unreachable block
is kept. The order is total: by score, then by block id. All operations are O(log n).
"""

from __future__ import annotations

from pagedkv.control.prefix import unlink_leaf
from pagedkv.control.rules import CUSTOM, score_by_rule
from pagedkv.control.state import State
from pagedkv.jit import compiled


@compiled
def _goes_before(state: State, a: int, b: int) -> bool:
    first, second = state.blocks[a].score, state.blocks[b].score
    return first < second or (first == second and a < b)


@compiled
def _place(state: State, block: int, position: int) -> None:
    state.heap[position] = block
    state.blocks[block].heap_pos = position + 1


@compiled
def _rise(state: State, block: int, position: int) -> None:
    while position > 0:
        above = (position - 1) >> 1
        other = state.heap[above]
        if not _goes_before(state, block, other):
            break
        _place(state, other, position)
        position = above
    _place(state, block, position)


@compiled
def _sink(state: State, block: int, position: int) -> None:
    size = state.counters[0].heap_size
    while True:
        below = 2 * position + 1
        if below >= size:
            break
        if below + 1 < size and _goes_before(state, state.heap[below + 1], state.heap[below]):
            below += 1
        other = state.heap[below]
        if not _goes_before(state, other, block):
            break
        _place(state, other, position)
        position = below
    _place(state, block, position)


@compiled
def offer(state: State, block: int) -> None:
    """Put `block` into the heap if it can be reclaimed: cached, unpinned, a leaf, not there yet."""
    record = state.blocks[block]
    if record.indexed and record.ref_count == 0 and record.pins == 0 and record.num_children == 0:
        if record.heap_pos == 0:
            counters = state.counters[0]
            if counters.rule != CUSTOM:
                record.score = score_by_rule(state, block)
            counters.heap_size += 1
            _rise(state, block, counters.heap_size - 1)


@compiled
def withdraw(state: State, block: int) -> None:
    """Take `block` out of the heap if it is there."""
    record = state.blocks[block]
    if record.heap_pos == 0:
        return
    position = record.heap_pos - 1
    record.heap_pos = 0
    counters = state.counters[0]
    counters.heap_size -= 1
    last = state.heap[counters.heap_size]
    if last != block:
        if position > 0 and _goes_before(state, last, state.heap[(position - 1) >> 1]):
            _rise(state, last, position)
        else:
            _sink(state, last, position)


@compiled
def forget(state: State, block: int) -> None:
    """Take a childless block out of the index; its parent may have become a reclaimable leaf."""
    parent = unlink_leaf(state, block)
    if parent >= 0:
        offer(state, parent)


@compiled
def reclaim_lowest(state: State) -> int:
    """Give up the cached block that the strategy ranks lowest and return it, free of content."""
    block = state.heap[0]
    withdraw(state, block)
    forget(state, block)
    counters = state.counters[0]
    counters.cached -= 1
    counters.reclaimed += 1
    return block
