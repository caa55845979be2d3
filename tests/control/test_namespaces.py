"""Numbers for salts: used again once nothing belongs to them, and never while something does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import BlockManager
from pagedkv.control.prefix import name_of


def test_numbers_are_recycled():
    manager = BlockManager(4, 1)
    for turn in range(1000):
        manager.allocate(turn, [1, 2], cache_salt=f"salt {turn}")
        manager.commit(turn)
        manager.free(turn)
    assert len(manager._state.roots) <= 32
    manager.check()


@pytest.mark.parametrize("length", [0, 40, 64, 1000])
def test_salts_that_differ_in_their_last_letter_are_two(length):
    one, other = "x" * length + "a", "x" * length + "b"
    manager = BlockManager(8, 1)
    manager.allocate(1, [1, 2, 3], cache_salt=one)
    manager.commit(1)
    assert manager.match_prefix([1, 2, 3], one) == 2 and manager.match_prefix([1, 2, 3], other) == 0
    assert manager.allocate(2, [1, 2, 3], cache_salt=other).num_cached_tokens == 0
    assert manager.allocate(3, [1, 2, 3], cache_salt=one).num_cached_tokens == 2
    assert name_of(one) != name_of(other)


@pytest.mark.parametrize("length", [1, 40, 64, 1000])
def test_a_salt_that_goes_on_where_another_ends_is_another(length):
    manager = BlockManager(8, 1)
    manager.allocate(1, [1, 2, 3], cache_salt="x" * length)
    manager.commit(1)
    assert manager.allocate(2, [1, 2, 3], cache_salt="x" * length + "b").num_cached_tokens == 0


def test_a_salt_in_use_keeps_its_number():
    manager = BlockManager(400, 1)
    manager.allocate(0, [7, 8], cache_salt="kept by a sequence")
    manager.allocate(1, [5, 6], cache_salt="kept by a cached block")
    manager.commit(1)
    manager.free(1)
    for turn in range(2, 300):
        manager.allocate(turn, [7, 8], cache_salt=f"salt {turn}")
        manager.free(turn)
    manager.commit(0)
    assert manager.match_prefix([7, 8, 9], "kept by a sequence") == 2
    assert manager.match_prefix([5, 6, 9], "kept by a cached block") == 2
    assert manager.match_prefix([7, 8, 9]) == 0
    manager.check()


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=120))
def test_no_salt_sees_the_blocks_of_another(steps):
    manager = BlockManager(20, 1)
    written = set()
    for turn, (number, keeps) in enumerate(steps):
        salt = f"s{number}"
        if manager.match_prefix([number, 1], salt):
            assert salt in written
        assert manager.match_prefix([number + 1, 1], salt) == 0
        info = manager.allocate(turn, [number, 1], cache_salt=salt)
        assert info.num_cached_tokens == 0 or salt in written
        if keeps:
            manager.commit(turn)
            written.add(salt)
        manager.free(turn)
    manager.check()
