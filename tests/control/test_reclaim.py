"""The heap of cached leaves against a sorted list."""

from __future__ import annotations

import numba
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import BlockManager
from pagedkv.control.policies import IN_NUMPY
from pagedkv.control.reclaim import offer, reclaim_lowest, withdraw
from pagedkv.control.state import new_state
from pagedkv.jit import borrowed


@numba.njit
def reclaim_one(state):
    return reclaim_lowest(borrowed(state))


@settings(max_examples=150)
@given(
    scores=st.lists(st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 39)), max_size=120),
)
def test_the_heap_is_a_sorted_list(scores, steps):
    state = new_state(len(scores), 1, True)._replace(kernels=IN_NUMPY)
    state.blocks["indexed"] = 1
    state.blocks["score"] = scores
    inside = set()
    for is_offer, block in steps:
        block %= len(scores)
        if is_offer:
            offer(state.packed, block)
            inside.add(block)
        else:
            withdraw(state.packed, block)
            inside.discard(block)
        heap = state.heap[: state.counters[0].heap_size].tolist()
        assert sorted(heap) == sorted(inside)
        assert not heap or heap[0] == min(inside, key=lambda b: (scores[b], b))
        assert all(state.blocks[b].heap_pos == place + 1 for place, b in enumerate(heap))


def test_what_cannot_be_reclaimed_is_not_offered():
    state = new_state(5, 1, True)
    state.blocks["indexed"] = [1, 1, 1, 1, 0]
    state.blocks["ref_count"] = [0, 1, 0, 0, 0]
    state.blocks["pins"] = [0, 0, 1, 0, 0]
    state.blocks["num_children"] = [0, 0, 0, 1, 0]
    for block in range(5):
        offer(state.packed, block)
    offer(state.packed, 0)
    assert state.heap[: state.counters[0].heap_size].tolist() == [0]


@settings(max_examples=40)
@given(
    chains=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=10),
    order=st.randoms(use_true_random=False),
)
def test_reclaim_gives_up_leaves_in_lru_order(chains, order):
    manager = BlockManager(100, 1)
    for seq_id, ids in enumerate(chains):
        manager.allocate(seq_id, ids)
        manager.commit(seq_id)
    going = list(range(len(chains)))
    order.shuffle(going)
    for seq_id in going:
        manager.touch(seq_id)
        manager.free(seq_id)
    state = manager._state
    left = set(np.flatnonzero(manager.snapshot().cached).tolist())
    num_left = len(left)
    while left:
        leaves = left - {int(state.blocks[block].parent) for block in left}
        lowest = min(leaves, key=lambda block: (int(state.blocks[block].score), block))
        assert reclaim_one(state.packed) == lowest
        left.discard(lowest)
    assert state.counters[0].heap_size == 0 and state.counters[0].cached == 0
    assert manager.stats.blocks_reclaimed == num_left
