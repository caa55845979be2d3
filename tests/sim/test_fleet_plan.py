"""The cheapest fleet: every outcome against its own replay, and the one to order against all that were asked for."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import product

import numpy as np
import pytest
from tests.sim.test_planner import MODEL
from tests.sim.traces import as_trace

from pagedkv.errors import InvalidOperation
from pagedkv.sim import Fleet, TierSpec, Timing, replay
from pagedkv.sim.fleet_plan import beneath
from pagedkv.sim.plan_types import FleetOptions, FleetSize, Hardware, Prices
from pagedkv.sim.planner import plan

BLOCK = 4 * 256  # bytes
PRICES = Prices(2.0, 2**20, 2**10)  # so that the kibibytes of these traces are worth something


def conversations(sessions=6, turns=8, seed=1):
    """Chats of several turns at the same time, all of which begin with the same two blocks."""
    rng = np.random.default_rng(seed)
    grown, asked, fresh = {chat: [0, 1] for chat in range(sessions)}, [], iter(range(2, 10_000))
    for chat in rng.permutation(np.repeat(np.arange(sessions), turns)).tolist():
        grown[chat] = grown[chat] + [next(fresh) for _ in range(3)]
        asked.append(grown[chat])
    trace = as_trace(asked)
    return dataclasses.replace(
        trace,
        times=np.arange(len(asked), dtype=np.float64),
        output_tokens=np.full(len(asked), 4, trace.output_tokens.dtype),
    )


TRACE = conversations()


def made(trace=TRACE, memory=40, rate=30.0, jobs=1, **options):
    """A fleet plan; memory in blocks, tiers in blocks, prefill in tokens per second."""
    options = {"replicas": (1, 2, 3), "routings": ("round_robin", "sticky", "prefix"), "prices": PRICES} | options
    for name in ("host_memory", "disk", "shared"):
        if name in options:
            options[name] = tuple(blocks * BLOCK for blocks in options[name])
    found = plan(
        trace,
        MODEL,
        memory=memory * BLOCK,
        strategies=["lru"],
        hardware=Hardware(decode_tokens_per_second=10),
        prefill_rate=rate,
        fleet=FleetOptions(**options),
        jobs=jobs,
    )
    assert found.fleet is not None
    return found.fleet


SPACE = {"host_memory": (0, 30, 80), "disk": (0, 150), "host_read": 1e6, "disk_read": 1e5}


def replayed(size, rate=30.0, trace=TRACE):
    """The replay of a configuration, written out."""
    tiers = [
        TierSpec(medium, size.replicas * num_bytes // BLOCK, bytes_per_second=read)
        for medium, num_bytes, read in (("host", size.host_bytes, 1e6), ("disk", size.disk_bytes, 1e5))
        if num_bytes
    ]
    timing = Timing(rate, 10.0, 256.0)
    blocks = size.replicas * size.pool_bytes // BLOCK
    return replay(trace, blocks, timing=timing, tiers=tiers, fleet=Fleet(size.replicas, size.routing))


@cache
def everything():
    """All of SPACE, as nothing in it will do."""
    return made(share=1.0, ttft_p99=1e-3, **SPACE)


def test_every_outcome_is_that_of_its_replay():
    found = everything()
    attainable = replay(TRACE, 10_000).hit_blocks
    assert found.candidates == len(found.outcomes) == (1 + 3 + 3) * 3 * 2
    for outcome in found.outcomes:
        result = replayed(outcome.size)
        assert outcome.hit_ratio == result.hit_ratio and outcome.share == result.hit_blocks / attainable
        told = (outcome.ttft_p50, outcome.ttft_p99, outcome.queueing, outcome.utilisation)
        by_percent = (result.ttft_percentile(50), result.ttft_percentile(99))
        assert told == pytest.approx((*by_percent, result.mean_queueing, result.utilisation.max()))
        assert 0 <= outcome.service_p99 <= outcome.ttft_p99 + 1e-9
        size = outcome.size
        by_hand = 2 * size.replicas + size.replicas * (size.host_bytes * 2**20 + size.disk_bytes * 2**10) / 2**30
        assert outcome.cost == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "wanted", [{"share": 0.5}, {"share": 0.9}, {"share": 0.97, "ttft_p99": 4.0}, {"ttft_p99": 3.0}]
)
def test_nothing_cheaper_will_do(wanted):
    wanted = {"share": None, "ttft_p99": None} | wanted
    found, every = made(**wanted, **SPACE), everything().outcomes

    def does(outcome):
        enough = wanted["share"] is None or outcome.share >= wanted["share"]
        return enough and (wanted["ttft_p99"] is None or outcome.ttft_p99 <= wanted["ttft_p99"])

    best = found.best
    assert best is not None and best.meets and does(best) and best == found.nearest
    assert best.cost == min(outcome.cost for outcome in every if does(outcome))
    same = [outcome for outcome in every if does(outcome) and outcome.cost == best.cost]
    assert best.ttft_p99 == min(outcome.ttft_p99 for outcome in same)
    costs = [outcome.cost for outcome in found.outcomes]
    assert costs == sorted(costs) and len(found.outcomes) < found.candidates
    # What costs more was replayed only where it shows what each fleet finds without tiers.
    assert all(outcome.cost <= best.cost or not beneath(outcome.size) for outcome in found.outcomes)
    assert found.verdict.count("It is the cheapest that gives") == 1


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing():
    assert made(share=0.9, jobs=1, **SPACE) == made(share=0.9, jobs=3, **SPACE)


def test_the_verdict_is_what_to_order():
    found = made(share=0.9, **SPACE)
    best = found.nearest
    assert found.verdict.startswith(f"{best.size.replicas} replica{'s' if best.size.replicas > 1 else ''}")
    assert beneath(best.size) in found.verdict and "of the attainable, p99 TTFT" in found.verdict
    assert "an hour" in found.verdict and "an hour" not in made(share=0.9, prices=Prices(), **SPACE).verdict


def test_without_prices_the_smallest_is_the_cheapest():
    found = made(share=0.9, prices=Prices(), **SPACE)
    sizes = [(outcome.size.replicas, outcome.size.replicas * outcome.size.host_bytes) for outcome in found.outcomes]
    assert sizes == sorted(sizes) and found.nearest.size.replicas == 1


def test_where_nothing_will_do_the_nearest_is_named_and_what_would_help():
    few = {"host_memory": (0,), "disk": (0,)}
    found = made(share=1.0, memory=30, replicas=(1,), **few)
    assert found.best is None and found.nearest == found.outcomes[0]
    assert "instead of 100%. What would help: more memory or disk: one pool needs" in found.verdict
    assert found.verdict.startswith("The one configuration that was asked for does not give 100% of the attainable. ")
    found = made(share=None, ttft_p99=1e-3, **SPACE)
    assert "What would help: a replica that computes" in found.verdict and "times as fast" in found.verdict
    crowded = dataclasses.replace(TRACE, times=TRACE.times * 0.02)
    found = made(crowded, share=None, ttft_p99=2.5, replicas=(1, 2), host_memory=(200,))
    assert found.best is None and "What would help: more replicas, as without a queue" in found.verdict
    found = made(share=1.0, replicas=(3,), routings=("round_robin",), host_memory=(0, 200))
    assert "What would help: a shared tier" in found.verdict
    assert found.verdict.startswith("None of the 2 configurations gives 100% of the attainable. Nearest comes this: ")


def test_requests_larger_than_a_pool_are_no_answer():
    found = made(share=0.01, memory=10, replicas=(1,), routings=("prefix",), host_memory=(0,))
    assert found.best is None and found.nearest.refused > 0
    largest = max(np.diff(TRACE.offsets)) + 1
    assert "larger than a pool" in found.verdict and f"a pool of at least {largest} KiB for each" in found.verdict
    found = made(share=0.01, memory=int(largest), replicas=(1,), routings=("prefix",), host_memory=(0,))
    assert found.best is not None and found.best.refused == 0


def test_a_pool_too_small_for_everybody_never_answers():
    found = made(share=0.5, ttft_p99=1.0, memory=1, replicas=(2,), routings=("prefix",))
    near = found.nearest
    assert near.refused == TRACE.num_requests and near.share == 0 and np.isnan(near.ttft_p99)
    assert "refuses 48 requests" in found.verdict and "nan" not in found.verdict and "its p99" not in found.verdict
    assert found.verdict.count("What would help: a pool of at least") == 1


def test_tiers_that_hold_everything_are_one():
    sizes = {outcome.size for outcome in made(share=1.0, ttft_p99=1e-3, disk=(0, 5000, 6000), replicas=(1,)).outcomes}
    assert {size.disk_bytes for size in sizes} == {0, 5000 * BLOCK}


def test_one_pool_is_the_curve_and_fleets_are_told_beside_it():
    found = made(share=0.1, **SPACE)
    attainable = replay(TRACE, 10_000).hit_blocks
    assert found.one_pool == tuple(replay(TRACE, 40 * number).hit_blocks / attainable for number in (1, 2, 3))
    asked = {(each.size.replicas, each.size.routing) for each in found.outcomes if not beneath(each.size)}
    assert asked == {(1, "round_robin"), *product((2, 3), ("round_robin", "sticky", "prefix"))}


def test_a_shared_tier_is_paid_once_and_serves_all():
    found = made(share=0.99, replicas=(3,), routings=("round_robin",), shared=(0, 200), shared_read=1e6)
    best = found.best
    assert best is not None and best.cost == pytest.approx(6 + 200 * BLOCK * 2**20 / 2**30)
    assert beneath(best.size) == "200 KiB shared" and best.share > 0.99 > found.outcomes[0].share


def test_traffic_without_reuse_is_planned_for_its_time():
    trace = as_trace([[2 * block, 2 * block + 1] for block in range(30)])
    trace = dataclasses.replace(trace, times=np.arange(30, dtype=np.float64))
    found = made(trace, share=0.9, ttft_p99=60.0, replicas=(1, 2))
    assert found.best is not None and found.best.share == 1.0 and found.best.hit_ratio == 0.0


def test_what_lies_beneath_is_told_in_words():
    gib = 2**30
    assert beneath(FleetSize(1, "prefix", gib)) == ""
    assert beneath(FleetSize(1, "prefix", gib, 2 * gib)) == "2 GiB RAM"
    assert (
        beneath(FleetSize(2, "prefix", gib, 2 * gib, 3 * gib, 4 * gib)) == "2 GiB RAM + 3 GiB disk each, 4 GiB shared"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": ()}, "replicas: expected at least one"),
        ({"replicas": (0,)}, "replicas: expected"),
        ({"share": 0.0}, "share: expected"),
        ({"share": None}, "share: expected a share of the attainable, a ttft_p99, or both"),
        ({"ttft_p99": 0.0}, "ttft_p99: expected"),
        ({"host_read": 0.0}, "host_read: expected"),
        ({"disk": (-1,)}, "disk: expected"),
        ({"replicas": tuple(range(1, 600)), "routings": ("prefix",)}, "at most 500 configurations in all, got 599"),
        ({"routings": ("no-such",)}, "no-such"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidOperation, match=message):
        made(**options)


def test_prices_and_memories_out_of_range_are_refused():
    with pytest.raises(InvalidOperation, match="gib_hour"):
        Prices(gib_hour=-1.0)
    with pytest.raises(InvalidOperation, match="host_memory: expected 0, or at least a block of 1 KiB, got 1"):
        plan(TRACE, MODEL, memory=BLOCK * 50, strategies=["lru"], fleet=FleetOptions((1,), host_memory=(1,)))
    with pytest.raises(InvalidOperation, match="memory: expected that of one replica"):
        plan(TRACE, MODEL, strategies=["lru"], fleet=FleetOptions((1,)))
