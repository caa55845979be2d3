"""Slots for recurrent states: a sequence has one, a snapshot at a block boundary another."""

from __future__ import annotations

import numpy as np
import pytest
from tests.states import snapshot_texts

from pagedkv import BlockManager, InvalidOperation, OutOfMemory, SequenceNotFound


def manager(num_states=6, **options):
    return BlockManager(32, 4, num_states=num_states, **options)


def counts(cache):
    return cache.used_state_count, cache.cached_state_count, cache.free_state_count


def grow(cache, seq_id, ids, pieces=None):
    """Append and commit, in pieces that end at these lengths."""
    done = cache.get_sequence(seq_id).num_tokens if seq_id in cache else 0
    if seq_id not in cache:
        cache.allocate(seq_id, 0)
    for end in pieces or range(1, len(ids) + 1):
        cache.commit(cache.append_batch([seq_id], [ids[done:end]]))
        done = end


def test_a_sequence_has_a_slot_for_as_long_as_it_lives():
    cache = manager()
    assert counts(cache) == (0, 0, 6)
    cache.allocate(1, 3)
    cache.fork(1, 2)
    assert counts(cache) == (2, 0, 4)
    assert cache.take_state_copies().tolist() == [[*cache.state_slots([1]), *cache.state_slots([2])]]
    assert cache.take_state_copies().shape == (0, 2)
    cache.free(1)
    cache.evict()
    assert counts(cache) == (0, 0, 6)
    cache.check()


def test_a_step_that_ends_at_a_block_boundary_leaves_a_snapshot():
    cache = manager()
    grow(cache, 1, list(range(11)), pieces=[3, 8, 11])
    assert [text for _, text, _ in snapshot_texts(cache)] == [list(range(8))]
    assert cache.take_state_copies().tolist() == [[cache.state_slots([1])[0], snapshot_texts(cache)[0][0]]]
    assert cache.stats.states_stored == 1


def test_a_prefix_is_reused_up_to_its_last_snapshot_and_its_state_with_it():
    cache = manager()
    grow(cache, 1, list(range(15)), pieces=[4, 8, 15])
    longer = list(range(14)) + [99]
    assert cache.match_prefix(longer) == 8
    assert cache.match_blocks(longer) == 12
    cache.take_state_copies()
    info = cache.allocate(2, longer)
    assert info.num_cached_tokens == 8
    slots = {tuple(text): slot for slot, text, _ in snapshot_texts(cache)}
    assert cache.take_state_copies().tolist() == [[slots[tuple(range(8))], cache.state_slots([2])[0]]]
    assert cache.blocks_to_allocate(longer) == 2
    cache.check()


def test_no_block_is_reused_in_part():
    cache = manager()
    grow(cache, 1, list(range(8)), pieces=[4, 8])
    assert cache.match_prefix([0, 1, 2, 3, 4, 5, 9]) == 4
    assert cache.allocate(2, [0, 1, 9]).num_cached_tokens == 0


def test_the_least_recently_used_snapshot_makes_room():
    cache = manager(num_states=3)
    grow(cache, 1, list(range(4)), pieces=[4])
    cache.free(1)
    grow(cache, 1, list(range(50, 54)), pieces=[4])
    cache.free(1)
    cache.allocate(1, [0, 1, 2, 3, 9])  # uses the older one
    assert counts(cache) == (1, 2, 2)
    cache.allocate(2, 1)
    assert [text for _, text, _ in snapshot_texts(cache)] == [[0, 1, 2, 3]]
    assert cache.stats.states_reclaimed == 1
    cache.check()


def test_where_there_is_no_other_slot_a_sequence_takes_that_of_the_snapshot():
    cache = manager(num_states=1)
    cache.allocate(1, [0, 1, 2, 3])
    cache.commit(1)
    assert counts(cache) == (1, 0, 0)  # no slot, no snapshot
    cache = manager(num_states=2)
    grow(cache, 1, list(range(5)), pieces=[4, 5])
    kept = snapshot_texts(cache)[0][0]
    cache.take_state_copies()
    assert cache.allocate(2, list(range(6))).num_cached_tokens == 4
    assert cache.state_slots([2]).tolist() == [kept]
    assert not len(cache.take_state_copies())
    assert counts(cache) == (2, 0, 0)


def test_the_snapshot_of_a_decode_moves_on_once_no_slot_is_free():
    cache = manager(num_states=3)
    grow(cache, 1, list(range(8)), pieces=[8])
    grow(cache, 1, list(range(20)), pieces=range(9, 21))
    assert sorted(len(text) for _, text, _ in snapshot_texts(cache)) == [8, 20]
    free = manager(num_states=9)
    grow(free, 1, list(range(8)), pieces=[8])
    grow(free, 1, list(range(20)), pieces=range(9, 21))
    assert sorted(len(text) for _, text, _ in snapshot_texts(free)) == [8, 12, 16, 20]


def test_a_snapshot_that_a_finished_text_left_stays_when_another_goes_on_from_it():
    cache = manager(num_states=3)
    grow(cache, 1, list(range(8)))
    cache.free(1)
    cache.allocate(2, list(range(9)))
    cache.commit(2)
    grow(cache, 2, list(range(12)), pieces=range(10, 13))
    assert [8, 12] == sorted(len(text) for _, text, _ in snapshot_texts(cache))


def test_snapshots_of_pinned_blocks_stay():
    cache = manager(num_states=2)
    grow(cache, 1, list(range(4)), pieces=[4])
    cache.pin(1)
    cache.free(1)
    cache.allocate(2, 1)
    with pytest.raises(OutOfMemory, match="requested 1 slots for states, 0 available .all 2 are held") as refusal:
        cache.allocate(3, 1)
    assert (refusal.value.requested, refusal.value.available, refusal.value.unit) == (1, 0, "slots for states")
    assert counts(cache) == (1, 1, 0)
    cache.unpin(1)
    cache.allocate(3, 1)


def test_a_sequence_makes_room_for_another_where_that_is_wanted():
    cache = manager(num_states=2, on_full="evict")
    for seq_id in (1, 2, 3):
        cache.allocate(seq_id, [seq_id])
    assert cache.sequence_ids == [2, 3]
    cache.pin(2)
    cache.pin(3)
    with pytest.raises(OutOfMemory):
        cache.allocate(4, 1)
    cache.check()


def test_a_fork_without_a_slot_changes_nothing():
    cache = manager(num_states=1)
    cache.allocate(1, 5)
    before = cache.snapshot().stats
    with pytest.raises(OutOfMemory):
        cache.fork(1, 2)
    assert cache.snapshot().stats == before and 2 not in cache
    cache.check()


@pytest.mark.parametrize("seq_id", [1, 2])
def test_what_was_taken_back_leaves_no_snapshot(seq_id):
    cache = manager()
    cache.allocate(1, list(range(9)))  # the state is of nine tokens
    cache.truncate(1, 8)
    cache.fork(1, 2)
    cache.commit(seq_id)
    assert counts(cache)[1] == 0 and cache.match_blocks([*range(8), 9]) == 8


def test_a_snapshot_goes_with_its_block():
    cache = manager()
    grow(cache, 1, list(range(4)), pieces=[4])
    cache.free(1)
    cache.allocate(2, 4 * 32)  # takes every block
    assert counts(cache) == (1, 0, 5)
    cache.free(2)
    grow(cache, 1, list(range(4)), pieces=[4])
    cache.clear_prefix_cache()
    assert counts(cache) == (1, 0, 5)
    cache.check()


def test_without_a_prefix_cache_there_are_no_snapshots():
    cache = manager(prefix_caching=False)
    grow(cache, 1, list(range(8)), pieces=[4, 8])
    assert counts(cache) == (1, 0, 5)


def test_streaming_leaves_no_snapshots_behind_what_it_dropped():
    cache = manager()
    grow(cache, 1, list(range(20)), pieces=[4, 20])
    cache.apply_streaming_llm(1, 8, 4)
    cache.commit(cache.append_batch([1], counts=4))
    assert [len(text) for _, text, _ in snapshot_texts(cache)] == [4]
    cache.check()


def test_slots_grow_with_the_rows_of_sequences():
    cache = BlockManager(400, 4, num_states=300)
    for seq_id in range(300):
        cache.allocate(seq_id, 1)
    assert sorted(cache.state_slots(np.arange(300))) == list(range(300))
    cache.check()


def test_errors_name_what_is_wrong():
    with pytest.raises(InvalidOperation, match="num_states: expected an int in 0 … 2147483646, got -1"):
        manager(num_states=-1)
    with pytest.raises(InvalidOperation, match="num_states: expected at least 1"):
        BlockManager(4).state_slots([])
    with pytest.raises(SequenceNotFound):
        manager().state_slots([7])
    with pytest.raises(InvalidOperation, match="token_ids: expected token ids"):
        manager().match_blocks(5)
