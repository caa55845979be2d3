"""Whole runs of content ids: what subscribers hear, whose namespace they are in, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contracts.user_strategies import SmallestFirst
from tests.sim.traces import chained_traces

from pagedkv import BlockRemoved, BlockStored, InvalidOperation
from pagedkv.control.content_cache import ContentCache


def heard_by(cache):
    events = []
    cache.subscribe(events.append)
    return events


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_events_are_exact(dtype):
    cache = ContentCache(3)
    events = heard_by(cache)
    ids = np.array([5, 6, 5, 6, 5, 7, 8, 9, 9], dtype)
    assert cache.run(ids, np.array([0, 2, 4, 8, 8, 9])).tolist() == [0, 2, 1, 0, 0]
    assert events == [
        BlockStored(0, None, (5,), ""),
        BlockStored(1, 0, (6,), ""),
        BlockRemoved(1),
        BlockStored(2, 0, (7,), ""),
        BlockStored(1, 2, (8,), ""),
        # [9] behind [5, 7, 8] found no place; at the root it takes that of the last leaf
        BlockRemoved(1),
        BlockStored(1, None, (9,), ""),
    ]
    cache.check()


def test_subscribers_may_call_the_cache_within_a_run():
    cache = ContentCache(4)
    seen = []

    def ask(event):
        cache.check()
        seen.append(cache.match_prefix([1, 2, 3]))

    cache.subscribe(ask)
    cache.run(np.array([1, 2, 3, 7, 8, 7, 8, 9]), np.array([0, 3, 5, 8]))
    assert seen[:3] == [3, 3, 3] and min(seen) < 3


def test_a_run_hears_the_same_with_and_without_subscribers():
    rng = np.random.default_rng(1)
    chains = [np.cumsum(rng.integers(1, 3, rng.integers(0, 7))) for _ in range(200)]
    ids, offsets = np.concatenate(chains), np.cumsum([0, *map(len, chains)])
    silent, observed = ContentCache(8, "s3fifo"), ContentCache(8, "s3fifo")
    events = heard_by(observed)
    assert silent.run(ids, offsets).tolist() == observed.run(ids, offsets).tolist()
    assert silent.stats == observed.stats
    assert sum(isinstance(event, BlockRemoved) for event in events) == observed.stats.blocks_reclaimed > 50


def test_runs_never_share_with_a_salt():
    cache = ContentCache(8)
    cache.allocate(1, [1, 2], cache_salt="theirs")
    cache.commit(1)
    assert cache.run(np.array([1, 2, 1, 2]), np.array([0, 2, 4])).tolist() == [0, 2]
    assert cache.match_prefix([1, 2]) == 2 == cache.match_prefix([1, 2], "theirs")
    cache.check()


@pytest.mark.parametrize(
    ("ids", "offsets", "named"),
    [
        ([1, 2], np.array([0, 2]), "ids: expected a flat int32 or int64 array, got"),
        (np.array([1.0, 2.0]), np.array([0, 2]), "ids: expected a flat int32 or int64 array, got float64"),
        (np.array([[1, 2]]), np.array([0, 2]), r"ids: expected .* got int64 of shape \(1, 2\)"),
        (np.array([1, 2], np.uint32), np.array([0, 2]), "ids: expected .* got uint32"),
        (np.array([1, 2]), [0, 2], "offsets: expected a flat int64 array"),
        (np.array([1, 2]), np.array([0.0, 2.0]), "offsets: expected a flat int64 array, got float64"),
        (np.array([1, 2]), np.array(2), "offsets: expected a flat int64 array"),
        (np.array([1, 2]), np.array([[0, 2]]), "offsets: expected a flat int64 array"),
        (np.array([1, 2]), np.array([], np.int64), "offsets: expected num_requests"),
        (np.array([1, 2]), np.array([0, 3]), "offsets: expected num_requests"),
        (np.array([1, 2]), np.array([-1, 2]), "offsets: expected num_requests"),
        (np.array([1, 2]), np.array([0, 2, 1]), "offsets: expected num_requests"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(ids, offsets, named):
    cache = ContentCache(4)
    with pytest.raises(InvalidOperation, match=named):
        cache.run(ids, offsets)
    assert cache.stats.total_allocations == 0


def test_any_strides_will_do():
    ids = np.array([1, 9, 2, 9, 1, 9, 2, 9])[::2]
    offsets = np.array([0, 7, 2, 7, 4, 7])[::2]
    assert ContentCache(4).run(ids, offsets).tolist() == [0, 2]
    ids.flags.writeable = False
    assert ContentCache(4).run(ids, offsets).tolist() == [0, 2]


@pytest.mark.parametrize("answer", [lambda n: np.full(n, np.nan), lambda n: np.zeros(n + 1, int), lambda n: None])
def test_a_broken_strategy_loses_nothing(answer):
    class Broken:
        def score_sequences(self, sequences, now):
            return sequences.last_access

        def score_blocks(self, blocks, now):
            return answer(len(blocks)) if now == 2 else blocks.last_access

    cache = ContentCache(4, Broken())
    ids, offsets = np.array([1, 2, 1, 3, 4, 5]), np.array([0, 2, 4, 6])
    with pytest.raises(InvalidOperation, match=r"Broken.score_blocks: expected to return integers of shape \(2,\)"):
        cache.run(ids, offsets)
    cache.check()
    assert cache.used_block_count == 0 and cache.free_block_count == 4
    assert cache.run(ids, offsets).tolist()[:2] == [2, 2]


@pytest.mark.parametrize("strategy", ["lru", "s3fifo", "sieve", "gdsf", "adaptive"])
def test_the_tail_of_a_chain_goes_up_to_where_another_one_goes_on(strategy):
    cache = ContentCache(9, strategy)
    events = heard_by(cache)
    ids = np.array([1, 2, 3, 4, 1, 2, 5], np.int32)
    cache.run(ids, np.array([0, 4, 7]))
    del events[:]
    assert cache.drop_tail(ids[:4]) == 2 and cache.drop_tail(ids[:4]) == 0
    assert events == [BlockRemoved(3), BlockRemoved(2)]
    assert (cache.match_prefix([1, 2, 3]), cache.match_prefix([1, 2, 5])) == (2, 3)
    cache.check()
    assert cache.drop_tail(np.array([1, 2, 5, 9])) == 3 and cache.cached_block_count == 0
    cache.check()
    assert cache.run(ids, np.array([0, 4, 7])).tolist() == [0, 2]
    cache.check()


def test_what_is_in_use_or_pinned_is_not_dropped():
    cache = ContentCache(9)
    cache.allocate(1, [1, 2])
    cache.commit(1)
    cache.run(np.array([1, 2, 3, 4]), np.array([0, 4]))
    assert cache.drop_tail(np.array([1, 2, 3, 4])) == 2 and cache.match_prefix([1, 2, 3]) == 2
    cache.pin(1)
    cache.free(1)
    assert cache.drop_tail(np.array([1, 2])) == 0
    cache.check()
    with pytest.raises(InvalidOperation, match="ids: expected a flat int32 or int64 array"):
        cache.drop_tail([1, 2])


@pytest.mark.parametrize("strategy", ["lru", "s3fifo", SmallestFirst()], ids=str)
@given(trace=chained_traces(), blocks=st.integers(1, 20), listens=st.booleans())
def test_what_is_remembered_as_given_up_is_what_events_say(strategy, trace, blocks, listens):
    heard, cache, told = [], ContentCache(blocks, strategy), ContentCache(blocks, strategy)
    held = {}

    def hear(event):
        if isinstance(event, BlockStored):
            held[event.block_id] = event.token_ids[0]
        else:
            heard.append(held[event.block_id])

    told.subscribe(hear)
    cache.remember_given_up()
    unsubscribe = cache.subscribe(lambda event: None)
    if not listens:
        unsubscribe()
    ids = trace.ids.astype(np.int64)
    for start, stop in zip(trace.offsets[:-1].tolist(), trace.offsets[1:].tolist(), strict=True):
        for each in (cache, told):
            each.run(ids, np.array([start, stop]))
            each.drop_tail(ids[start : start + (stop - start) // 2])
        assert cache.take_given_up().tolist() == heard
        assert not len(cache.take_given_up())
        heard.clear()
