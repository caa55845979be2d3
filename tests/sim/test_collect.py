"""Interning and sorting equal the obvious dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.sim import collect
from pagedkv.sim.collect import Interner, TooManyBlocks, renumber_sessions, reorder_ids

INT64 = st.one_of(st.integers(0, 4), st.sampled_from([-(2**63), 2**63 - 1, -1, 2**32, 2**32 + 1]))
CHAINS = st.lists(st.lists(INT64, max_size=6), max_size=12)


def by_dict(chains, roots):
    """Return (dense ids of every chain, parents): the definition."""
    known, parents, ids = {}, [], []
    for chain, root in zip(chains, roots, strict=True):
        parent = root
        for raw in chain:
            if (parent, raw) not in known:
                known[parent, raw] = len(known)
                parents.append(parent)
            parent = known[parent, raw]
            ids.append(parent)
    return ids, parents


def arrays(chains):
    flat = np.array([raw for chain in chains for raw in chain], np.int64)
    return flat, np.cumsum([0, *map(len, chains)], dtype=np.int64)


@given(st.lists(CHAINS, max_size=4), st.data())
@settings(max_examples=200)
def test_interning_equals_a_dictionary(batches, data):
    interner, ids = Interner(), []
    roots = [data.draw(st.lists(st.integers(-3, -1), min_size=len(b), max_size=len(b))) for b in batches]
    for chains, batch_roots in zip(batches, roots, strict=True):
        ids.extend(interner.intern(*arrays(chains), np.array(batch_roots, np.int32)).tolist())
    expected, parents = by_dict(sum(batches, []), sum(roots, []))
    assert ids == expected
    assert interner.parents.tolist() == parents and interner.count == len(parents)


@pytest.mark.parametrize("step", [1, 2**20, 2**32, 2**61 + 1])
def test_a_large_table_grows_and_stays_small(step):
    rng = np.random.default_rng(step)
    interner = Interner()
    raw = (rng.permutation(200_000).astype(np.uint64) * np.uint64(step)).view(np.int64)
    for part in np.split(raw, 20):
        chains = part.reshape(-1, 10)
        offsets = np.arange(0, part.size + 1, 10)
        first = interner.intern(part, offsets, np.full(len(chains), -1, np.int32))
        assert np.array_equal(interner.intern(part, offsets, np.full(len(chains), -1, np.int32)), first)
    assert interner.count == 200_000
    assert interner.nbytes <= 28 * interner.count


def test_more_blocks_than_an_int32_can_number(monkeypatch):
    monkeypatch.setattr(collect, "MAX_DISTINCT", 3)
    interner = Interner()
    interner.intern(*arrays([[1, 2]]), np.array([-1], np.int32))
    with pytest.raises(TooManyBlocks, match="more than 3 different blocks"):
        interner.intern(*arrays([[3, 4]]), np.array([-1], np.int32))
    assert interner.count == 2


@given(CHAINS, st.randoms(use_true_random=False))
def test_reordering_equals_interning_in_the_new_order(chains, random):
    order = list(range(len(chains)))
    random.shuffle(order)
    roots = [-1 - len(chain) % 2 for chain in chains]
    interner = Interner()
    ids = interner.intern(*arrays(chains), np.array(roots, np.int32))
    moved = np.empty_like(ids)
    counts = np.array([len(chain) for chain in chains], np.int64)
    parents = reorder_ids(np.array(order, np.int64), counts, ids, interner.parents, moved)
    expected, expected_parents = by_dict([chains[k] for k in order], [roots[k] for k in order])
    assert moved.tolist() == expected and parents.tolist() == expected_parents


@pytest.mark.parametrize("before, after", [([], []), ([-1], [-1]), ([2, -1, 0, 2, 1, 0], [0, -1, 1, 0, 2, 1])])
def test_sessions_are_numbered_by_first_appearance(before, after):
    sessions = np.array(before, np.int64)
    renumber_sessions(sessions)
    assert sessions.tolist() == after
