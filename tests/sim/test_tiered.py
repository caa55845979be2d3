"""Replays with tiers against an oracle of plain dictionaries, against real tiers, and against frozen counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.queue_oracles import looping_requests
from tests.sim.tier_oracles import LEVELS, NaiveTiers
from tests.sim.traces import as_trace, chained_requests

from pagedkv.sim import Tiers, TierSpec, replay

POLICIES = [("finish", False), ("second-hit", False), ("reclaim", False), ("reclaim", True)]


def expected_of(requests, pool, tiers, policy, restart_at):
    """What the oracle says; `pool` and every tier as (strategy, blocks), tiers with their medium before."""
    levels = [LEVELS[pool[0]](pool[1]), *(LEVELS[strategy](blocks) for _, strategy, blocks in tiers)]
    naive = NaiveTiers(levels, [medium for medium, _, _ in tiers], *policy)
    return naive.with_chains(requests).run(requests, restart_at)


def found_of(requests, pool, tiers, policy, restart_at):
    specs = [TierSpec(medium, blocks, strategy) for medium, strategy, blocks in tiers]
    return replay(as_trace(requests), pool[1], pool[0], tiers=Tiers(specs, *policy, restart_at))


def require_equal(result, expected):
    by_level = np.array(expected.hits, np.int64).reshape(-1, 1 + len(result.tiers))
    assert result.hits.tolist() == by_level.sum(axis=1).tolist()
    for place, tier in enumerate(result.tiers, start=1):
        assert tier.hits.tolist() == by_level[:, place].tolist()
        assert tier.hit_blocks == by_level[:, place].sum()
    assert [tier.written for tier in result.tiers] == expected.written
    assert result.reclaimed == expected.reclaimed
    assert result.hit_blocks == result.pool_hit_blocks + sum(tier.hit_blocks for tier in result.tiers)


@st.composite
def cases(draw):
    media = draw(st.sampled_from([("disk",), ("host",), ("host", "disk"), ("disk", "host")]))
    names = st.sampled_from(sorted(LEVELS))
    tiers = [(medium, draw(names), draw(st.integers(1, 40))) for medium in media]
    restart_at = draw(st.none() | st.integers(0, 30))
    pool = (draw(names), draw(st.integers(1, 20)))
    return pool, tiers, draw(st.sampled_from(POLICIES)), restart_at


@settings(max_examples=3 * settings.default.max_examples)
@given(requests=chained_requests(max_requests=40), case=cases())
def test_small_traces(requests, case):
    require_equal(found_of(requests, *case), expected_of(requests, *case))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy[0]}{' exclusive' * policy[1]}")
@pytest.mark.parametrize("strategy", LEVELS)
def test_longer_traces(strategy, policy):
    requests = looping_requests(3)
    for pool, tiers in (
        (("lru", 30), [("disk", strategy, 150)]),
        ((strategy, 20), [("host", strategy, 40), ("disk", "lru", 200)]),
    ):
        case = (pool, tiers, policy, 200)
        expected = expected_of(requests, *case)
        require_equal(found_of(requests, *case), expected)
        assert all(sum(hits) > 10 for hits in zip(*expected.hits, strict=True)) and expected.reclaimed > 200
