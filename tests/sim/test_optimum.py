from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from tests.sim import oracles
from tests.sim.traces import AGENTS, CHAT, Requests, as_requests, as_trace, chained_requests, chained_traces, real_trace

from pagedkv.errors import InvalidOperation
from pagedkv.sim.curves import lru_curve
from pagedkv.sim.optimum import optimal, optimal_curve
from pagedkv.sim.trace import Trace

Oracle = Callable[[Requests, int], list[int]]

STRATEGIES = [oracles.naive_lru, oracles.naive_leaf_lru, oracles.naive_fifo, oracles.naive_lfu]


@given(chained_traces())
def test_every_request_has_the_hits_of_belady(trace: Trace) -> None:
    requests = as_requests(trace)
    for capacity in range(1, trace.num_distinct + 2):
        result = optimal(trace, capacity)
        assert result.hits.tolist() == oracles.naive_belady(requests, capacity)
        assert result.hit_blocks == sum(result.hits)
        assert result.hit_blocks == oracles.plain_belady(requests, capacity)


@given(chained_requests(max_requests=5, max_fresh=3))
def test_no_choice_of_what_to_keep_has_more_hits(requests: Requests) -> None:
    trace = as_trace(requests)
    for capacity in range(1, min(4, trace.num_distinct) + 1):
        assert optimal(trace, capacity).hit_blocks == oracles.exhaustive_optimum(requests, capacity)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(trace=chained_traces())
@settings(max_examples=40)
def test_no_strategy_has_more_hits(strategy: Oracle, trace: Trace) -> None:
    requests = as_requests(trace)
    for capacity in range(1, trace.num_distinct + 1):
        assert optimal(trace, capacity).hit_blocks >= sum(strategy(requests, capacity))


@given(chained_traces())
def test_the_curve_is_the_optimum_at_every_capacity(trace: Trace) -> None:
    capacities = range(trace.num_distinct + 2)
    curve = optimal_curve(trace, capacities)
    assert curve.blocks.tolist() == list(capacities)
    for capacity in capacities[1:]:
        result = optimal(trace, capacity)
        assert (curve.hit_blocks[capacity], curve.hit_tokens[capacity]) == (result.hit_blocks, result.hit_tokens)
    assert (np.diff(curve.hit_blocks) >= 0).all()
    assert curve.hit_blocks[0] == 0


@given(chained_traces())
def test_the_last_point_is_the_least_capacity_that_finds_everything(trace: Trace) -> None:
    curve = optimal_curve(trace, [])
    everything = trace.num_accesses - trace.num_distinct
    enough = int(curve.blocks[-1])
    assert curve.hit_blocks[-1] == everything
    if enough > 1:
        assert optimal(trace, enough - 1).hit_blocks < everything


@pytest.mark.parametrize("name", [CHAT, AGENTS])
def test_real_traffic(name: str) -> None:
    trace = real_trace(name)
    capacities = np.unique(np.geomspace(1, trace.num_distinct, 50).astype(np.int64))
    best, lru = optimal_curve(trace, capacities.tolist()), lru_curve(trace)
    assert (best.at(capacities) >= lru.at(capacities)).all()
    assert (np.diff(best.hit_blocks) >= 0).all()
    assert best.attainable == lru.attainable


def test_real_requests_against_the_oracle() -> None:
    trace = real_trace(CHAT).slice(0, 600)
    for capacity in (50, 500):
        assert optimal(trace, capacity).hits.tolist() == oracles.naive_belady(as_requests(trace), capacity)


def test_what_a_result_says() -> None:
    trace = as_trace([[0, 1], [2], [0, 1], [2]], block_tokens=4, input_tokens=[7, 4, 7, 4])
    result = optimal(trace, 2)
    assert (result.strategy, result.blocks, result.requests, result.accesses) == ("optimal", 2, 4, 6)
    assert result.hits.tolist() == [0, 0, 2, 0]
    assert (result.hit_blocks, result.hit_tokens, result.tokens) == (2, 7, 22)
    assert result.reclaimed == 2


@pytest.mark.parametrize(("blocks", "reclaimed"), [(1, 1), (2, 2), (3, 2), (4, 1), (5, 0), (9, 0)])
def test_what_does_not_fit_is_not_reclaimed(blocks: int, reclaimed: int) -> None:
    trace = as_trace([[0, 1, 2], [3, 4], [0, 1, 2]])
    assert optimal(trace, blocks).reclaimed == reclaimed


def test_a_trace_without_requests() -> None:
    result = optimal(as_trace([]), 3)
    assert (result.hit_ratio, result.reclaimed, result.hits.tolist()) == (0.0, 0, [])
    assert optimal_curve(as_trace([]), [5]).hit_blocks.tolist() == [0, 0]


@pytest.mark.parametrize("blocks", [0, -1, 2.5, True, 2**31])
def test_capacities_that_cannot_be(blocks: int) -> None:
    with pytest.raises(InvalidOperation, match="blocks"):
        optimal(as_trace([[0]]), blocks)


def test_curve_capacities_that_cannot_be() -> None:
    with pytest.raises(InvalidOperation, match="capacities"):
        optimal_curve(as_trace([[0]]), [3, -1])


def test_lengths_alone_have_no_optimum() -> None:
    trace = replace(as_trace([[0]]), has_content=False)
    with pytest.raises(InvalidOperation, match="lengths only"):
        optimal(trace, 1)
    with pytest.raises(InvalidOperation, match="lengths only"):
        optimal_curve(trace, [1])
