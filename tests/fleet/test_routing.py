"""The order that each policy gives, by hand, and what is no policy."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import InvalidOperation
from pagedkv.fleet import (
    Candidates,
    LeastLoad,
    PrefixLoad,
    RoundRobin,
    RoutingRequest,
    StickySession,
    parse_routing,
    route,
    routing_names,
)
from pagedkv.fleet.routing import RecentLoad


def candidates(load, matched=None, queue=None):
    """One tier unless `matched` has rows of several."""
    matched = np.array([0] * len(load) if matched is None else matched, np.int64).reshape(len(load), -1)
    return Candidates(matched, np.array(load, np.float64), np.array(queue or [0] * len(load), np.int64))


def order(policy, *given, number=0, tokens=0, home=-1, **more):
    return route(policy, RoutingRequest(number, tokens, home), candidates(*given, **more))


def test_round_robin_takes_turns_whatever_else_there_is():
    given = [5, 0, 9]
    orders = [order(RoundRobin(), given, number=number) for number in range(4)]
    assert orders == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_least_load_asks_for_the_shortest_queue_first():
    assert order(LeastLoad(), [5, 0, 9, 0]) == [1, 3, 0, 2]
    assert order(LeastLoad(), [5, 0, 9], queue=[1, 2, 1]) == [0, 2, 1]


def test_a_conversation_stays_at_home_however_busy_it_is():
    assert order(StickySession(), [5, 0, 9], home=2, queue=[0, 0, 50]) == [2, 1, 0]
    assert order(StickySession(), [5, 0, 9]) == [1, 0, 2]


def test_the_longest_prefix_goes_first_and_the_least_load_among_equals():
    assert order(PrefixLoad(), [5, 6, 4, 4], matched=[16, 32, 16, 0], tokens=8) == [1, 2, 0, 3]


def test_a_candidate_with_too_much_load_is_passed_over():
    busy, matched = [100, 20, 0], [64, 16, 0]
    assert order(PrefixLoad(), busy, matched=matched, tokens=8) == [1, 2, 0]
    assert order(PrefixLoad(), busy, matched=matched, tokens=50) == [0, 1, 2], "the prompt itself is allowed for"
    assert order(PrefixLoad(overload=3), busy, matched=matched, tokens=8) == [0, 1, 2]
    assert order(PrefixLoad(), [100, 99, 0, 0], matched=[64, 80, 0, 0]) == [2, 3, 1, 0], "the others by load alone"


def test_among_equal_prefixes_the_faster_tier_goes_first():
    assert order(PrefixLoad(), [0, 0, 9], matched=[[0, 32], [16, 16], [32, 0]], tokens=64) == [2, 1, 0]
    assert order(PrefixLoad(), [0, 0], matched=[[0, 48], [32, 0]], tokens=64) == [0, 1]


def test_one_candidate_is_the_answer_of_every_policy():
    for name in routing_names():
        assert order(parse_routing(name), [7.0], matched=[16], number=5, home=0) == [0]


def test_policies_have_names_and_are_made_by_them():
    for name in routing_names():
        assert str(parse_routing(name)) == name and parse_routing(f" {name.upper()} ") == parse_routing(name)
    assert parse_routing("least-load") == LeastLoad()
    policy = PrefixLoad(2.0)
    assert parse_routing(policy) is policy


@pytest.mark.parametrize(
    "given", ["", "fastest", "prefix:", 7, None, PrefixLoad, "json:loads", "no.such:Thing", "math:pi"]
)
def test_what_is_no_policy(given):
    with pytest.raises(InvalidOperation, match="routing"):
        parse_routing(given)


@pytest.mark.parametrize("overload", [0.9, float("nan"), "much"])
def test_an_overload_below_the_mean_is_refused(overload):
    with pytest.raises(InvalidOperation, match="overload"):
        PrefixLoad(overload)


@pytest.mark.parametrize("given", [[], [0], [0, 0], [0, 2], [-1, 0], [0.0, 1.0], [[0, 1]], None, "ab"])
def test_an_order_that_is_none_is_refused(given):
    class Own:
        def order(self, request, candidates):
            return given

    with pytest.raises(InvalidOperation, match="routing: expected each of 0 … 1 once"):
        order(Own(), [0, 0])


def test_work_of_long_ago_counts_less():
    load, both = RecentLoad(memory=0.5), [0, 1]
    assert load.of(both).tolist() == [0, 0]
    load.add(0, 100)
    load.add(1, 10)
    seen = load.of(both)
    load.add(1, 10)
    assert seen.tolist() == [50, 10] and load.of(both).tolist() == [25, 15]
