"""The faults that well-known managers have had, each by name: ours has none of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv import (
    LRU,
    BlockManager,
    BlockRemoved,
    BlockStored,
    InvalidOperation,
    OutOfMemory,
    PagedKvCache,
    SequenceNotFound,
)


def seen(manager):
    """Everything that a caller can see of a manager."""
    snap = manager.snapshot()
    arrays = (snap.ref_count, snap.cached, snap.pinned, snap.indexed, snap.num_tokens, snap.depth, snap.last_access)
    tables = [info.block_ids for info in snap.sequences]
    return [a.tolist() for a in arrays], snap.sequences, tables, snap.stats, snap.tick, manager.free_block_count


def refused(manager, error, call, match=None):
    before = seen(manager)
    with pytest.raises(error, match=match) as caught:
        call()
    assert seen(manager) == before
    manager.check()
    return caught.value


def committed(manager, seq_id, ids, **options):
    info = manager.allocate(seq_id, ids, **options)
    manager.commit(seq_id)
    return info


def cached(manager, ids, **options):
    """Leave `ids` findable, with nobody holding them."""
    committed(manager, 999, ids, **options)
    manager.free(999)


# ---------------------------------------------------------------- double free and stale handles


def test_double_free():
    manager = BlockManager(8, 4)
    manager.allocate(1, 8)
    manager.free(1)
    refused(manager, SequenceNotFound, lambda: manager.free(1), "S1")
    assert manager.free_block_count == 8
    held = [manager.allocate(seq_id, 4).block_ids[0] for seq_id in range(8)]
    assert len(set(held)) == 8, "no block is handed out twice"


def test_stale_handle_of_a_freed_sequence():
    manager = BlockManager(8, 4)
    manager.allocate(1, 4)
    plan = manager.append_batch([1], counts=2)
    manager.free(1)
    manager.allocate(2, 8)
    refused(manager, SequenceNotFound, lambda: manager.commit(plan))
    manager.allocate(1, 6)  # the same id, another life
    refused(manager, InvalidOperation, lambda: manager.commit(plan), "stale")


def test_stale_plan_of_tokens_that_were_taken_back():
    manager = BlockManager(8, 4)
    manager.allocate(1, [1, 2, 3, 4])
    plan = manager.append_batch([1], [[5, 6, 7, 8]])
    manager.truncate(1, 5)
    manager.append(1, [9, 9, 9])
    refused(manager, InvalidOperation, lambda: manager.commit(plan), "plan is stale: S1")
    assert manager.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 0]) == 0, "nothing of it became findable"


def test_plan_does_not_follow_the_array_of_ids_that_it_was_made_from():
    manager = BlockManager(8, 4)
    manager.allocate(1, [1] * 4)
    manager.allocate(2, [2] * 4)
    batch = np.array([1])
    plan = manager.append_batch(batch, counts=0)
    batch[0] = 2
    manager.commit(plan)
    assert plan.seq_ids.tolist() == [1]
    assert manager.match_prefix([1] * 5) == 4 and manager.match_prefix([2] * 5) == 0


@pytest.mark.parametrize("call", ["append_batch", "plan"])
def test_sequence_listed_twice_in_one_batch(call):
    manager = BlockManager(8, 4)
    manager.allocate(1, 3)
    manager.allocate(2, 3)
    refused(manager, InvalidOperation, lambda: getattr(manager, call)([1, 2, 1]), "each sequence once, got S1 twice")


def test_block_of_two_forks_is_given_back_once():
    manager = BlockManager(8, 4)
    manager.allocate(1, 8)
    for twin in (2, 3):
        manager.fork(1, twin)
    for seq_id in (2, 1, 3):
        assert manager.used_block_count == 2
        manager.free(seq_id)
    assert manager.free_block_count == 8 and manager.stats.total_frees == 2
    manager.check()


# ---------------------------------------------------------------- leaks and counts


def test_lookup_without_use_leaks_nothing():
    manager = BlockManager(8, 4)
    cached(manager, [1] * 8)
    before = seen(manager)
    for _ in range(100):
        assert manager.match_prefix([1] * 9) == 8
        manager.match_prefix([1] * 9, "somebody else")
    assert seen(manager) == before


def test_pins_that_go_negative():
    manager = BlockManager(8, 4)
    committed(manager, 1, [1] * 8)
    refused(manager, InvalidOperation, lambda: manager.unpin(1), "S1 is not pinned")
    manager.pin(1)
    manager.pin(1)
    manager.unpin(1)
    refused(manager, InvalidOperation, lambda: manager.unpin(1), "S1 is not pinned")
    manager.pin(1)
    manager.free(1)
    assert manager.free_block_count == 6
    manager.unpin(1)
    refused(manager, SequenceNotFound, lambda: manager.unpin(1))
    assert manager.free_block_count == 8


def test_pins_of_two_sequences_on_one_block_are_both_counted():
    manager = BlockManager(4, 4)
    for seq_id in (1, 2):
        committed(manager, seq_id, [1] * 8)
        manager.pin(seq_id)
        manager.free(seq_id)
    manager.unpin(1)
    assert refused(manager, OutOfMemory, lambda: manager.allocate(3, 12)).available == 2
    manager.unpin(2)
    manager.allocate(3, 16)


def test_pin_of_a_sequence_without_blocks_outlives_it_too():
    manager = BlockManager(4, 4)
    manager.allocate(1, 0)
    manager.pin(1)
    manager.free(1)
    manager.unpin(1)
    refused(manager, SequenceNotFound, lambda: manager.unpin(1))


def test_pins_beyond_what_a_block_can_count():
    manager = BlockManager(4, 1)
    committed(manager, 1, [1, 2])
    manager.pin(1)
    manager._state.blocks["pins"][0] = np.iinfo(np.uint16).max
    with pytest.raises(InvalidOperation, match="at most 65535 pins"):
        manager.free(1)
    assert 1 in manager and manager.used_block_count == 2


def test_pinned_block_is_never_written_by_one_that_takes_tokens_back():
    cache = PagedKvCache(8, 2, 1, 1, dtype="float32")
    cache.allocate(1, [1, 2, 3, 4])
    ones = torch.ones(4, 1, 1)
    cache.write(0, ones, ones, cache.plan([1]))
    cache.commit(1)
    cache.pin(1)
    cache.free(1)
    cache.allocate(2, [1, 2, 3, 4, 5])
    cache.truncate(2, 3)
    cache.write(0, 9 * ones[:1], 9 * ones[:1], cache.append_batch([2], [[8]]))
    cache.check()
    assert cache.match_prefix([1, 2, 3, 4, 5]) == 4
    cache.allocate(3, [1, 2, 3, 4, 5])
    assert cache.storage.gather(0, cache.plan([3], 5).slot_mapping)[0][:4].flatten().tolist() == [1, 1, 1, 1]


def test_pinned_block_stays_findable_when_a_sequence_streams_over_it():
    manager = BlockManager(8, 2)
    committed(manager, 1, [1, 2, 3, 4])
    manager.pin(1)
    manager.free(1)
    manager.allocate(2, [1, 2, 3, 4, 5, 6, 7, 8])
    manager.apply_streaming_llm(2, 0, 5)
    manager.check()
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 4


def test_free_count_counts_nothing_twice():
    manager = BlockManager(10, 4)
    committed(manager, 1, [1] * 8)
    manager.fork(1, 2)
    cached(manager, [2] * 8)
    committed(manager, 3, [3] * 8)
    manager.pin(3)
    manager.free(3)
    assert (manager.used_block_count, manager.cached_block_count, manager.free_block_count) == (2, 4, 6)
    manager.allocate(4, 24)
    assert manager.free_block_count == 0 and manager.cached_block_count == 2


def test_matched_blocks_are_not_also_counted_as_room():
    manager = BlockManager(4, 1)
    cached(manager, [1, 2, 3])
    error = refused(manager, OutOfMemory, lambda: manager.allocate(1, [1, 2, 3, 4, 5]))
    assert (error.requested, error.available) == (2, 1)


# ---------------------------------------------------------------- collisions, isolation, stale reuse


def test_hash_collisions_never_mix_prefixes():
    cache = PagedKvCache(64, 2, 1, 1, dtype="float32")
    cache._state = cache._state._replace(buckets=np.zeros(1, np.int32))  # every key collides
    prompts = [[a, b, c, d] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    for seq_id, prompt in enumerate(prompts):
        cache.allocate(seq_id, prompt, cache_salt="ab"[prompt[3]])
        plan = cache.plan([seq_id])
        values = torch.tensor([float(seq_id)]).expand(plan.total_tokens, 1, 1)
        cache.write(0, values, values, plan)
        cache.commit(seq_id)
    cache.check()
    for prompt in prompts:
        assert cache.match_prefix([*prompt, 7], "ab"[prompt[3]]) == 4
        assert cache.match_prefix([*prompt, 7], "c") == 0
        other = [*prompt[:3], 1 - prompt[3], 7]
        assert cache.match_prefix(other, "ab"[prompt[3]]) == 3, "the last token lives under the other salt only"
    for seq_id in range(0, len(prompts), 2):
        cache.free(seq_id)
    cache.allocate(99, 2 * cache.free_block_count)
    cache.check()


@pytest.mark.parametrize("other", ["", "b", "a ", "a\0", "A", "á", "á", "a:", "a/1"])
def test_salts_isolate_even_if_they_look_alike(other):
    manager = BlockManager(8, 4)
    cached(manager, [1] * 8, cache_salt="a")
    assert manager.match_prefix([1] * 9, other) == 0
    assert manager.allocate(1, [1] * 9, cache_salt=other).num_cached_tokens == 0
    assert manager.match_prefix([1] * 9, "a") == 8


def test_salt_and_token_ids_do_not_run_together():
    manager = BlockManager(8, 1)
    cached(manager, [1, 2], cache_salt="1")
    assert manager.match_prefix([2, 0]) == manager.match_prefix([1, 1, 2, 0]) == 0


def test_salts_that_come_and_go_never_inherit_blocks():
    manager = BlockManager(8, 1)
    for turn in range(200):
        salt = f"tenant {turn}"
        assert manager.match_prefix([1, 2, 3], salt) == 0
        assert committed(manager, turn, [1, 2, 3], cache_salt=salt).num_cached_tokens == 0
        manager.free(turn)
    manager.check()
    assert len(manager._state.roots) <= 64, "the room of salts that nothing belongs to is used again"


def test_request_of_the_same_step_does_not_hit_what_is_not_written():
    manager = BlockManager(8, 4)
    manager.allocate(1, [1] * 8)
    assert manager.match_prefix([1] * 9) == 0
    assert manager.allocate(2, [1] * 9).num_cached_tokens == 0
    manager.commit(manager.plan([1]))
    assert manager.allocate(3, [1] * 9).num_cached_tokens == 8


def test_only_the_part_that_a_plan_covers_becomes_findable():
    manager = BlockManager(8, 4)
    manager.allocate(1, [1] * 4)
    plan = manager.plan([1])
    manager.append(1, [2] * 4)
    manager.commit(plan)
    assert manager.match_prefix([1, 1, 1, 1, 2, 2, 2, 2, 3]) == 4


def test_no_hash_is_kept_after_a_block_was_given_up():
    manager = BlockManager(4, 2)
    cached(manager, [1, 2, 3, 4])
    manager.allocate(1, 8)
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 0 and not manager.snapshot().indexed.any()
    manager.free(1)
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 0
    assert manager.allocate(2, [1, 2, 3, 4, 5]).num_cached_tokens == 0


def test_old_content_of_a_partial_block_is_not_resurrected():
    manager = BlockManager(2, 4)
    manager.allocate(1, [1, 2, 3, 4, 5, 6])
    manager.free(1)
    manager.allocate(2, [1, 2])
    manager.commit(2)
    manager.append(2, 2)  # tokens of unknown ids where 3 and 4 once were
    manager.commit(2)
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 0
    manager.truncate(2, 2)
    manager.append(2, [7, 8])
    manager.commit(2)
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 2 and manager.match_prefix([1, 2, 7, 8, 9]) == 4


def test_token_behind_one_of_unknown_id_is_never_findable():
    manager = BlockManager(4, 2)
    manager.allocate(1, [1])
    manager.append(1, 1)
    manager.append(1, [2, 3])
    manager.commit(1)
    assert not manager.snapshot().indexed.any()


def test_block_taken_back_and_written_anew_is_not_found_under_its_old_tokens():
    manager = BlockManager(4, 2)
    committed(manager, 1, [1, 2, 3, 4])
    manager.truncate(1, 3)
    manager.append(1, [9])
    assert manager.match_prefix([1, 2, 3, 4, 5]) <= 2
    manager.commit(1)
    assert manager.match_prefix([1, 2, 3, 9, 5]) == 4
    manager.check()


def test_new_weights_old_blocks():
    manager = BlockManager(8, 2)
    cached(manager, [1, 2, 3, 4])
    committed(manager, 1, [5, 6, 7, 8])
    manager.pin(1)
    manager.free(1)
    committed(manager, 2, [9, 9, 9, 9])
    assert manager.clear_prefix_cache() == 4
    for ids in ([1, 2, 3], [5, 6, 7], [9, 9, 9]):
        assert manager.match_prefix(ids) == 0
    assert manager.free_block_count == 6, "pins went too"
    refused(manager, SequenceNotFound, lambda: manager.unpin(1))
    manager.append(2, [9, 9])
    manager.commit(2)
    manager.fork(2, 3)
    manager.commit(3)
    assert manager.match_prefix([9] * 7) == 0, "a sequence of the old weights is never committed again"
    committed(manager, 4, [9] * 4)
    assert manager.match_prefix([9] * 7) == 4
    manager.check()


# ---------------------------------------------------------------- re-entrance and reclaim


def test_reentrant_calls_from_a_subscriber_during_commit():
    manager = BlockManager(6, 2)
    heard, calls = [], []

    def meddle(event):
        heard.append(event)
        manager.check()
        if isinstance(event, BlockStored) and not calls:
            calls.append(event)
            manager.free(1)
            manager.allocate(2, 12)  # reclaims what is being committed
            manager.free(2)
            manager.evict_to_threshold(0)
            committed(manager, 3, [7, 8])

    manager.subscribe(meddle)
    committed(manager, 1, [1, 2, 3, 4])
    manager.check()
    index = {}
    for event in heard:
        if isinstance(event, BlockStored):
            assert event.parent_id is None or event.parent_id in index
            index[event.block_id] = event.token_ids
        else:
            assert isinstance(event, BlockRemoved)
            del index[event.block_id]
    assert list(index.values()) == [(7, 8)] and manager.match_prefix([7, 8, 9]) == 2


def test_subscriber_that_fails_harms_nobody(caplog):
    manager = BlockManager(6, 2)
    heard = []

    def fail(event):
        raise RuntimeError("mine")

    manager.subscribe(fail)
    unsubscribe = manager.subscribe(heard.append)
    committed(manager, 1, [1, 2])
    assert len(heard) == 1 and "a subscriber failed on BlockStored" in caplog.text
    unsubscribe()
    committed(manager, 2, [3, 4])
    assert len(heard) == 1


def test_cached_blocks_are_reclaimed_one_at_a_time():
    manager = BlockManager(8, 2)
    for start in range(4):
        cached(manager, [start, start, start, start])
    manager.allocate(1, 2)
    assert manager.cached_block_count == 7 and manager.stats.blocks_reclaimed == 1
    manager.append(1, 4)
    assert manager.cached_block_count == 5 and manager.stats.blocks_reclaimed == 3


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_full_hit_still_computes_the_last_token(size):
    manager = BlockManager(16, size)
    cached(manager, [1] * 8)
    assert manager.match_prefix([1] * 8) == 7
    info = manager.allocate(1, [1] * 8)
    assert info.num_cached_tokens == 7 and manager.plan([1]).positions.tolist() == [7]
    cached(manager, [2])
    assert manager.allocate(2, [2]).num_cached_tokens == 0


def test_chain_shrinks_tail_first():
    manager = BlockManager(6, 2)
    removed = []
    chain = committed(manager, 1, [1, 2, 3, 4, 5, 6, 7, 8]).block_ids
    manager.subscribe(lambda event: removed.append(event.block_id) if isinstance(event, BlockRemoved) else None)
    manager.free(1)
    for length in (8, 6, 4, 2, 0):
        assert manager.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == length
        if length:
            manager.allocate(length, 2 if length < 8 else 6)
    assert removed == list(reversed(chain))


def test_block_in_use_keeps_its_prefix():
    manager = BlockManager(5, 1)
    committed(manager, 1, [1, 2, 3])
    manager.truncate(1, 0)
    committed(manager, 2, [1, 2, 9])
    refused(manager, OutOfMemory, lambda: manager.allocate(3, 3))
    manager.allocate(3, 2)  # block 3 of the first chain went, 1 and 2 are in use
    assert manager.match_prefix([1, 2, 9, 0]) == 3 and manager.match_prefix([1, 2, 3, 0]) == 2


def test_failed_allocation_evicts_nobody():
    manager = BlockManager(4, 1, on_full="evict")
    manager.allocate(3, 1)
    manager.pin(3)
    committed(manager, 1, [1, 2, 3])
    refused(manager, OutOfMemory, lambda: manager.allocate(2, [1, 2, 3, 9]))
    manager.allocate(4, [1, 2, 8])
    assert manager.sequence_ids == [3, 4], "where it helps, somebody goes"


def test_growth_evicts_a_fork_whose_leaving_saves_a_copy():
    manager = BlockManager(1, 2, on_full="evict")
    manager.allocate(1, 1)
    manager.fork(1, 2)
    assert manager.append(1, 1).num_blocks == 1 and manager.sequence_ids == [1]
    manager.check()


def busy(manager):
    """The same calls, with many ties."""
    heard = []
    manager.subscribe(heard.append)
    rng = np.random.default_rng(5)
    tables, evicted = [], []
    for seq_id in range(120):
        ids = rng.integers(0, 2, rng.integers(1, 12)).tolist()
        tables.append(manager.allocate(seq_id, ids, priority=int(rng.integers(0, 2))).block_ids)
        manager.commit(seq_id)
        if seq_id % 3 == 0:
            manager.free(seq_id)
        if seq_id % 7 == 0:
            evicted.append(manager.evict_to_threshold(0.5))
    return tables, evicted, manager.sequence_ids, heard


@pytest.mark.parametrize("strategy", ["lru", "lfu", "longest_first", "priority:2", "streaming_llm:1,1", "fifo"])
def test_ties_are_reproducible(strategy):
    first, second = (busy(BlockManager(40, 2, strategy=strategy, on_full="evict")) for _ in range(2))
    assert first == second


# ---------------------------------------------------------------- cost, in operations


class Counting(LRU):
    """LRU that counts the blocks and sequences that it is asked about."""

    def __init__(self):
        object.__setattr__(self, "blocks", 0)
        object.__setattr__(self, "sequences", 0)

    def score_blocks(self, blocks, now):
        object.__setattr__(self, "blocks", self.blocks + len(blocks))
        return super().score_blocks(blocks, now)

    def score_sequences(self, sequences, now):
        object.__setattr__(self, "sequences", self.sequences + len(sequences))
        return super().score_sequences(sequences, now)


def test_free_and_reclaim_score_a_block_once_however_large_the_cache_is():
    strategy = Counting()
    manager = BlockManager(3000, 1, strategy=strategy)
    for start in range(1000):
        cached(manager, [start, 1, 2])
    assert strategy.blocks == 3000
    for seq_id in range(2000):
        manager.allocate(seq_id, 1)
    assert manager.stats.blocks_reclaimed == 2000 and strategy.blocks == 3000, "reclaim asks nobody"
    manager.free(1)
    assert strategy.blocks == 3000 and strategy.sequences == 0


def test_eviction_ranks_only_what_changed():
    strategy = Counting()
    manager = BlockManager(1000, 1, strategy=strategy, on_full="evict")
    for seq_id in range(3000):
        manager.allocate(seq_id, 1)
    assert manager.stats.total_evictions == 2000 and strategy.sequences <= 3000


def test_streaming_that_does_not_fit_notes_nothing_in_the_blocks() -> None:
    cache = BlockManager(5, 2, on_full="raise")
    cache.allocate(1, list(range(8)))
    cache.commit(1)
    cache.fork(1, 2)
    cache.allocate(3, 2)
    cache.touch(1)
    before = cache.snapshot()
    with pytest.raises(OutOfMemory):
        cache.apply_streaming_llm(1, 2, 4)
    after = cache.snapshot()
    assert after.last_access.tolist() == before.last_access.tolist()
    assert after.sequences == before.sequences
    cache.check()
