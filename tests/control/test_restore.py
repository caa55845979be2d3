"""Books that are filled from records are those of the pool that the records tell of."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.test_strategy_contract import STRATEGIES

from pagedkv import BlockManager, InvalidOperation
from pagedkv.control.restore import NO_BLOCK, NO_PARENT, BlockRecords, records_of, restore_blocks

SALTS = ["", "a", "b"]


def filled(num_blocks=40, block_size=2, seed=0, strategy="lru", turns=60):
    manager, texts = BlockManager(num_blocks, block_size, strategy=strategy, whole_hits=True), []
    rng = np.random.default_rng(seed)
    for turn in range(turns):
        text = rng.integers(0, 2, rng.integers(1, 14)).tolist(), SALTS[rng.integers(0, 3)]
        manager.allocate(turn, text[0], cache_salt=text[1])
        manager.commit(turn)
        manager.free(turn)
        texts.append(text)
    return manager, texts


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_books_find_what_they_found_before(strategy):
    old, texts = filled(strategy=copy.deepcopy(strategy))
    new = BlockManager(40, 2, strategy=copy.deepcopy(strategy), whole_hits=True)
    found = restore_blocks(new, *records_of(old))
    new.check()
    assert found.sum() == new.cached_block_count == old.cached_block_count > 10
    for ids, salt in texts:
        assert new.match_prefix(ids, salt) == old.match_prefix(ids, salt)
    assert any(new.match_prefix(ids, salt) for ids, salt in texts)
    for turn in range(60):  # and they work on
        new.allocate(turn, [turn, 1, 2, 3, 4], cache_salt="a")
        new.commit(turn)
        new.check()
        new.free(turn)
    new.check()


def test_the_least_recently_used_goes_first_as_it_would_have():
    old, _ = filled(turns=30)
    new = BlockManager(40, 2, whole_hits=True)
    restore_blocks(new, *records_of(old))
    gone = {manager: [] for manager in (old, new)}
    for manager, removed in gone.items():
        manager.subscribe(lambda event, removed=removed: removed.append(event) if "Removed" in repr(event) else None)
        manager.allocate(1000, 80)
        manager.check()
    assert len(gone[old]) > 30
    assert [event.block_id for event in gone[new]] == [event.block_id for event in gone[old]]


def test_the_records_are_those_of_the_findable_blocks():
    books = BlockManager(6, 2, whole_hits=True)
    assert (records_of(books)[0].parents == NO_BLOCK).all() and records_of(books)[1] == []
    for turn, (ids, salt) in enumerate([([1, 2, 3, 4], "b"), ([1, 2, 5, 6], "b"), ([1, 2], "a"), ([7], "a")]):
        books.allocate(turn, ids, cache_salt=salt)
        books.commit(turn)
        books.free(turn)
    records, salts = records_of(books)
    assert salts == ["b", "a"]
    assert records.parents.tolist() == [NO_PARENT, 0, 0, NO_PARENT, NO_BLOCK, NO_BLOCK]
    assert records.salts[[0, 3]].tolist() == [0, 1]
    assert records.token_ids[:4].tolist() == [[1, 2], [3, 4], [5, 6], [1, 2]]
    assert records.access_counts[:4].tolist() == [2, 1, 1, 1]
    assert np.argsort(records.last_access[:4], kind="stable").tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("strategy", ["lru", "fifo", "sieve", "s3fifo"])
def test_strategies_see_blocks_in_the_order_of_their_last_use(strategy):
    books, ones, removed = BlockManager(3, 1, strategy=strategy, whole_hits=True), np.ones(3, np.int32), []
    ids, ticks = np.arange(3, dtype=np.int64)[:, None], np.array([5, 3, 4], np.int64)
    restore_blocks(books, BlockRecords(NO_PARENT * ones, 0 * ones, ids, ticks, ones), [""])
    books.subscribe(removed.append)
    books.allocate(1, 3)
    assert [event.block_id for event in removed] == [1, 2, 0]


def test_free_blocks_among_restored_ones_are_taken_in_order():
    books, ones = BlockManager(5, 1, whole_hits=True), np.ones(5, np.int32)
    parents = np.array([NO_BLOCK, NO_BLOCK, NO_PARENT, NO_BLOCK, NO_BLOCK], np.int32)
    restore_blocks(
        books, BlockRecords(parents, 0 * ones, np.zeros((5, 1), np.int64), np.zeros(5, np.int64), ones), [""]
    )
    assert books.allocate(1, 4).block_ids == (0, 1, 3, 4)


def test_a_chain_with_a_gap_is_lost_from_the_gap_on():
    parents = np.array([NO_PARENT, 0, NO_BLOCK, 2, 1], np.int32)
    ids = np.arange(5, dtype=np.int64)[:, None]
    books = BlockManager(5, 1, whole_hits=True)
    zeros = np.zeros(5, np.int32)
    found = restore_blocks(books, BlockRecords(parents, zeros, ids, np.zeros(5, np.int64), zeros + 1), [""])
    books.check()
    assert found.tolist() == [True, True, False, False, True]
    assert books.match_prefix([0, 1, 4]) == 3


def test_of_two_that_hold_the_same_one_stays():
    parents = np.array([NO_PARENT, NO_PARENT, 0, 1, 3], np.int32)
    ids = np.array([7, 7, 8, 8, 9], np.int64)[:, None]
    books = BlockManager(5, 1, whole_hits=True)
    zeros = np.zeros(5, np.int32)
    restore_blocks(books, BlockRecords(parents, zeros, ids, np.zeros(5, np.int64), zeros + 1), ["s"])
    books.check()
    assert books.cached_block_count == 2
    assert books.match_prefix([7, 8], "s") == 2 and books.match_prefix([7, 8]) == 0


@settings(max_examples=60)
@given(data=st.data(), num_blocks=st.integers(1, 12))
def test_any_records_make_sound_books(data, num_blocks):
    parents = data.draw(st.lists(st.integers(NO_BLOCK, num_blocks - 1), min_size=num_blocks, max_size=num_blocks))
    ids = data.draw(st.lists(st.integers(0, 1), min_size=num_blocks, max_size=num_blocks))
    ticks = data.draw(st.lists(st.integers(0, 9), min_size=num_blocks, max_size=num_blocks))
    books = BlockManager(num_blocks, 1, whole_hits=True)
    zeros = np.zeros(num_blocks, np.int32)
    records = BlockRecords(
        np.array(parents, np.int32), zeros, np.array(ids, np.int64)[:, None], np.array(ticks, np.int64), zeros
    )
    found = restore_blocks(books, records, [""])
    books.check()
    assert books.cached_block_count == found.sum()
    for block in np.flatnonzero(found):  # whole chains and nothing else
        assert parents[block] == NO_PARENT or found[parents[block]]
    books.allocate(1, [5] * num_blocks)
    books.commit(1)
    books.check()


def test_a_pool_that_was_used_is_refused():
    books = BlockManager(2, 1)
    zeros = np.zeros(2, np.int32)
    records = BlockRecords(zeros + NO_BLOCK, zeros, np.zeros((2, 1), np.int64), np.zeros(2, np.int64), zeros)
    books.allocate(1, 1)
    books.free(1)
    with pytest.raises(InvalidOperation, match="never used"):
        restore_blocks(books, records, [""])
    with pytest.raises(InvalidOperation, match=r"records.parents: expected shape \(3,\), got \(2,\)"):
        restore_blocks(BlockManager(3, 1), records, [""])
    with pytest.raises(InvalidOperation, match="records.salts: expected numbers of 0 salts"):
        restore_blocks(BlockManager(2, 1), records._replace(parents=zeros + NO_PARENT), [])
    with pytest.raises(InvalidOperation, match="records.parents: expected blocks below 2"):
        restore_blocks(BlockManager(2, 1), records._replace(parents=zeros + 2), [""])


def test_whole_hits_find_whole_blocks_and_nothing_else():
    whole, usual = BlockManager(8, 4, whole_hits=True), BlockManager(8, 4)
    for books in (whole, usual):
        books.allocate(1, list(range(8)))
        books.commit(1)
        books.free(1)
    assert whole.match_prefix(list(range(8))) == 8 and usual.match_prefix(list(range(8))) == 7
    assert whole.match_prefix([0, 1, 2, 3, 4, 5]) == 4 and usual.match_prefix([0, 1, 2, 3, 4, 5]) == 5
    assert whole.allocate(2, list(range(8))).num_cached_tokens == 8
    whole.commit(2)
    whole.free(2)
    whole.check()
    with pytest.raises(InvalidOperation, match="whole_hits: expected a bool"):
        BlockManager(8, whole_hits=1)
