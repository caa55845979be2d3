"""Sequence ids to rows: an open-addressing table with deletions, against a dict; growth of the arrays."""

from __future__ import annotations

import numba
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import BlockManager
from pagedkv.control.arguments import sequence_key
from pagedkv.control.sequence_table import drop_row, find_row, new_row
from pagedkv.control.state import new_state
from pagedkv.jit import borrowed

ids = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1), st.integers(0, 9).map(lambda n: n << 40))


@numba.njit
def drop(state, row):
    drop_row(borrowed(state), row)


@numba.njit
def new(state, key):
    return new_row(borrowed(state), key, 0, 0)


@settings(max_examples=150)
@given(steps=st.lists(st.tuples(st.booleans(), ids), max_size=150))
def test_the_table_is_a_dict(steps):
    state = new_state(1, 1, True, rows=64)
    model = {}
    for is_new, seq_id in steps:
        key = sequence_key(seq_id)
        if key in model:
            drop(state.packed, model.pop(key))
        elif is_new and len(model) < 64:
            model[key] = new(state.packed, key)
        assert state.counters[0].num_sequences == len(model) == len(set(model.values()))
    for key, row in model.items():
        assert find_row(state.packed, key) == row
    for _, seq_id in steps:
        assert (find_row(state.packed, sequence_key(seq_id)) >= 0) == (sequence_key(seq_id) in model)
    assert (state.seq_table != 0).sum() == len(model), "no tombstones"


def test_thousands_of_sequences():
    manager = BlockManager(6000, 2)
    for seq_id in range(5000):
        manager.allocate(seq_id, 1)
    assert manager.num_sequences == 5000 and manager.sequence_ids == list(range(5000))
    plan = manager.append_batch(list(range(5000)))
    assert plan.seq_lens.tolist() == [2] * 5000 and len(set(plan.slot_mapping.tolist())) == 5000
    for seq_id in range(0, 5000, 2):
        manager.free(seq_id)
    for seq_id in range(5000, 6000):
        manager.fork(seq_id - 4999, seq_id) if seq_id % 2 == 0 else manager.allocate(seq_id, 2)
    manager.check()
    assert manager.num_sequences == 3500


def test_block_tables_widen():
    manager = BlockManager(5000, 1)
    manager.allocate(1, 3)
    first = manager.get_sequence(1).block_ids
    manager.allocate(2, 1000)
    manager.append(1, 3000)
    manager.fork(1, 3)
    assert manager.get_sequence(1).block_ids[:3] == first and manager.get_sequence(3).num_blocks == 3003
    assert manager.plan([1, 2, 3], 0).block_tables.shape == (3, 3003)
    manager.check()


def test_a_pool_of_a_million_blocks_costs_nothing_until_it_is_used():
    manager = BlockManager(10**6, 16)
    assert manager.allocate(1, 100).block_ids == tuple(range(7)), "memory is taken from the bottom"
    assert manager.free_block_count == 10**6 - 7
    assert manager._state.counters[0].fresh == 7, "what lies above was never touched"
    manager.free(1)
    assert sorted(manager.allocate(2, 100).block_ids) == list(range(7))
