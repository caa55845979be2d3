"""Replays against oracles from the definitions, hit by hit, and against counts that were frozen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.oracles import naive_fifo, naive_leaf_lru, naive_lfu, naive_lru
from tests.sim.queue_oracles import Gdsf, LongestFirst, S3Fifo, Sieve, looping_requests
from tests.sim.traces import AGENTS, CHAT, as_requests, as_trace, chained_requests, chained_traces, real_trace

from pagedkv import InvalidOperation
from pagedkv.control.content_cache import ContentCache
from pagedkv.sim.replayer import replay

ORACLES = {
    "lru": naive_lru,
    "streaming_llm:sink=1,window=1": naive_leaf_lru,
    "priority:levels=2": naive_leaf_lru,
    "ttl": naive_leaf_lru,
    "fifo": naive_fifo,
    "lfu": naive_lfu,
    "longest_first": lambda requests, capacity: LongestFirst(capacity).run(requests),
    "s3fifo": lambda requests, capacity: S3Fifo(capacity).run(requests),
    "sieve": lambda requests, capacity: Sieve(capacity).run(requests),
    "gdsf": lambda requests, capacity: Gdsf(capacity).run(requests),
}


def run_checked(requests, capacity, strategy):
    """The hits of every request, with every invariant verified at the end."""
    trace = as_trace(requests)
    cache = ContentCache(capacity, strategy)
    hits = cache.run(trace.ids, trace.offsets)
    cache.check()
    assert cache.used_block_count == 0 and cache.cached_block_count <= capacity
    assert cache.stats.prefix_hit_tokens == hits.sum()
    return hits.tolist()


@pytest.mark.parametrize("strategy", ORACLES)
@given(requests=chained_requests(), capacity=st.integers(1, 40))
def test_hits_of_small_traces(strategy, requests, capacity):
    expected = ORACLES[strategy](requests, capacity)
    assert run_checked(requests, capacity, strategy) == expected
    assert replay(as_trace(requests), capacity, strategy).hits.tolist() == expected


@pytest.mark.parametrize("strategy", ORACLES)
@pytest.mark.parametrize("capacity", [1, 2, 7, 15, 30, 64, 150, 400])
def test_hits_of_longer_traces(strategy, capacity):
    requests = looping_requests(capacity)
    expected = ORACLES[strategy](requests, capacity)
    assert run_checked(requests, capacity, strategy) == expected
    assert capacity < 7 or sum(expected) > 0


def test_the_longer_traces_tell_the_strategies_apart():
    requests = looping_requests(30)
    totals = {name: sum(oracle(requests, 30)) for name, oracle in ORACLES.items()}
    assert len(set(totals.values())) >= 6, totals


@given(trace=chained_traces(), capacity=st.integers(1, 50))
def test_the_figures_of_a_replay(trace, capacity):
    result = replay(trace, capacity)
    hits = naive_lru(as_requests(trace), capacity)
    tokens = [min(h * trace.block_tokens, int(n)) for h, n in zip(hits, trace.input_tokens, strict=True)]
    assert (result.strategy, result.blocks, result.requests) == ("lru", capacity, trace.num_requests)
    assert (result.hit_blocks, result.accesses) == (sum(hits), trace.num_accesses)
    assert (result.hit_tokens, result.tokens) == (sum(tokens), trace.num_tokens)
    assert result.hits.tolist() == hits and result.preempted == result.refused == 0


def test_one_cache_serves_one_trace_in_pieces():
    requests = looping_requests(5)
    trace = as_trace(requests)
    whole, pieces = ContentCache(30, "s3fifo"), ContentCache(30, "s3fifo")
    expected = whole.run(trace.ids, trace.offsets).tolist()
    hits = []
    for first in range(0, len(requests), 50):
        hits += pieces.run(trace.ids.astype(np.int64), trace.offsets[first : first + 51]).tolist()
    assert hits == expected and pieces.stats == whole.stats


def test_a_capacity_beyond_the_trace():
    trace = as_trace([[1, 2, 3], [1, 2, 4], [1, 2, 3]])
    for strategy in ORACLES:
        result = replay(trace, 2**31 - 2, strategy)
        assert result.hits.tolist() == [0, 2, 3] and result.reclaimed == 0 and result.blocks == 2**31 - 2


def test_an_empty_trace():
    result = replay(as_trace([]), 5)
    assert (result.hit_ratio, result.token_hit_ratio, result.requests) == (0.0, 0.0, 0)


@pytest.mark.parametrize("blocks", [0, -1, 2**31 - 1, 2.5, True, "many", None, float("nan")])
def test_capacities_out_of_range(blocks):
    with pytest.raises(InvalidOperation, match="blocks"):
        replay(as_trace([[1]]), blocks)


@pytest.mark.parametrize(
    ("name", "strategy", "blocks", "hits"),
    [
        (CHAT, "lru", 2_000, 15_665),
        (CHAT, "lru", 10_000, 61_046),
        (AGENTS, "lru", 1_000, 499_793),
        (AGENTS, "lru", 4_000, 1_114_882),
    ],
)
def test_frozen_counts_on_real_traces(name, strategy, blocks, hits):
    assert replay(real_trace(name), blocks, strategy).hit_blocks == hits
