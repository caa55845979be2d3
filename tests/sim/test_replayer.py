"""Replays against oracles from the definitions, hit by hit, and against counts that were frozen."""

from __future__ import annotations

from dataclasses import replace as with_fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.oracles import naive_fifo, naive_leaf_lru, naive_lfu, naive_lru
from tests.sim.queue_oracles import Gdsf, LongestFirst, S3Fifo, Sieve, looping_requests
from tests.sim.traces import AGENTS, CHAT, as_requests, as_trace, chained_requests, chained_traces, real_trace

from pagedkv import InvalidOperation
from pagedkv.control.content_cache import ContentCache
from pagedkv.sim import Timing
from pagedkv.sim.replayer import replay, replay_timed
from pagedkv.sim.tiered import TraceClock

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


# --- Replay in time: small cases by hand, and what holds for all of them ---


# One block of four tokens takes a second to prefill, and a second to decode.
STEADY = Timing(4, 4)


def timed_trace(requests, times, outputs):
    """Blocks of four tokens; arrivals in seconds, outputs in blocks."""
    trace = as_trace(requests, 4)
    tokens = np.array(outputs, np.int64) * 4
    return with_fields(trace, times=np.array(times, np.float64), output_tokens=tokens)


def outcome(requests, times, outputs, blocks, timing=STEADY, strategy="lru"):
    result = replay(timed_trace(requests, times, outputs), blocks, strategy, timing=timing)
    return result.hits.tolist(), result.preempted, result.refused


def test_the_input_is_findable_once_its_prefill_is_done():
    requests, outputs = [[1, 2]] * 4, [2, 0, 0, 0]
    assert outcome(requests, [0, 1.9, 2, 9], outputs, 20) == ([0, 0, 2, 2], 0, 0)


def test_hits_shorten_the_prefill():
    # The second finds [1, 2] and has [1, 2, 3] ready at 2 + 1; the third finds it at 3, or two blocks of it before.
    requests, outputs = [[1, 2], [1, 2, 3], [1, 2, 3]], [0, 0, 0]
    assert outcome(requests, [0, 2, 3], outputs, 20) == ([0, 2, 3], 0, 0)
    assert outcome(requests, [0, 2, 2.9], outputs, 20) == ([0, 2, 2], 0, 0)


def test_what_runs_is_held_and_what_is_done_is_given_up():
    # [1, 2] and an output block are held until 2 + 1; [3, 4] fits beside them in five blocks.
    requests, times, outputs = [[1, 2], [3, 4], [5], [1, 2]], [0, 0.5, 4.5, 6], [1, 0, 0, 0]
    assert outcome(requests, times, outputs, 5) == ([0, 0, 0, 2], 0, 0)
    # In four the first goes for the second at 0.5, starts again at 2.5 and has [1, 2] ready at 4.5.
    assert outcome(requests, times, outputs, 4) == ([0, 0, 0, 2], 1, 0)
    assert outcome(requests, [0, 0.5, 4.4, 4.5], outputs, 4) == ([0, 0, 0, 2], 1, 0)
    assert outcome(requests, [0, 0.5, 4.3, 4.4], outputs, 5) == ([0, 0, 0, 2], 0, 0)


def test_what_does_not_fit_preempts_and_waits():
    # Of four blocks the first holds three until 12. At 3 the second needs three: the first goes back to the queue,
    # leaves [1, 2] cached, loses block 2 of it, and starts again at 5, when the second is done.
    requests, times, outputs = [[1, 2], [3, 4]], [0, 3], [1, 1]
    slow = Timing(4, 0.4)
    assert outcome(requests, times, outputs, 4, slow) == ([0, 0], 1, 0)
    # A third that comes while the first runs again preempts it again, and finds nothing of what was given up.
    assert outcome([*requests, [5, 6, 7, 8]], [0, 3, 17], [1, 1, 0], 4, slow) == ([0, 0, 0], 2, 0)


def test_the_first_to_be_preempted_is_the_first_to_return():
    requests, times, outputs = [[1], [2], [3, 4, 5], [1], [2]], [0, 0.1, 5, 20, 60], [1, 1, 1, 0, 0]
    hits, preempted, refused = outcome(requests, times, outputs, 4, Timing(4, 0.4))
    assert preempted == 2 and refused == 0
    assert hits == [0, 0, 0, 1, 1]


def test_requests_larger_than_the_pool_are_refused():
    requests, times = [[1, 2, 3], [1, 2], [1, 2]], [0, 1, 9]
    assert outcome(requests, times, [0, 1, 0], 2) == ([0, 0, 0], 0, 2)
    assert outcome(requests, times, [1, 1, 1], 3) == ([0, 0, 2], 0, 1)
    assert outcome([[1, 2, 3]], [0], [0], 2) == ([0], 0, 1)


def test_a_request_that_does_not_fit_at_once_counts_its_find_once():
    # [1] is in use by the first and found by the third, for which the second must go.
    trace = timed_trace([[1], [2], [1, 3, 4]], [0, 1, 2], [1, 1, 0])
    cache = ContentCache(5, "lfu")
    result = replay_timed(trace, cache, "lfu", Timing(4, 0.01), TraceClock())
    assert result.hits.tolist() == [0, 0, 1] and result.preempted == 1
    assert cache.stats.prefix_queries == 3 + result.preempted


@pytest.mark.parametrize("strategy", ["lru", "s3fifo", "sieve", "lfu"])
@given(
    trace=chained_traces(),
    blocks=st.integers(1, 40),
    outputs=st.integers(0, 9),
    gap=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_everything_is_given_back(strategy, trace, blocks, outputs, gap, seed):
    rng = np.random.default_rng(seed)
    count = trace.num_requests
    times = np.cumsum(rng.exponential(gap, count)) if gap else np.zeros(count)
    trace = with_fields(trace, times=times, output_tokens=rng.integers(0, outputs + 1, count))
    cache = ContentCache(blocks, strategy)
    first = replay_timed(trace, cache, strategy, STEADY, TraceClock())
    cache.check()
    assert cache.num_sequences == cache.used_block_count == 0 and cache.free_block_count == blocks
    again = replay(trace, blocks, strategy, timing=STEADY)
    assert again.hits.tolist() == first.hits.tolist()
    assert (again.preempted, again.refused, again.reclaimed) == (first.preempted, first.refused, first.reclaimed)
    needs = np.diff(trace.offsets) - (-trace.output_tokens // trace.block_tokens)
    assert first.refused == (needs > blocks).sum() and first.hit_blocks <= trace.num_accesses


@pytest.mark.parametrize("strategy", ["lru", "lfu", "fifo", "s3fifo", "sieve", "gdsf", "longest_first"])
@given(trace=chained_traces(), spare=st.integers(0, 20))
def test_requests_that_never_meet_are_a_plain_replay(strategy, trace, spare):
    trace = with_fields(trace, times=np.arange(trace.num_requests) * 1e6)
    blocks = max(1, int(np.diff(trace.offsets).max(initial=0))) + spare
    plain, timed = replay(trace, blocks, strategy), replay(trace, blocks, strategy, timing=STEADY)
    assert timed.hits.tolist() == plain.hits.tolist() and timed.hit_tokens == plain.hit_tokens
    assert (timed.preempted, timed.refused) == (0, 0)


def test_a_capacity_beyond_the_trace_in_time():
    result = replay(timed_trace([[1, 2]] * 2, [0, 9], [1, 1]), 2**31 - 2, timing=STEADY)
    assert result.hits.tolist() == [0, 2] and result.blocks == 2**31 - 2


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_rates_out_of_range(rate):
    with pytest.raises(InvalidOperation, match="prefill_tokens_per_second: expected a number"):
        Timing(prefill_tokens_per_second=rate)
    with pytest.raises(InvalidOperation, match="decode_tokens_per_second: expected a number"):
        Timing(decode_tokens_per_second=rate)
