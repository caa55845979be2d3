"""The order of eviction, kept by what changed."""

from __future__ import annotations

import pytest

from pagedkv import BlockManager, InvalidOperation, OutOfMemory


def full(count=5, **options):
    manager = BlockManager(20, 2, **options)
    for seq_id in range(count):
        manager.allocate(seq_id, 2)
    return manager


def test_pinned_sequences_are_left_alone():
    manager = full()
    manager.pin(0)
    manager.pin(2, 0)
    assert manager.evict_to_threshold(0) == [1, 3, 4] and manager.sequence_ids == [0, 2]
    with pytest.raises(InvalidOperation, match="no sequence to evict"):
        manager.evict()
    manager.unpin(2)
    assert manager.evict() == 2


def test_a_row_that_is_used_again_takes_no_old_place_in_the_order():
    manager = full()
    assert manager.select_eviction_target() == 0
    manager.free(0)
    manager.allocate(99, 2)  # the same row, the youngest sequence
    assert [manager.evict() for _ in range(5)] == [1, 2, 3, 4, 99]


def test_many_changes_do_not_pile_up():
    manager = full(3)
    for _ in range(500):
        manager.touch(1)
        assert manager.select_eviction_target() == 0
    assert len(manager._victims._heap) <= 4 * 3 + 64 + 1


def test_changes_of_size_and_priority_count():
    manager = full(strategy="longest_first")
    manager.append(3, 4)
    assert manager.select_eviction_target() == 3
    manager.truncate(3, 1)
    assert manager.select_eviction_target() == 0
    manager.append(2, 9)
    manager.apply_streaming_llm(2, 0, 1)
    assert manager.select_eviction_target() == 0
    manager = full(strategy="priority:3")
    for seq_id in range(5):
        manager.set_priority(seq_id, 2 if seq_id < 2 else 1)
    assert manager.evict() == 2
    manager.set_priority(4, 0)
    assert manager.evict() == 4


def test_sequences_of_the_batch_are_never_evicted_for_it():
    manager = BlockManager(4, 1, on_full="evict")
    for seq_id in range(4):
        manager.allocate(seq_id, 1)
    manager.append_batch([0, 1])
    assert manager.sequence_ids == [0, 1]


def test_spared_sequences_are_passed_over_and_stay_in_the_order():
    manager = full()
    assert manager.select_eviction_target(spared=[0, 1, 77]) == 2
    assert manager.select_eviction_target(spared=range(5)) is None
    assert manager.select_eviction_target() == 0
    with pytest.raises(InvalidOperation, match="spared: expected an int"):
        manager.select_eviction_target(spared=[-1])


def test_nobody_is_evicted_for_blocks_that_the_pin_of_a_freed_sequence_keeps():
    manager = BlockManager(5, 2, on_full="evict")
    manager.allocate(0, [0, 0, 1, 0])
    manager.commit(0)
    manager.pin(0)
    manager.fork(0, 1)
    manager.free(0)
    with pytest.raises(OutOfMemory) as failure:
        manager.allocate(2, 9)
    assert (failure.value.requested, failure.value.available) == (5, 3)
    assert manager.sequence_ids == [1], "evicted in vain: its blocks stay pinned"
    manager.unpin(0)
    manager.allocate(2, 9)
    assert manager.sequence_ids == [2]
