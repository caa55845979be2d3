"""What subscribers hear, in which order, and what a snapshot holds."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pagedkv import AllBlocksCleared, BlockManager, BlockRemoved, BlockStored


def test_events_tell_the_whole_story():
    manager = BlockManager(3, 2)
    heard = []
    unsubscribe = manager.subscribe(heard.append)
    manager.allocate(1, [1, 2, 3, 4, 5], cache_salt="s")
    assert heard == [], "nothing is findable before it is committed"
    a, b, _ = manager.get_sequence(1).block_ids
    manager.commit(1)
    assert heard == [BlockStored(a, None, (1, 2), "s"), BlockStored(b, a, (3, 4), "s")]
    manager.free(1)
    manager.match_prefix([1, 2, 3], "s")
    assert len(heard) == 2, "free and lookups change nothing that is findable"
    manager.allocate(2, 4)
    assert heard[2:] == [BlockRemoved(b)]
    manager.clear_prefix_cache()
    assert heard[3:] == [AllBlocksCleared()]
    unsubscribe()
    unsubscribe()
    manager.clear_prefix_cache()
    assert len(heard) == 4


def test_a_block_written_again_after_a_rollback_is_removed_first():
    manager = BlockManager(4, 2)
    heard = []
    manager.subscribe(heard.append)
    manager.allocate(1, [1, 2])
    manager.commit(1)
    manager.truncate(1, 1)
    manager.append(1, [9])
    manager.commit(1)
    kinds = [type(event) for event in heard]
    assert kinds == [BlockStored, BlockRemoved, BlockStored] and heard[2].token_ids == (1, 9)


def test_late_subscribers_hear_only_what_comes():
    manager = BlockManager(4, 2)
    manager.allocate(1, [1, 2])
    manager.commit(1)
    heard = []
    manager.subscribe(heard.append)
    manager.allocate(2, [3, 4])
    manager.commit(2)
    assert [event.token_ids for event in heard] == [(3, 4)]


def test_unsubscribing_twice_leaves_others_alone():
    manager = BlockManager(6, 2)
    heard = []
    first, _second = manager.subscribe(heard.append), manager.subscribe(heard.append)
    first()
    first()
    manager.allocate(1, [1, 2])
    manager.commit(1)
    assert len(heard) == 1


def test_a_snapshot_is_frozen():
    manager = BlockManager(6, 2)
    manager.allocate(1, [1, 2, 3])
    manager.commit(1)
    manager.fork(1, 2)
    manager.allocate(3, [9, 9])
    manager.commit(3)
    manager.pin(3)
    manager.free(3)
    snap = manager.snapshot()
    manager.clear_prefix_cache()
    manager.free(1)
    assert snap.total_blocks == 6 and snap.ref_count.tolist() == [2, 2, 0, 0, 0, 0]
    assert snap.indexed.tolist() == [True, False, True, False, False, False]
    assert snap.cached.tolist() == [False, False, True, False, False, False]
    assert snap.pinned.tolist() == [False, False, True, False, False, False]
    assert snap.owner.tolist() == [0, 0, -1, -1, -1, -1] and snap.num_tokens.tolist()[:3] == [2, 1, 2]
    assert [info.seq_id for info in snap.sequences] == [1, 2] and snap.stats.total_forks == 1
    with pytest.raises(AttributeError):
        snap.tick = 3
    for array in (snap.ref_count, snap.cached, snap.pinned, snap.indexed, snap.num_tokens, snap.depth, snap.owner):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert np.array_equal(snap.depth, np.zeros(6))


def test_snapshots_are_equal_by_value():
    manager = BlockManager(6, 2)
    manager.allocate(1, [1, 2, 3])
    snap = manager.snapshot()
    assert snap == manager.snapshot() == pickle.loads(pickle.dumps(snap)) and snap != "snapshot"
    manager.plan([1])
    assert snap == manager.snapshot(), "a plan changes nothing"
    manager.touch(1)
    assert snap != manager.snapshot() != BlockManager(5, 2).snapshot()


def test_a_block_tells_its_tokens_and_what_is_before_it():
    cache = BlockManager(8, 2)
    table = cache.allocate(1, [1, 2, 3, 4, 5]).block_table.tolist()
    first, second, third = (cache.block(place) for place in table)
    assert (second.parent_id, second.token_ids) == (None, ()), "not yet findable"
    cache.commit(1)
    assert (first.parent_id, first.token_ids) == (None, (1, 2))
    assert (second.parent_id, second.token_ids) == (first.id, (3, 4))
    assert (third.parent_id, third.token_ids) == (None, ())
