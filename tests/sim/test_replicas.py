"""Replays on a fleet against an oracle from the definition, request by request, and against counts that were frozen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.fleet_oracles import naive_fleet
from tests.sim.queue_oracles import looping_requests
from tests.sim.traces import AGENTS, CHAT, as_requests, as_trace, chained_traces, real_trace

from pagedkv import InvalidOperation, ReplayFailed
from pagedkv.fleet import Candidates, RoutingRequest, routing_names
from pagedkv.sim import Fleet, TierSpec, replay, sweep

POLICIES = ("round_robin", "least_load", "sticky", "prefix")


def test_every_policy_has_its_oracle():
    assert routing_names() == POLICIES


@pytest.mark.parametrize("routing", POLICIES)
@given(trace=chained_traces(), each=st.integers(1, 20), replicas=st.integers(1, 5), rest=st.integers(0, 4))
def test_small_traces(routing, trace, each, replicas, rest):
    blocks = each * replicas + rest % replicas
    result = replay(trace, blocks, fleet=Fleet(replicas, routing))
    served, hits = naive_fleet(as_requests(trace), blocks, replicas, routing, trace.block_tokens)
    assert (result.fleet.served.tolist(), result.hits.tolist()) == (served, hits)
    missed = [len(request) - found for request, found in zip(as_requests(trace), hits, strict=True)]
    assert result.fleet.computed_blocks.tolist() == np.bincount(served, missed, replicas).tolist()
    assert (result.hit_blocks, result.blocks) == (sum(hits), blocks)


@pytest.mark.parametrize("routing", POLICIES)
@pytest.mark.parametrize(("blocks", "replicas"), [(16, 2), (60, 3), (200, 8)])
def test_longer_traces(routing, blocks, replicas):
    requests = looping_requests(blocks)
    result = replay(as_trace(requests), blocks, fleet=Fleet(replicas, routing))
    assert (result.fleet.served.tolist(), result.hits.tolist()) == naive_fleet(requests, blocks, replicas, routing, 4)
    assert 0 < result.hit_blocks < result.accesses


def test_the_longer_traces_tell_the_policies_apart():
    trace = as_trace(looping_requests(60))
    served = {tuple(replay(trace, 60, fleet=Fleet(3, routing)).fleet.served) for routing in POLICIES}
    assert len(served) == len(POLICIES)


@pytest.mark.parametrize("strategy", ["lru", "s3fifo", "adaptive"])
def test_one_replica_is_one_pool(strategy):
    trace = as_trace(looping_requests(30))
    alone = replay(trace, 30, strategy)
    for routing in POLICIES:
        assert replay(trace, 30, strategy, fleet=Fleet(1, routing)).hits.tolist() == alone.hits.tolist()


@pytest.mark.parametrize(
    ("name", "blocks", "hits"),
    [
        (CHAT, 20_000, {"round_robin": 24_725, "least_load": 23_130, "sticky": 83_214, "prefix": 76_882}),
        (AGENTS, 8_000, {"round_robin": 495_053, "least_load": 485_482, "sticky": 1_136_493, "prefix": 1_159_874}),
    ],
)
def test_frozen_counts_on_real_traces(name, blocks, hits):
    trace = real_trace(name)
    assert {name: replay(trace, blocks, fleet=Fleet(8, name)).hit_blocks for name in hits} == hits


class Backwards:
    """The last candidate first."""

    def order(self, request: RoutingRequest, candidates: Candidates) -> list[int]:
        return list(range(len(candidates)))[::-1]


class Nobody:
    """No order at all."""

    def order(self, request: RoutingRequest, candidates: Candidates) -> list[int]:
        return [0, 0]


def test_a_policy_of_a_user():
    trace = as_trace([[1, 2], [1, 2]])
    for routing in (Backwards(), f"{__name__}:Backwards"):
        result = replay(trace, 9, fleet=Fleet(3, routing))
        assert result.fleet.served.tolist() == [2, 2] and result.hits.tolist() == [0, 2]
        assert result.fleet.routing in ("Backwards", routing)
    with pytest.raises(InvalidOperation, match="each of 0 … 1 once"):
        replay(trace, 9, fleet=Fleet(2, Nobody()))
    with pytest.raises(ReplayFailed, match="lru with 9 blocks.*each of 0 … 1 once"):
        sweep(trace, ["lru"], [9], fleets=[Fleet(2, Nobody())])


def test_a_sweep_over_fleets_is_the_same_in_one_process_and_in_several():
    trace = as_trace(looping_requests(30))
    fleets = [Fleet(1), *(Fleet(3, routing) for routing in POLICIES)]
    here = sweep(trace, ["lru", "lfu"], [30, 60], fleets=fleets, jobs=1)
    there = sweep(trace, ["lru", "lfu"], [30, 60], fleets=fleets, jobs=2)
    assert [cell.hit_blocks for cell in here] == [cell.hit_blocks for cell in there]
    told = [(cell.strategy, cell.fleet.replicas, cell.fleet.routing, cell.blocks) for cell in here]
    assert told[:3] == [("lru", 1, "prefix", 30), ("lru", 1, "prefix", 60), ("lru", 3, "round_robin", 30)]
    assert len(set(told)) == 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fleet": 8}, "fleet: expected a Fleet"),
        ({"fleet": Fleet(8), "blocks": 7}, "blocks: expected at least one for each of 8 replicas, got 7"),
        (
            {"fleet": Fleet(2), "tiers": [TierSpec("disk", 1)]},
            "tiers: expected at least one block for each of 2 replicas",
        ),
    ],
)
def test_what_a_replay_on_a_fleet_refuses(given, said):
    with pytest.raises(InvalidOperation, match=said):
        replay(as_trace([[1]]), **{"blocks": 10} | given)


@pytest.mark.parametrize("given", [(0, "prefix"), (2.5, "prefix"), (2, "fastest"), (2, 7), (2, Backwards)])
def test_what_is_no_fleet(given):
    with pytest.raises(InvalidOperation, match="replicas|routing"):
        Fleet(*given)
