"""What becomes findable, and when: commits of some first tokens, of many sequences, and of what was computed again."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import BlockManager, BlockNotFound, BlockStored, InvalidOperation, OutOfMemory, SequenceNotFound

TEXT = list(range(10, 22))


def manager(**options):
    return BlockManager(8, 4, **options)


def test_only_the_first_tokens_become_findable():
    books = manager()
    books.allocate(1, TEXT)
    books.commit(1, upto=7)
    assert books.get_sequence(1).num_committed_tokens == 7
    assert books.match_prefix([*TEXT, 0]) == 4
    assert books.plan([1]).positions.tolist() == [7, 8, 9, 10, 11]
    books.commit(1, upto=3)  # what was committed stays so
    assert books.get_sequence(1).num_committed_tokens == 7
    books.commit(1)
    assert books.match_prefix([*TEXT, 0]) == 12
    books.check()


def test_many_sequences_are_committed_with_a_length_for_each():
    books = manager()
    books.allocate(1, TEXT[:6])
    books.allocate(2, TEXT[6:])
    books.commit([2, 1], upto=np.array([5, 6]))
    assert [books.get_sequence(s).num_committed_tokens for s in (1, 2)] == [6, 5]
    books.commit([1, 2])
    assert books.get_sequence(2).num_committed_tokens == 6
    books.commit([])


def test_a_plan_is_committed_up_to_what_was_accepted():
    books = manager()
    books.allocate(1, TEXT[:3])
    books.commit(1)
    plan = books.append_batch([1], [TEXT[3:9]])
    books.commit(plan, upto=[5])
    books.truncate(1, 5)
    assert books.get_sequence(1).num_committed_tokens == 5
    assert books.match_prefix(TEXT) == 4
    books.check()


@pytest.mark.parametrize(
    ("upto", "reason"),
    [
        (13, "upto: expected at most the 12 tokens of S1, got 13"),
        ([3, 3], "upto: expected one entry for each of 1 sequences, got 2"),
        (-1, "upto: expected an int of at least 0, got -1"),
        (3.0, "upto: expected an int, got 3.0"),
        ([3.0], "upto: expected ints in 1 dimension, got float64 of shape (1,)"),
    ],
)
def test_a_length_that_no_sequence_has_commits_nothing(upto, reason):
    books = manager()
    books.allocate(1, TEXT)
    for given in (1, [1], books.plan([1])):
        with pytest.raises(InvalidOperation) as caught:
            books.commit(given, upto=upto)
        assert (caught.value.reason, caught.value.argument) == (reason, "upto")
    assert books.get_sequence(1).num_committed_tokens == 0


def test_a_batch_with_a_wrong_sequence_commits_nothing():
    books = manager()
    books.allocate(1, TEXT)
    with pytest.raises(SequenceNotFound):
        books.commit([1, 2], upto=4)
    with pytest.raises(InvalidOperation, match="S1 twice|once"):
        books.commit([1, 1])
    plan = books.append_batch([1], [[1]])
    with pytest.raises(InvalidOperation, match="at most the 13 tokens of S1, got 14"):
        books.commit(plan, upto=14)
    assert books.get_sequence(1).num_committed_tokens == 0


def test_what_is_computed_again_is_found_by_others():
    books = manager()
    books.allocate(1, TEXT)
    books.commit(1)
    books.free(1)
    found = books.matching_block_ids([*TEXT, 0])
    assert len(found) == 3
    info = books.allocate(2, [*TEXT, 0], reuse=False)
    assert info.num_cached_tokens == 0 and not set(info.block_ids) & set(found)
    assert books.plan([2]).total_tokens == 13
    assert books.stats.prefix_queries == 1  # no lookup was made
    books.commit(2)
    assert books.get_sequence(2).block_ids[:3] == found  # equal blocks are stored once
    assert books.allocate(3, [*TEXT, 1]).num_cached_tokens == 12
    books.check()


def test_what_is_computed_without_reuse_is_published_first():
    books, heard = manager(), []
    books.subscribe(heard.append)
    books.allocate(1, TEXT, reuse=False)
    books.commit(1)
    assert [type(event) for event in heard] == [BlockStored] * 3
    assert books.allocate(2, [*TEXT, 1]).num_cached_tokens == 12


@pytest.mark.parametrize("strategy", ["lru", "s3fifo", "adaptive"])
def test_without_reuse_a_cached_prefix_makes_room_for_its_own_text(strategy):
    books = BlockManager(4, 4, strategy=strategy)
    books.allocate(1, TEXT)
    books.commit(1)
    books.free(1)
    assert books.cached_block_count == 3
    with pytest.raises(OutOfMemory):
        books.allocate(2, list(range(17)), reuse=False)
    books.allocate(2, [*TEXT, 1, 2, 3, 4], reuse=False)
    assert books.cached_block_count == 0 and books.used_block_count == 4
    books.commit(2)
    books.check()


def test_reuse_is_a_flag():
    with pytest.raises(InvalidOperation, match="reuse: expected a bool, got 1"):
        manager().allocate(1, TEXT, reuse=1)


# Blocks by their ids: what would be shared, and forgetting one.


def test_the_blocks_that_an_allocation_would_share_are_named():
    books = manager()
    books.allocate(1, TEXT)
    books.commit(1)
    held = books.get_sequence(1).block_ids
    assert books.matching_block_ids(TEXT) == held[:2]  # the last token is left to compute
    assert books.matching_block_ids([*TEXT, 1]) == held
    assert books.matching_block_ids(TEXT[:6]) == held[:1]  # the rest is a part of a block, and would be copied
    assert books.matching_block_ids([*TEXT, 1], "another tenant") == ()
    assert books.matching_block_ids([]) == ()
    assert BlockManager(8, 4, prefix_caching=False).matching_block_ids(TEXT) == ()
    with pytest.raises(InvalidOperation, match="token_ids: expected token ids, got 12"):
        books.matching_block_ids(12)


def test_a_chain_is_evicted_from_its_tail():
    books = manager()
    books.allocate(1, TEXT)
    books.commit(1)
    books.free(1)
    blocks = books.matching_block_ids([*TEXT, 1])
    for block in reversed(blocks[1:]):
        books.evict_block(block)
        books.check()
    assert books.matching_block_ids([*TEXT, 1]) == blocks[:1]
    assert (books.cached_block_count, books.free_block_count) == (1, 8)
    assert books.stats.blocks_reclaimed == 2


def test_a_block_that_is_no_cached_leaf_is_not_evicted():
    books = manager()
    books.allocate(1, TEXT)
    books.commit(1)
    first, second, last = books.get_sequence(1).block_ids

    def refused(block, pattern):
        with pytest.raises(InvalidOperation, match=pattern) as caught:
            books.evict_block(block)
        assert caught.value.argument == "block_id"

    refused(last, f"block_id: expected a cached block .*, got {last}, which 1 sequences hold")
    books.pin(1, 12)
    books.free(1)
    refused(last, "which is pinned")
    books.unpin(1)
    refused(first, "which 1 cached blocks continue")
    refused(7, "B7, which is free")
    books.evict_block(last)
    refused(last, "which is free")
    books.evict_block(second)
    books.check()


@pytest.mark.parametrize("strategy", ["lru", "lfu", "s3fifo", "sieve", "gdsf", "adaptive", "ttl", "fifo"])
def test_every_strategy_goes_on_after_a_block_was_evicted(strategy):
    books, heard = BlockManager(8, 2, strategy=strategy), []
    books.subscribe(heard.append)
    for seq_id, first in enumerate([1, 2, 3, 1, 2, 4, 5, 1]):
        books.allocate(seq_id, [first, 0, first, 1, 9])
        books.commit(seq_id)
        books.free(seq_id)
        books.evict_block(books.matching_block_ids([first, 0, first, 1, 9])[-1])
        assert len(books.matching_block_ids([first, 0, first, 1, 9])) == 1
        books.check()
    books.allocate(99, 16)
    books.check()


def test_ids_of_blocks_and_numbers_of_prefixes_are_checked():
    books = manager()
    with pytest.raises(BlockNotFound):
        books.block_records([8])
    with pytest.raises(InvalidOperation, match="block_ids: expected ints in 1 dimension, got float64"):
        books.block_records(np.array([0.0]))
    with pytest.raises(InvalidOperation, match="limit: expected an int, got 2.5"):
        books.hottest_prefixes(2.5)
    assert len(books.block_records([0, 7])) == 2 and len(books.block_records([])) == 0
