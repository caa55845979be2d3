"""The exact prefix index, against a naive one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import BlockManager
from pagedkv.control.prefix import MAX_SIBLINGS


def committed(manager, seq_id, ids, **options):
    manager.allocate(seq_id, ids, **options)
    manager.commit(seq_id)


def test_partial_match_takes_the_child_with_the_longest_common_start():
    manager = BlockManager(16, 4)
    for seq_id, tail in enumerate(([9, 1, 1, 1], [5, 6, 7, 1], [5, 6, 1, 1], [5, 1, 1, 1])):
        committed(manager, seq_id, [1, 2, 3, 4, *tail])
    assert manager.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 7
    before = manager.stats
    assert manager.allocate(9, [1, 2, 3, 4, 5, 6, 7, 8, 9]).num_cached_tokens == 7
    after = manager.stats
    assert after.partial_hit_tokens - before.partial_hit_tokens == 3
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == 4
    assert after.prefix_hits - before.prefix_hits == after.prefix_queries - before.prefix_queries == 1


def test_partial_match_makes_a_copy():
    manager = BlockManager(16, 4)
    committed(manager, 1, [1, 2, 3, 4])
    source = manager.get_sequence(1).block_ids[0]
    info = manager.allocate(2, [1, 2, 9])
    assert info.num_cached_tokens == 2 and info.block_ids[0] != source
    assert manager.plan([2]).copies.tolist() == [[source, info.block_ids[0]]]
    assert len(manager.plan([2]).copies) == 0, "a copy is asked for once"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_exact_multiples_leave_the_last_token(size, blocks):
    manager = BlockManager(16, size)
    ids = list(range(size * blocks))
    committed(manager, 1, ids)
    assert manager.match_prefix(ids) == len(ids) - 1
    assert manager.match_prefix([*ids, 0]) == len(ids)
    assert manager.allocate(2, ids).num_cached_tokens == len(ids) - 1
    manager.check()


def test_no_more_than_so_many_siblings_are_looked_at():
    manager = BlockManager(MAX_SIBLINGS + 10, 2)
    for first in range(MAX_SIBLINGS + 1):
        committed(manager, first, [first, 0])
    assert manager.match_prefix([0, 1]) == 0, "the oldest is out of sight"
    assert manager.match_prefix([1, 1]) == 1
    assert manager.match_prefix([0, 0, 5]) == 2, "a full match is always found"


def test_equal_prefixes_are_stored_once():
    manager = BlockManager(16, 2)
    for seq_id in range(4):
        manager.allocate(seq_id, [1, 2, 3, 4])
    assert manager.used_block_count == 8
    for seq_id in range(4):
        manager.commit(seq_id)
    assert manager.used_block_count == 2
    assert len({manager.get_sequence(seq_id).block_ids for seq_id in range(4)}) == 1
    manager.check()


def test_a_duplicate_that_forks_share_waits_for_its_last_owner():
    manager = BlockManager(16, 2)
    manager.allocate(1, [1, 2, 3])
    manager.fork(1, 2)
    committed(manager, 3, [1, 2])
    manager.commit(1)
    manager.commit(2)
    assert manager.get_sequence(1).block_ids == manager.get_sequence(2).block_ids
    manager.check()
    manager.free(2)
    manager.commit(1)
    assert manager.get_sequence(1).block_ids[0] == manager.get_sequence(3).block_ids[0]
    manager.check()


def test_without_prefix_caching_nothing_is_kept():
    manager = BlockManager(4, 2, prefix_caching=False)
    committed(manager, 1, [1, 2, 3, 4])
    manager.free(1)
    assert manager.match_prefix([1, 2, 3]) == 0 and manager.cached_block_count == 0
    assert manager.allocate(1, [1, 2, 3]).num_cached_tokens == 0 and manager.stats.prefix_queries == 0


def naive_match(stored, ids, size):
    """The longest start of `ids` that some stored chain of full blocks has, the last token left out."""
    usable = ids[:-1]
    best = 0
    for chain in stored:
        chain = chain[: len(chain) // size * size]
        same = 0
        while same < min(len(chain), len(usable)) and chain[same] == usable[same]:
            same += 1
        best = max(best, same)
    return best


token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=60)
@given(stored=st.lists(token_lists, max_size=8), asked=st.lists(token_lists, max_size=8), size=st.integers(1, 4))
def test_matches_equal_a_naive_search(stored, asked, size):
    manager = BlockManager(200, size)
    for seq_id, ids in enumerate(stored):
        committed(manager, seq_id, ids)
        if seq_id % 2:
            manager.free(seq_id)
    for ids in [*asked, *stored]:
        assert manager.match_prefix(ids) == naive_match(stored, ids, size)
    manager.check()


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("held", [True, False])
def test_blocks_to_allocate_is_what_an_allocation_takes(cut, held):
    manager = BlockManager(12, 2)
    manager.allocate(0, range(8))
    manager.commit(0)
    if not held:
        manager.free(0)
    tokens = [*range(cut), *range(50, 53)]
    for salt in ("", "other"):
        before, told = manager.free_block_count, manager.blocks_to_allocate(tokens, salt)
        manager.allocate(1, tokens, cache_salt=salt)
        assert before - manager.free_block_count == told
        manager.free(1)
    assert manager.blocks_to_allocate(9) == 5


def test_a_duplicate_that_forks_share_stays_until_one_of_them_is_gone():
    manager = BlockManager(20, block_size=4)
    for seq_id in (1, 2):
        manager.allocate(seq_id, list(range(8)))
    manager.fork(2, 3)
    for seq_id in (1, 2, 3):
        manager.commit(seq_id)
    first, own, twin = (manager.get_sequence(seq_id).block_ids for seq_id in (1, 2, 3))
    assert own == twin and not set(own) & set(first)
    manager.check()
    manager.free(3)
    manager.commit(2)
    assert manager.get_sequence(2).block_ids == first
    manager.check()


@pytest.mark.parametrize("size", [4, 5, 16])
@pytest.mark.parametrize("place", [0, -2, -1])
def test_one_token_of_another_id_is_another_block(size, place):
    """Many chains beside each other: what is found must not rest on which of them share a bucket."""
    manager = BlockManager(400, block_size=size)
    chains = []
    for number in range(300):
        ids = [7] * size
        ids[place] = 1000 + number
        chains.append(ids)
        manager.allocate(number, ids)
        manager.commit(number)
    for number, ids in enumerate(chains):
        assert manager.match_prefix([*ids, 1]) == size
        ids[place] = 5000 + number
        assert manager.match_prefix([*ids, 1]) == (size + place if place < 0 else 0)


def test_what_follows_a_cut_is_never_found():
    """Its K and V were computed over what was dropped, whatever ids stand before it now."""
    manager = BlockManager(20, block_size=4)
    manager.allocate(1, list(range(12)))
    manager.commit(1)
    manager.apply_streaming_llm(1, 4, 0)
    manager.append(1, list(range(50, 58)))
    manager.commit(1)
    assert manager.match_prefix([*range(4), *range(50, 58), 1]) == 4
    manager.check()


def test_what_lived_when_the_cache_was_cleared_is_never_found():
    """Its K and V may be those of old weights, and so may those of its forks and of what it goes on with."""
    manager, ids = BlockManager(20, block_size=4), list(range(12))
    manager.allocate(1, ids[:8])
    manager.commit(1)
    manager.clear_prefix_cache()
    manager.fork(1, 2)
    for seq_id in (1, 2):
        manager.append(seq_id, ids[8:])
        manager.commit(seq_id)
        manager.free(seq_id)
    assert manager.match_prefix([*ids, 1]) == 0 == manager.cached_block_count
    committed(manager, 3, ids)
    assert manager.match_prefix([*ids, 1]) == 12
    manager.check()


def test_clearing_leaves_free_blocks_empty():
    manager = BlockManager(20, block_size=4)
    committed(manager, 1, list(range(12)))
    manager.free(1)
    assert manager.clear_prefix_cache() == 3
    manager.check()
    assert not manager.snapshot().num_tokens.any()


def test_a_block_that_was_copied_on_write_is_found_by_all_its_tokens():
    """Those from before the copy too, and not by what the copy may have held before."""
    manager = BlockManager(20, block_size=4)
    manager.allocate(1, [5, 6])
    manager.fork(1, 2)
    for seq_id, ids in ((2, [7, 8]), (1, [9, 8])):
        manager.append(seq_id, ids)
        manager.commit(seq_id)
    assert [manager.match_prefix([5, 6, *ids, 1]) for ids in ([7, 8], [9, 8])] == [4, 4]
    assert manager.match_prefix([0, 0, 7, 8, 1]) == 0
    manager.truncate(1, 3)  # of a block that stays findable
    manager.append(1, [3])
    manager.commit(1)
    assert manager.match_prefix([5, 6, 9, 3, 1]) == 4
    manager.check()


def test_tokens_that_are_not_known_are_never_found():
    """Nor what follows them, whatever their block holds from before."""
    manager = BlockManager(1, block_size=4)
    committed(manager, 1, [5, 6, 7, 8])
    manager.free(1)
    manager.allocate(2, 3)
    manager.append(2, [8])
    manager.commit(2)
    assert manager.match_prefix([5, 6, 7, 8, 1]) == 0 == manager.match_prefix([0, 0, 0, 8, 1])
    assert not manager.snapshot().indexed.any()
    manager.check()


def test_what_is_not_committed_is_not_found():
    """The tokens behind those of a plan, though they are known."""
    manager, ids = BlockManager(20, block_size=4), list(range(16))
    manager.allocate(1, ids[:8])
    plan = manager.plan([1])
    manager.append(1, ids[8:])
    manager.commit(plan)
    assert manager.match_prefix([*ids, 1]) == 8
    manager.commit(1)
    assert manager.match_prefix([*ids, 1]) == 16


def test_a_pinned_block_stays_as_it_is_when_the_only_sequence_that_holds_it_goes_on_elsewhere():
    manager, ids = BlockManager(20, block_size=4), list(range(8))
    committed(manager, 1, ids)
    manager.pin(1)
    manager.free(1)
    assert manager.allocate(2, [*ids, 9]).num_cached_tokens == 8
    manager.truncate(2, 7)
    manager.append(2, [99])
    manager.commit(2)
    assert manager.match_prefix([*ids, 1]) == 8 == manager.match_prefix([*ids[:7], 99, 1])
    assert manager.snapshot().pinned.sum() == 2
    manager.check()
