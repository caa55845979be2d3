"""Whole or not at all: public calls interrupted at their lines, and by strategies that fail."""

from __future__ import annotations

import pytest
from tests.contracts.interrupts import CALLS, TENSOR_CALLS, Case, full, made, require_whole_or_not_at_all

from pagedkv import LRU, BlockManager, PagedKvCache


@pytest.mark.parametrize("name", CALLS | TENSOR_CALLS)
def test_a_call_that_is_interrupted_has_happened_as_a_whole_or_not_at_all(name):
    """A line in 17 of every call; the whole is marked slow."""
    assert require_whole_or_not_at_all(PagedKvCache, name, step=17, start=1 + 5 * len(name) % 17) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BlockManager, PagedKvCache])
@pytest.mark.parametrize("name", CALLS | TENSOR_CALLS)
def test_a_call_is_interrupted_at_every_line(kind, name):
    if kind is BlockManager and name in TENSOR_CALLS:
        pytest.skip("a BlockManager has no tensors")
    assert require_whole_or_not_at_all(kind, name) > 1


class Failing(LRU):
    """Fails when it is asked for the n-th time, once it is told to."""

    def __init__(self):
        self.__dict__["left"] = 10**9

    def _ask(self):
        self.__dict__["left"] -= 1
        if self.left < 0:
            raise ZeroDivisionError

    def score_sequences(self, sequences, now):
        self._ask()
        return sequences.last_access

    def score_blocks(self, blocks, now):
        self._ask()
        return blocks.last_access


@pytest.mark.parametrize("left", range(4))
@pytest.mark.parametrize(
    "call", [lambda cache: cache.evict_to_threshold(0.1), lambda cache: cache.evict(), lambda cache: cache.free(2)]
)
def test_a_strategy_that_fails_in_the_middle_changes_nothing(call, left):
    strategy = Failing()
    case = Case(BlockManager, {"strategy": strategy}, full, lambda case: call(case.cache))
    before = case.state()
    strategy.__dict__["left"] = left
    try:
        case.call()
    except ZeroDivisionError:
        assert case.state() == before
    strategy.__dict__["left"] = 10**9
    case.require_whole()


def test_a_subscriber_that_fails_in_the_middle_hears_the_rest():
    case = made(PagedKvCache, "clear_prefix_cache")
    heard = []

    def fail(event):
        heard.append(event)
        raise ZeroDivisionError

    case.cache.subscribe(fail)
    case.fill(9, [5, 6, 7, 8])
    case.call()
    case.require_whole()
    assert len(heard) == 3


def test_an_event_whose_delivery_was_interrupted_comes_again():
    cache = BlockManager(8, 2)
    heard = []

    def stop_once(event):
        heard.append(event)
        if len(heard) == 1:
            raise KeyboardInterrupt

    cache.subscribe(stop_once)
    cache.allocate(1, [1, 2, 3, 4])
    with pytest.raises(KeyboardInterrupt):
        cache.commit(1)
    cache.check()
    assert [event.block_id for event in heard] == [0, 0, 1]
