"""Replays in time with queues and loads against an oracle of plain lists, to the last bit of every first token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.queue_oracles import looping_requests
from tests.sim.test_replicas import POLICIES
from tests.sim.test_tiered_replicas import SHAPES, WRITES, specs_of
from tests.sim.tier_oracles import LEVELS
from tests.sim.tiered_fleet_oracles import NaiveQueues, Rates
from tests.sim.traces import AGENTS, CHAT, as_requests, as_trace, chained_traces, real_trace

from pagedkv import InvalidOperation
from pagedkv.sim import Fleet, Tiers, TierSpec, Timing, optimal, replay

SLOW = Rates(10.0, 2.0, 3.0, ((0.5, 100.0), (0.25, None), (0.0, 40.0)))


def in_time(trace, times, outputs):
    return dataclasses.replace(
        trace, times=np.array(times, np.float64), output_tokens=np.array(outputs, np.int64).reshape(-1)
    )


def replayed(trace, pool, tiers, writes, rates, fleet):
    timing = Timing(rates.prefill, rates.decode, rates.bytes_per_token)
    levels = [
        dataclasses.replace(spec, latency=latency, bytes_per_second=speed)
        for spec, (latency, speed) in zip(specs_of(tiers), rates.loads, strict=False)
    ]
    return replay(trace, pool, timing=timing, tiers=Tiers(levels, *writes), fleet=fleet)


def require_equal(trace, pool, tiers, writes, replicas, routing, rates):
    expected = NaiveQueues(as_requests(trace), ("lru", pool), tiers, *writes, replicas).run_in_time(
        routing,
        trace.block_tokens,
        rates,
        trace.times.tolist(),
        trace.input_tokens.tolist(),
        trace.output_tokens.tolist(),
    )
    result = replayed(trace, pool, tiers, writes, rates, Fleet(replicas, routing))
    by_level = np.array(expected.hits, np.int64).reshape(-1, 1 + len(tiers))
    assert result.fleet.served.tolist() == expected.served
    for place, tier in enumerate(result.tiers, start=1):
        assert tier.hits.tolist() == by_level[:, place].tolist()
    assert result.hits.tolist() == by_level.sum(axis=1).tolist()
    assert [tier.written for tier in result.tiers] == expected.written
    assert (result.reclaimed, result.refused) == (expected.reclaimed, expected.served.count(-1))
    for name in ("ttft", "queueing"):
        by_request = [getattr(expected, name).get(request, np.nan) for request in range(trace.num_requests)]
        np.testing.assert_array_equal(getattr(result, name), by_request)
    busy = [seconds / expected.last if expected.last else 0.0 for seconds in expected.busy]
    assert result.utilisation.tolist() == busy and result.preempted == 0
    return result


@st.composite
def cases(draw):
    trace = draw(chained_traces(max_requests=40))
    count = trace.num_requests
    gaps = draw(st.lists(st.sampled_from([0.0, 0.125, 0.5, 2.0, 30.0]), min_size=count, max_size=count))
    outputs = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    trace = in_time(trace, np.cumsum(gaps) if count else [], outputs)
    replicas = draw(st.integers(1, 4))
    names = st.sampled_from(sorted(LEVELS))
    shape = draw(st.sampled_from([(), *SHAPES]))
    tiers = [(medium, draw(names), replicas * draw(st.integers(1, 20))) for medium in shape]
    speeds = st.none() | st.sampled_from([1.0, 40.0, 1000.0])
    loads = tuple((draw(st.sampled_from([0.0, 0.5])), draw(speeds)) for _ in shape)
    rates = Rates(draw(st.sampled_from([1.0, 10.0])), draw(st.sampled_from([0.5, 2.0])), 3.0, loads)
    return trace, replicas * draw(st.integers(1, 25)), tiers, draw(st.sampled_from(WRITES)), replicas, rates


@pytest.mark.parametrize("routing", POLICIES)
@settings(max_examples=settings.default.max_examples // 2)
@given(case=cases())
def test_small_traces(routing, case):
    trace, pool, tiers, writes, replicas, rates = case
    require_equal(trace, pool, tiers, writes, replicas, routing, rates)


@pytest.mark.parametrize("writes", WRITES, ids=lambda writes: f"{writes[0]}{' exclusive' * writes[1]}")
@pytest.mark.parametrize("routing", POLICIES)
def test_longer_traces(routing, writes):
    requests = looping_requests(3, requests=200)
    rng = np.random.default_rng(5)
    trace = in_time(as_trace(requests), np.cumsum(rng.exponential(1.0, 200)), rng.integers(0, 20, 200))
    tiers = [("host", "lru", 60), ("disk", "lfu", 90), ("shared", "lru", 150)]
    result = require_equal(trace, 42, tiers, writes, 3, routing, SLOW)
    assert result.mean_queueing > 0 and 0 < result.refused < 100
    assert any(tier.hit_blocks for tier in result.tiers) and (result.utilisation > 0).all()


@pytest.mark.parametrize(("name", "requests"), [(AGENTS, 40), (CHAT, 150)])
def test_a_slice_of_real_traces(name, requests):
    trace = real_trace(name).slice(0, requests)
    trace = in_time(trace, np.arange(requests) * 0.7, np.arange(requests) % 700)
    tiers = [("host", "lru", 400), ("shared", "lru", 1_000)]
    rates = Rates(8_000.0, 50.0, 160e3, ((0.0, 25e9), (0.002, 2e9)))
    result = require_equal(trace, 400, tiers, ("finish", False), 2, "prefix", rates)
    assert result.mean_queueing > 0 and result.hit_blocks > 0


# --- Small cases by hand ---

SECOND = Timing(4, 4)
"""One block of four tokens takes a second to prefill, and a second to decode."""


def test_a_prompt_waits_for_the_one_before_it():
    trace = in_time(as_trace([[1, 2], [3, 4, 5], [1, 2, 6]]), [0, 0.5, 0.75], [400, 0, 0])
    result = replay(trace, 200, timing=SECOND, fleet=Fleet(1))
    assert result.ttft.tolist() == [2.0, 4.5, 5.25] and result.queueing.tolist() == [0.0, 1.5, 4.25]
    assert result.hits.tolist() == [0, 0, 2] and result.order.tolist() == [0, 1, 2]
    assert result.utilisation.tolist() == [6 / 102]


def test_a_prompt_waits_for_room_and_those_behind_it_wait_too():
    # The first holds three of four blocks until 2 + 1; the second needs two, the third one.
    trace = in_time(as_trace([[1, 2], [3, 4], [5]]), [0, 0, 0], [4, 0, 0])
    result = replay(trace, 4, timing=SECOND, fleet=Fleet(1))
    assert result.ttft.tolist() == [2.0, 5.0, 6.0] and result.reclaimed == 1


def test_what_is_larger_than_the_pool_of_a_replica_is_refused_and_takes_no_turn():
    trace = in_time(as_trace([[1], [2, 3, 4, 7], [5, 6]]), [0, 1, 2], [0, 0, 4])
    result = replay(trace, 6, timing=SECOND, fleet=Fleet(2, "round_robin"))
    assert result.fleet.served.tolist() == [0, -1, 1] and result.refused == 1
    assert np.isnan(result.ttft).tolist() == [False, True, False] and result.hits.tolist() == [0, 0, 0]
    assert result.fleet.computed_blocks.tolist() == [1, 2] and result.order.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("disk", "ttft", "hits"),
    [
        (TierSpec("disk", 9, bytes_per_second=16), 0.5 + 1, 2),  # half of what computing takes
        (TierSpec("disk", 9, bytes_per_second=8), 1 + 1, 2),
        (TierSpec("disk", 9, bytes_per_second=8, latency=1.5), 3.0, 0),
        (TierSpec("disk", 9, bytes_per_second=1), 3.0, 0),
        (TierSpec("disk", 9), 1.0, 2),
    ],
)
def test_what_is_sooner_computed_is_not_loaded(disk, ttft, hits):
    trace = in_time(as_trace([[1, 2], [7, 8, 9], [1, 2, 3]]), [0, 10, 20], [0, 0, 0])
    result = replay(trace, 3, timing=Timing(4, 4, bytes_per_token=1), tiers=[disk])
    assert result.ttft[2] == ttft and result.tiers[0].hits.tolist() == [0, 0, hits]
    assert result.hit_blocks == hits and result.fleet is None


def test_percentiles_are_those_of_requests():
    trace = in_time(as_trace([[n] * (n > 0) for n in range(11)]), np.arange(11) * 100, [0] * 11)
    result = dataclasses.replace(replay(trace, 3, timing=SECOND), ttft=np.array([*range(1, 11), np.nan]))
    assert [result.ttft_percentile(percent) for percent in (0, 50, 90, 99, 100)] == [1, 5, 9, 10, 10]
    with pytest.raises(InvalidOperation, match="percent: expected a number in 0 … 100"):
        result.ttft_percentile(101)
    nobody = replay(in_time(as_trace([[1, 2]]), [0], [0]), 1, timing=SECOND, fleet=Fleet(1))
    assert np.isnan(nobody.ttft_percentile(50)) and np.isnan(nobody.mean_queueing)
    assert nobody.utilisation.tolist() == [0.0]


def test_one_pool_in_time_tells_when_first_tokens_came():
    # In four blocks the first goes for the second at 0.5, starts again at 2.5 and has [1, 2] ready at 4.5.
    trace = in_time(as_trace([[1, 2], [3, 4], [5]]), [0, 0.5, 4.5], [4, 0, 0])
    result = replay(trace, 4, timing=SECOND)
    assert result.ttft.tolist() == [4.5, 2.0, 1.0] and result.queueing.tolist() == [2.5, 0.0, 0.0]
    assert result.preempted == 1 and not len(result.utilisation) and not len(replay(trace, 4).ttft)


def test_a_request_that_is_preempted_after_its_first_token_keeps_its_time():
    trace = in_time(as_trace([[1, 2], [3, 4]]), [0, 3], [4, 4])
    result = replay(trace, 4, timing=Timing(4, 0.4))
    assert result.preempted == 1 and result.ttft.tolist() == [2.0, 2.0] and result.queueing.tolist() == [0.0, 0.0]


# --- What holds for all ---


@pytest.mark.parametrize("writes", WRITES)
@given(trace=chained_traces(), spare=st.integers(0, 20), disk=st.integers(2, 60), routing=st.sampled_from(POLICIES))
@settings(max_examples=settings.default.max_examples // 2)
def test_requests_that_never_meet_are_a_replay_without_time(writes, trace, spare, disk, routing):
    trace = dataclasses.replace(trace, times=np.arange(trace.num_requests) * 1e6)
    blocks = 2 * (max(1, int(np.diff(trace.offsets).max(initial=0))) + spare)
    tiers, fleet = Tiers([TierSpec("host", disk), TierSpec("shared", 2 * disk)], *writes), Fleet(2, routing)
    plain = replay(trace, blocks, tiers=tiers, fleet=fleet)
    timed = replay(trace, blocks, tiers=tiers, fleet=fleet, timing=SECOND)
    assert timed.fleet.served.tolist() == plain.fleet.served.tolist()
    assert timed.hits.tolist() == plain.hits.tolist() and timed.reclaimed == plain.reclaimed
    for one, other in zip(plain.tiers, timed.tiers, strict=True):
        assert one.hits.tolist() == other.hits.tolist() and one.written == other.written
    assert not timed.queueing.any()


@given(case=cases(), routing=st.sampled_from(POLICIES))
@settings(max_examples=settings.default.max_examples // 2)
def test_nothing_in_time_finds_more_than_the_optimum_in_that_order(case, routing):
    trace, pool, tiers, writes, replicas, rates = case
    result = replayed(trace, pool, tiers, writes, rates, Fleet(replicas, routing))
    bound = optimal(trace, pool, tiers=specs_of(tiers), order=result.order)
    assert result.hit_blocks <= bound.hit_blocks
    assert sorted(result.order.tolist()) == np.flatnonzero(~np.isnan(result.ttft)).tolist()


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None, True])
def test_bytes_out_of_range(value):
    with pytest.raises(InvalidOperation, match="bytes_per_token: expected a number"):
        Timing(bytes_per_token=value)
