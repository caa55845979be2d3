"""Replays with tiers against an oracle of plain dictionaries, against real tiers, and against frozen counts."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.user_strategies import SmallestFirst
from tests.sim.oracles import naive_lru
from tests.sim.queue_oracles import looping_requests
from tests.sim.tier_oracles import LEVELS, NaiveTiers
from tests.sim.traces import AGENTS, CHAT, as_trace, chained_requests, chained_traces, real_trace

from pagedkv import InvalidOperation
from pagedkv.control.content_cache import ContentCache
from pagedkv.sim import Tiers, TierSpec, Timing, lru_curve, replay, sweep
from pagedkv.sim.sweeps import parse_moment, parse_tiers
from pagedkv.tiers import BlockFormat, DiskTier, HostTier

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


@settings(max_examples=2 * settings.default.max_examples)
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


# --- The tiers that serve models ---

BLOCK = BlockFormat("test", 1, 8)
OF_TIERS = ["lru", "lfu", "fifo", "longest_first", "s3fifo", "sieve", "gdsf", "ttl", "adaptive", SmallestFirst()]


def by_real_tier(requests, pool_blocks, opened, restart_at):
    """Match, load what the pool has not got, store at the end: hits by tier, blocks stored and the tier's capacity."""
    pool, tier, hits, stored = ContentCache(pool_blocks), opened(), [], 0
    for number, request in enumerate(requests):
        if number == restart_at:
            stored += tier.stats.stored
            tier.close()
            pool, tier = ContentCache(pool_blocks), opened()
        ids = np.array(request, np.int64)
        reach, found = tier.match(ids).result(), int(pool.run(ids, np.array([0, len(ids)]))[0])
        hits.append(max(0, reach - found))
        if reach > found:
            rows = np.empty((reach - found, 8), np.uint8)
            assert tier.load(ids[:reach], rows).result() == reach - found
        missing = len(ids) - tier.match(ids).result()
        tier.store(ids, np.zeros((missing, 8), np.uint8)).result()
    tier.books.check()
    stored += tier.stats.stored
    blocks = tier.books.total_blocks
    tier.close()
    return hits, stored, blocks


@pytest.mark.parametrize("strategy", OF_TIERS, ids=str)
@pytest.mark.parametrize("medium", ["disk", "host"])
def test_a_tier_of_a_replay_is_a_tier_that_serves_models(medium, strategy, tmp_path):
    requests = looping_requests(8, requests=200, blocks=16)

    def opened():
        of = copy.deepcopy(strategy)
        made = HostTier(120 * 8, strategy=of) if medium == "host" else DiskTier(tmp_path / "t", 120 * 4224, strategy=of)
        return made.open(BLOCK)

    hits, stored, blocks = by_real_tier(requests, 12, opened, restart_at=120)
    assert sum(hits) > 30 and stored > blocks
    tiers = Tiers([TierSpec(medium, blocks, strategy)], restart_at=120)
    (tier,) = replay(as_trace(requests), 12, tiers=tiers).tiers
    assert tier.hits.tolist() == hits and tier.written == stored


# --- What can be said beforehand ---


@given(trace=chained_traces(), blocks=st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60)))
def test_the_exact_curve_reads_off_every_split(trace, blocks):
    result = replay(trace, blocks[0], tiers=[TierSpec("host", blocks[1]), TierSpec("disk", blocks[2])])
    for tokens in (False, True):
        ratios = [tier.token_hit_ratio if tokens else tier.hit_ratio for tier in result.tiers]
        whole = result.token_hit_ratio if tokens else result.hit_ratio
        split = lru_curve(trace).split(*blocks, tokens=tokens)
        assert split.tolist() == pytest.approx([whole - sum(ratios), *ratios], abs=1e-12)


@given(trace=chained_traces(), pool=st.integers(1, 20), more=st.integers(0, 40), restart_at=st.integers(0, 30))
def test_behind_a_disk_no_smaller_than_the_pool_a_restart_costs_no_hit(trace, pool, more, restart_at):
    levels = [TierSpec("disk", pool + more)]
    kept, whole = replay(trace, pool, tiers=Tiers(levels, restart_at=restart_at)), replay(trace, pool, tiers=levels)
    assert kept.hits.tolist() == whole.hits.tolist() and kept.tiers[0].written == whole.tiers[0].written
    assert kept.hit_blocks == replay(trace, pool + more).hit_blocks


@given(requests=chained_requests(), pool=st.integers(1, 20), restart_at=st.integers(0, 35))
def test_a_restart_of_the_pool_alone(requests, pool, restart_at):
    result = replay(as_trace(requests), pool, tiers=Tiers(restart_at=restart_at))
    after = naive_lru(requests[restart_at:], pool)
    assert result.hits.tolist() == naive_lru(requests[:restart_at], pool) + after and result.tiers == ()
    if restart_at >= len(requests):
        assert result.restart is None
        return
    count = min(len(after), max(1, len(requests) // 10))
    restart = result.restart
    assert (restart.request, restart.requests, restart.hit_blocks) == (restart_at, count, sum(after[:count]))
    assert restart.accesses == sum(map(len, requests[restart_at : restart_at + count]))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pool_finds_the_same_with_tiers_and_without(policy):
    trace = as_trace(looping_requests(5))
    plain = replay(trace, 40, "s3fifo")
    result = replay(trace, 40, "s3fifo", tiers=Tiers([TierSpec("disk", 90, "lfu")], *policy))
    assert result.pool_hit_blocks == plain.hit_blocks and result.reclaimed == plain.reclaimed
    assert result.hit_ratio > plain.hit_ratio == result.pool_hit_ratio
    assert (result.hits >= plain.hits).all() and result.tiers[0].written > 0


@pytest.mark.parametrize(
    ("name", "pool", "disk", "policy", "alone", "found", "written"),
    [
        (CHAT, 2_000, 20_000, "finish", 15_665, 83_035, 205_465),
        (CHAT, 2_000, 20_000, "second-hit", 15_665, 21_502, 2_456),
        (AGENTS, 1_000, 10_000, "finish", 499_793, 1_175_137, 50_760),
    ],
)
def test_frozen_counts_on_real_traces(name, pool, disk, policy, alone, found, written):
    """Of all blocks: chat .054 in the pool, .288 with a disk, .075 on the second hit; coding agents .408 and .959."""
    result = replay(real_trace(name), pool, tiers=Tiers([TierSpec("disk", disk)], policy))
    assert (result.pool_hit_blocks, result.hit_blocks, result.tiers[0].written) == (alone, found, written)


def test_what_a_restart_costs_on_a_real_trace():
    trace = real_trace(AGENTS)
    tiers = Tiers([TierSpec("disk", 10_000)], restart_at=trace.num_requests // 2)
    kept, lost = replay(trace, 1_000, tiers=tiers).restart, replay(trace, 1_000, tiers=Tiers((), "finish", False, 2706))
    assert kept.request == lost.restart.request == 2706 and kept.accesses == lost.restart.accesses
    assert round(kept.hit_ratio, 3) == 0.949 and round(lost.restart.hit_ratio, 3) == 0.133


# --- Sweeps, and what makes no sense ---


def test_every_cell_of_a_sweep_has_its_own_tiers():
    trace, tiers = as_trace(looping_requests(6)), Tiers([TierSpec("disk", 80, "adaptive")], restart_at=200)
    alone = sweep(trace, ["lru", "s3fifo"], [20, 200], jobs=1, tiers=tiers)
    apart = sweep(trace, ["lru", "s3fifo"], [20, 200], jobs=2, tiers=tiers)
    for one, other in zip(alone, apart, strict=True):
        expected = replay(trace, one.blocks, one.strategy, tiers=tiers)
        for result in (one, other):
            assert result.hits.tolist() == expected.hits.tolist() and result.restart == expected.restart
            assert result.tiers[0].written == expected.tiers[0].written
    assert len({result.hit_blocks for result in alone}) > 1


def test_no_tiers_are_the_pool_alone():
    trace = as_trace(looping_requests(6))
    assert replay(trace, 30, tiers=[]).hits.tolist() == replay(trace, 30).hits.tolist()
    assert replay(trace, 30, tiers=[], timing=Timing()).preempted >= 0


def test_a_trace_without_requests():
    result = replay(as_trace([]), 5, tiers=Tiers([TierSpec("disk", 5)], "reclaim", True, 0))
    assert result.restart is None and result.tiers[0].hit_ratio == result.tiers[0].written_share == 0.0
    assert result.tiers[0].token_hit_ratio == result.pool_hit_ratio == 0.0


def test_what_makes_no_sense():
    trace, disk = as_trace([[1]]), TierSpec("disk", 5)
    for wrong, said in (
        (lambda: TierSpec("tape", 5), "medium: expected one of host, disk"),
        (lambda: TierSpec("disk", 0), "blocks: expected an int"),
        (lambda: TierSpec("disk", 5, "no such"), "strategy: expected one of"),
        (lambda: Tiers([disk, disk]), "tiers: expected at most one of each medium, got disk, disk"),
        (lambda: replay(trace, 5, tiers=["disk:5"]), "tiers: expected TierSpec objects, got 'disk:5'"),
        (lambda: Tiers([disk], "often"), "writes: expected one of finish"),
        (lambda: Tiers([disk], exclusive=True), "writes: expected 'reclaim' for exclusive tiers, got 'finish'"),
        (lambda: Tiers([disk], restart_at=0.5), "restart_at: expected an int"),
        (lambda: Tiers([TierSpec("shared", 5), disk]), "tiers: expected the shared one last, got shared, disk"),
        (lambda: TierSpec("disk", 5, bytes_per_second=0), "bytes_per_second: expected a number above 0"),
        (lambda: TierSpec("disk", 5, latency=-1), "latency: expected a number of at least 0"),
        (
            lambda: replay(trace, 5, tiers=Tiers([disk], restart_at=1), timing=Timing()),
            "restart_at: expected none together with timing",
        ),
        (
            lambda: sweep(trace, ["optimal"], [5], tiers=[disk], timing=Timing()),
            "no 'optimal' together with timing: the optimum knows no time",
        ),
    ):
        with pytest.raises(InvalidOperation, match=re.escape(said)):
            wrong()


@pytest.mark.parametrize(
    ("text", "request_number"), [("50%", 5), ("0%", 0), ("100%", 10), ("35%", 3), ("2s", 2), ("0.05min", 3), ("1h", 10)]
)
def test_moments(text, request_number):
    assert parse_moment(text, as_trace([[1]] * 10)) == request_number


def test_tiers_as_text():
    assert parse_tiers("host:2k, DISK:25%", 1000, "lfu") == (
        TierSpec("host", 2000, "lfu"),
        TierSpec("disk", 250, "lfu"),
    )
