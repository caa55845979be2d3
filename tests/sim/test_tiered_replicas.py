"""Fleets with tiers against an oracle of plain dictionaries, request by request and tier by tier, and their bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.queue_oracles import looping_requests
from tests.sim.test_replicas import POLICIES
from tests.sim.tier_oracles import LEVELS
from tests.sim.tiered_fleet_oracles import NaiveFleet
from tests.sim.traces import AGENTS, CHAT, as_requests, as_trace, chained_requests, real_trace

from pagedkv import InvalidOperation
from pagedkv.fleet import Candidates, RoutingRequest
from pagedkv.sim import Fleet, Tiers, TierSpec, optimal, replay, sweep

WRITES = [("finish", False), ("second-hit", False), ("reclaim", False), ("reclaim", True)]
SHAPES = [("shared",), ("host", "shared"), ("disk", "shared"), ("host", "disk"), ("host", "disk", "shared")]


def specs_of(tiers):
    return [TierSpec(medium, blocks, name) for medium, name, blocks in tiers]


def require_equal(requests, pool, tiers, writes, replicas, routing, restart_at=None, trace=None):
    trace = as_trace(requests) if trace is None else trace
    expected = NaiveFleet(requests, pool, tiers, *writes, replicas).run(routing, trace.block_tokens, restart_at)
    result = replay(
        trace, pool[1], pool[0], tiers=Tiers(specs_of(tiers), *writes, restart_at), fleet=Fleet(replicas, routing)
    )
    by_level = np.array(expected.hits, np.int64).reshape(-1, 1 + len(tiers))
    assert result.fleet.served.tolist() == expected.served
    assert result.hits.tolist() == by_level.sum(axis=1).tolist()
    for place, tier in enumerate(result.tiers, start=1):
        assert tier.hits.tolist() == by_level[:, place].tolist()
    assert [tier.written for tier in result.tiers] == expected.written
    assert result.reclaimed == expected.reclaimed
    return result, expected


@st.composite
def fleets(draw):
    replicas = draw(st.integers(1, 4))
    names = st.sampled_from(sorted(LEVELS))
    tiers = [
        (medium, draw(names), replicas * draw(st.integers(1, 20)) + draw(st.integers(0, 3)))
        for medium in draw(st.sampled_from(SHAPES))
    ]
    pool = (draw(names), replicas * draw(st.integers(1, 15)))
    return pool, tiers, draw(st.sampled_from(WRITES)), replicas


@pytest.mark.parametrize("routing", POLICIES)
@settings(max_examples=settings.default.max_examples // 2)
@given(requests=chained_requests(max_requests=40), case=fleets(), restart_at=st.none() | st.integers(0, 30))
def test_small_traces(routing, requests, case, restart_at):
    require_equal(requests, *case, routing, restart_at)


@pytest.mark.parametrize("writes", WRITES, ids=lambda writes: f"{writes[0]}{' exclusive' * writes[1]}")
@pytest.mark.parametrize("routing", POLICIES)
def test_longer_traces(routing, writes):
    requests = looping_requests(3, requests=200)
    tiers = [("host", "lru", 60), ("shared", "lfu", 150)]
    result, expected = require_equal(requests, ("lru", 45), tiers, writes, 3, routing, restart_at=150)
    assert all(sum(hits) > 5 for hits in zip(*expected.hits, strict=True)) and expected.reclaimed > 100
    assert result.restart.accesses > result.restart.hit_blocks > 0


@pytest.mark.parametrize(("name", "requests"), [(AGENTS, 40), (CHAT, 150)])
def test_a_slice_of_real_traces(name, requests):
    trace = real_trace(name).slice(0, requests)
    tiers = [("host", "lru", 300), ("shared", "lru", 1_000)]
    result, _ = require_equal(as_requests(trace), ("lru", 200), tiers, ("finish", False), 2, "prefix", trace=trace)
    assert result.hit_blocks > 0


@pytest.mark.parametrize("writes", WRITES)
def test_one_replica_is_one_pool(writes):
    trace = as_trace(looping_requests(30))
    tiers = Tiers([TierSpec("host", 50), TierSpec("disk", 150, "lfu")], *writes, restart_at=100)
    alone, fleet = replay(trace, 30, tiers=tiers), replay(trace, 30, tiers=tiers, fleet=Fleet(1))
    assert fleet.hits.tolist() == alone.hits.tolist() and fleet.restart == alone.restart
    for one, other in zip(alone.tiers, fleet.tiers, strict=True):
        assert one.hits.tolist() == other.hits.tolist() and one.written == other.written


def test_a_shared_tier_has_what_any_replica_wrote_and_outlives_a_restart():
    trace = as_trace([[1, 2], [1, 2], [1, 2, 3], [1, 2, 3]])
    fleet = Fleet(2, "round_robin")
    own = replay(trace, 8, tiers=[TierSpec("disk", 8)], fleet=fleet)
    shared = replay(trace, 8, tiers=Tiers([TierSpec("shared", 8)], restart_at=3), fleet=fleet)
    assert own.hits.tolist() == [0, 0, 2, 2]
    assert shared.tiers[0].hits.tolist() == [0, 2, 0, 3] and shared.hits.tolist() == [0, 2, 2, 3]


class Recorder:
    """The first candidate; remembers what it was shown."""

    seen: list = []

    def order(self, request: RoutingRequest, candidates: Candidates) -> list[int]:
        self.seen.append(candidates.matched.tolist())
        return list(range(len(candidates)))


def test_a_policy_sees_a_column_for_every_level():
    trace = as_trace([[1, 2, 3], [1, 2, 3]])
    Recorder.seen.clear()
    replay(trace, 2, tiers=[TierSpec("host", 4), TierSpec("shared", 3)], fleet=Fleet(2, Recorder()))
    # Of three blocks of four tokens the pool of one has one, its host tier two, and the shared tier all.
    assert Recorder.seen == [[[0, 0, 0], [0, 0, 0]], [[4, 4, 4], [0, 0, 12]]]


@given(requests=chained_requests(max_requests=40), case=fleets(), routing=st.sampled_from(POLICIES))
def test_no_fleet_finds_more_than_the_optimum_over_all_its_blocks(requests, case, routing):
    pool, tiers, writes, replicas = case
    trace, levels = as_trace(requests), Tiers(specs_of(tiers), *writes)
    bound = optimal(trace, pool[1], tiers=levels)
    assert replay(trace, pool[1], pool[0], tiers=levels, fleet=Fleet(replicas, routing)).hit_blocks <= bound.hit_blocks
    everything = optimal(trace, pool[1] + sum(blocks for *_, blocks in tiers))
    assert bound.hits.tolist() == everything.hits.tolist() and bound.blocks == pool[1]


def test_a_sweep_over_fleets_and_tiers_has_the_optimum_once():
    trace = as_trace(looping_requests(30))
    fleets, tiers = [Fleet(1), Fleet(3, "round_robin"), Fleet(3)], [TierSpec("host", 30), TierSpec("shared", 90)]
    here = sweep(trace, ["lru", "optimal"], [30, 60], fleets=fleets, tiers=tiers, jobs=1)
    there = sweep(trace, ["lru", "optimal"], [30, 60], fleets=fleets, tiers=tiers, jobs=2)
    assert [cell.hit_blocks for cell in here] == [cell.hit_blocks for cell in there]
    told = [(cell.strategy, str(cell.fleet), cell.blocks) for cell in here]
    assert told[-3:] == [("lru", "3 x prefix", 60), ("optimal", "None", 30), ("optimal", "None", 60)]
    assert here[-1].hits.tolist() == optimal(trace, 60, tiers=tiers).hits.tolist()


@pytest.mark.parametrize("order", [[0, 0], [3], [0.5], [[0]], [-1]])
def test_what_is_no_order(order):
    with pytest.raises(InvalidOperation, match="order: expected numbers of requests, 0 … 2, each once"):
        optimal(as_trace([[1], [1], [1]]), 1, order=np.array(order))


def test_the_optimum_in_another_order():
    trace = as_trace([[1], [2], [1], [2]])
    assert optimal(trace, 1).hits.tolist() == [0, 0, 1, 0]
    assert optimal(trace, 1, order=np.array([0, 2, 1, 3])).hits.tolist() == [0, 0, 1, 1]
    assert optimal(trace, 1, order=np.array([1, 3])).hits.tolist() == [0, 0, 0, 1]
    assert optimal(trace, 1, order=np.array([], np.int64)).hit_blocks == 0


def test_the_optimum_has_the_blocks_of_all_levels_and_a_replica_its_part():
    trace = as_trace(looping_requests(30))
    tiers = [TierSpec("host", 20), TierSpec("shared", 15)]
    bound = optimal(trace, 10, tiers=tiers)
    assert bound.hits.tolist() == optimal(trace, 45).hits.tolist() != optimal(trace, 44).hits.tolist()
    assert TierSpec("disk", 7).blocks_each(2) == 3 and TierSpec("shared", 7).blocks_each(9) == 7
