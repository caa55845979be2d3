"""Every row of the specification that the core grew from."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from pagedkv import (
    LFU,
    LRU,
    BlockId,
    BlockManager,
    BlockNotFound,
    CacheStats,
    InvalidOperation,
    KvBlock,
    LongestFirst,
    OutOfMemory,
    PagedKvCache,
    PagedKvError,
    Priority,
    SeqId,
    SequenceInfo,
    SequenceNotFound,
    StreamingLLM,
    parse_strategy,
)


def small(num_blocks=10, block_size=4, **options):
    return PagedKvCache(num_blocks, block_size, 1, 2, dtype="float32", **options)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize(("kind", "shown", "limit"), [(BlockId, "B7", 2**32), (SeqId, "S7", 2**64)])
def test_ids_are_small_immutable_ints(kind, shown, limit):
    seven = kind(7)
    assert str(seven) == f"{seven}" == shown
    assert seven == 7 and hash(seven) == hash(7) and {7: "x"}[seven] == "x" and isinstance(seven, int)
    assert kind(0) == 0 and kind(limit - 1) == limit - 1 and kind(np.int32(3)) == 3
    for wrong in (-1, limit, 1.0, "1", True, None):
        with pytest.raises(InvalidOperation, match=f"{kind.__name__}: expected an int"):
            kind(wrong)
    with pytest.raises(AttributeError):
        seven.note = "x"
    assert type(pickle.loads(pickle.dumps(seven))) is kind and type(copy.deepcopy(seven)) is kind


def test_every_method_takes_a_plain_int_and_gives_typed_ids():
    cache = small()
    info = cache.allocate(SeqId(3), 5)
    assert type(info.seq_id) is SeqId and all(type(block) is BlockId for block in info.block_ids)
    assert cache.get_sequence(3) == cache.get_sequence(np.uint8(3)) == cache.get_sequence(SeqId(3))
    assert cache.sequence_ids == [3] and type(cache.sequence_ids[0]) is SeqId
    assert type(cache.evict()) is SeqId


# ---------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("strategy", "shown", "text"),
    [
        (LRU(), "LRU", "lru"),
        (LFU(), "LFU", "lfu"),
        (LongestFirst(), "LongestFirst", "longest_first"),
        (Priority(3), "Priority(3)", "priority:levels=3"),
        (StreamingLLM(4, 512), "StreamingLLM(sink=4, window=512)", "streaming_llm:sink=4,window=512"),
    ],
)
def test_strategies_are_equal_by_value_and_parse(strategy, shown, text):
    assert str(strategy) == shown
    assert parse_strategy(text) == strategy == parse_strategy(shown)
    assert small(strategy=text).eviction_strategy == small(strategy=strategy).eviction_strategy == strategy


def test_strategies_of_other_values_differ():
    assert Priority(2) != Priority(3)
    assert StreamingLLM(sink_tokens=4, window_tokens=8) != StreamingLLM(sink_tokens=4, window_tokens=9)
    assert StreamingLLM(4, 8).sink_tokens == 4 and StreamingLLM(4, 8).window_tokens == 8 and Priority(3).levels == 3


def test_lru_is_the_default():
    assert small().eviction_strategy == LRU() and BlockManager(1).eviction_strategy == LRU()


# ---------------------------------------------------------------- KvBlock, SequenceInfo, CacheStats


def test_a_block_is_a_live_view():
    cache = small()
    (first, tail) = cache.allocate(1, 6).block_ids
    block = cache.block(tail)
    assert isinstance(block, KvBlock)
    assert (block.id, block.num_tokens, block.capacity, block.ref_count) == (tail, 2, 4, 1)
    assert (block.is_full, block.remaining) == (False, 2) and cache.block(first).is_full
    cache.append(1, 2)
    cache.fork(1, 2)
    assert (block.is_full, block.remaining, block.ref_count) == (True, 0, 2)
    cache.free(1)
    assert block.ref_count == 1
    cache.free(2)
    assert (block.ref_count, block.num_tokens, block.state) == (0, 0, "free")
    assert block == cache.block(tail) != cache.block(first) and len({block, cache.block(tail)}) == 1
    assert block != small().block(tail), "of another pool"


@pytest.mark.parametrize("name", ["is_full", "remaining", "ref_count", "num_tokens", "capacity", "id"])
def test_references_change_only_through_the_cache(name):
    with pytest.raises(AttributeError):
        setattr(small().block(0), name, 1)


def test_a_block_has_the_real_buffers():
    cache = PagedKvCache(4, 16, 2, 8, num_layers=3)
    block = cache.block(2)
    assert tuple(block.keys.shape) == tuple(block.values.shape) == (3, 16, 2, 8)
    assert block.keys.dtype == torch.float16
    block.keys[1, 5] = 7.0
    assert (cache.storage.keys(1)[2, 5] == 7.0).all(), "a view, not a copy"


def test_k_and_v_are_really_stored():
    cache = small()
    plan = cache.append_batch([cache.allocate(1, 3).seq_id], counts=3)
    keys, values = torch.randn(3, 1, 2), torch.randn(3, 1, 2)
    cache.write(0, keys, values, plan)
    first, second = cache.get_sequence(1).block_ids
    assert torch.equal(torch.cat([cache.block(first).keys[0, 3:], cache.block(second).keys[0, :2]]), keys)
    assert torch.equal(torch.cat([cache.block(first).values[0, 3:], cache.block(second).values[0, :2]]), values)


def test_sequence_info_is_an_immutable_snapshot():
    cache = small()
    info = cache.allocate(7, 6, priority=2)
    assert isinstance(info, SequenceInfo)
    assert (info.seq_id, info.num_tokens, info.num_blocks, len(info.block_ids)) == (7, 6, 2, 2)
    assert (info.access_count, info.priority, info.num_cached_tokens) == (1, 2, 0)
    touched = cache.touch(7)
    assert touched.access_count == 2 and touched.last_access > info.last_access and info.access_count == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.num_tokens = 3


def test_sequence_infos_are_equal_by_value_blocks_included():
    cache, other = small(), small()
    info = cache.allocate(7, 6)
    assert info == cache.get_sequence(7) == pickle.loads(pickle.dumps(info)) and hash(info) == hash(copy.copy(info))
    other.allocate(7, 4)
    other.allocate(8, 4)
    other.free(7)
    elsewhere = dataclasses.replace(other.allocate(7, 6), last_access=info.last_access)
    assert elsewhere.block_ids != info.block_ids and elsewhere != info


def test_stats_are_an_immutable_snapshot_with_these_meanings():
    cache = small()
    before = cache.stats
    assert before == CacheStats()
    cache.allocate(1, 8)
    cache.allocate(2, 4)
    cache.fork(1, 3)
    cache.append(3, 1)
    cache.free(2)
    cache.evict()
    stats = cache.stats
    assert before == CacheStats()
    assert stats.total_allocations == 4 and stats.total_forks == 1 and stats.total_evictions == 1
    assert stats.total_frees == 1, "the evicted sequence shares its blocks with its fork"
    assert stats.peak_blocks_used == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.total_forks = 0


# ---------------------------------------------------------------- errors


def test_the_exception_tree():
    assert issubclass(OutOfMemory, (PagedKvError, MemoryError)) and issubclass(OutOfMemory, MemoryError)
    assert issubclass(SequenceNotFound, KeyError) and issubclass(SequenceNotFound, PagedKvError)
    assert issubclass(BlockNotFound, KeyError) and issubclass(BlockNotFound, PagedKvError)
    assert issubclass(InvalidOperation, ValueError) and issubclass(InvalidOperation, PagedKvError)


def test_out_of_memory_tells_its_numbers_and_changes_nothing():
    cache = small(10, 16)
    with pytest.raises(OutOfMemory) as caught:
        cache.allocate(1, 13 * 16)
    assert str(caught.value) == "Out of memory: requested 13 blocks, 10 available"
    assert (caught.value.requested, caught.value.available) == (13, 10)
    assert cache.num_sequences == 0 and cache.free_block_count == 10 and cache.stats == CacheStats()
    cache.allocate(1, 9 * 16)
    with pytest.raises(MemoryError) as caught:
        cache.allocate(2, 17)
    assert (caught.value.requested, caught.value.available) == (2, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.append(9, 1),
        lambda cache: cache.append_batch([9]),
        lambda cache: cache.plan([9]),
        lambda cache: cache.commit(9),
        lambda cache: cache.fork(9, 1),
        lambda cache: cache.truncate(9, 0),
        lambda cache: cache.free(9),
        lambda cache: cache.touch(9),
        lambda cache: cache.set_priority(9, 0),
        lambda cache: cache.pin(9),
        lambda cache: cache.unpin(9),
        lambda cache: cache.apply_streaming_llm(9, 1, 1),
        lambda cache: cache.get_sequence(9),
    ],
)
def test_an_unknown_sequence_is_named(call):
    with pytest.raises(SequenceNotFound) as caught:
        call(small())
    assert str(caught.value) == "Sequence not found: S9" and caught.value.seq_id == 9
    with pytest.raises(KeyError):
        call(small())


def test_an_unknown_block_is_named():
    with pytest.raises(BlockNotFound) as caught:
        small(9).block(9)
    assert str(caught.value) == "Block not found: B9" and caught.value.block_id == 9


def test_what_the_state_does_not_allow_is_an_invalid_operation():
    cache = small()
    cache.allocate(1, 4)
    cache.allocate(2, 4)
    for call in (lambda: cache.allocate(1, 1), lambda: cache.fork(1, 2), lambda: cache.fork(1, 1)):
        with pytest.raises(InvalidOperation) as caught:
            call()
        assert str(caught.value) in {f"Invalid operation: sequence S{number} exists already" for number in (1, 2)}
    with pytest.raises(SequenceNotFound):
        cache.fork(3, 4)
    with pytest.raises(InvalidOperation, match="no sequence to evict"):
        small().evict()


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize(("given", "clamped"), [(0.5, 0.5), (1.5, 1.0), (-3, 0.0), (float("inf"), 1.0), (1, 1.0)])
def test_the_threshold_is_clamped(given, clamped):
    assert small(eviction_threshold=given).eviction_threshold == clamped


def test_utilization_and_need_of_eviction():
    cache = small(10, 4)
    assert cache.eviction_threshold == 0.9 and cache.utilization == 0.0 and not cache.needs_eviction
    cache.allocate(1, 32)
    assert cache.utilization == 0.8 and not cache.needs_eviction
    cache.append(1, 4)
    assert cache.utilization == 0.9 and cache.needs_eviction


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_not_copied(copied):
    with pytest.raises(InvalidOperation, match=r"a PagedKvCache cannot be copied or pickled: fork\(\) its sequences"):
        copied(small())


def test_a_pool_of_no_blocks():
    cache = small(0)
    assert cache.total_blocks == cache.free_block_count == cache.used_block_count == 0
    assert cache.utilization == 0.0 and not cache.needs_eviction and cache.total_memory_bytes == 0
    assert cache.allocate(1, 0).num_blocks == 0
    with pytest.raises(OutOfMemory) as caught:
        cache.append(1, 1)
    assert (caught.value.requested, caught.value.available) == (1, 0)
    assert cache.evict_to_threshold(0) == [] and cache.match_prefix([1, 2]) == 0 and "0/0" in str(cache)
    cache.check()


@pytest.mark.parametrize("block_size", [2**20, 2**31 - 1])
def test_books_that_do_not_fit_into_memory(block_size):
    with pytest.raises(OutOfMemory, match=f"the books of {2**31 - 2} blocks of {block_size} tokens") as caught:
        BlockManager(2**31 - 2, block_size)
    assert caught.value.requested == 2**31 - 2


def test_memory_of_a_block():
    cache = PagedKvCache(2, 16, 32, 128)
    assert cache.block_memory_bytes == 262_144
    assert PagedKvCache(2, 16, 32, 128, num_layers=2).block_memory_bytes == 2 * 262_144
    cache.allocate(1, 3)
    assert (cache.used_memory_bytes, cache.total_memory_bytes) == (262_144, 524_288)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (40, 10)])
def test_allocate_takes_just_enough_blocks(tokens, blocks):
    cache = small()
    assert cache.allocate(1, tokens).num_blocks == cache.used_block_count == blocks


def test_append_takes_a_block_only_when_the_last_one_is_full():
    cache = small()
    before = cache.allocate(1, 3)
    assert cache.append(1, 1).num_blocks == 1
    after = cache.append(1, 1)
    assert after.num_blocks == 2 and after.num_tokens == 5
    assert after.access_count == 3 and after.last_access > before.last_access


def test_free_gives_references_back():
    cache = small()
    cache.allocate(1, 8)
    cache.fork(1, 2)
    cache.free(1)
    assert cache.used_block_count == 2 and 1 not in cache and 2 in cache
    cache.free(2)
    assert cache.used_block_count == 0 and cache.free_block_count == 10


def test_a_fork_shares_every_block_and_the_first_write_copies():
    cache = small()
    info = cache.allocate(1, 6)
    twin = cache.fork(1, 2)
    assert twin.block_ids == info.block_ids and cache.used_block_count == 2
    assert [cache.block(block).ref_count for block in info.block_ids] == [2, 2]
    after = cache.append(2, 1)
    assert after.block_ids[0] == info.block_ids[0] and after.block_ids[1] != info.block_ids[1]
    assert cache.stats.blocks_copied == 1 and cache.get_sequence(1) == info


def test_flaw_a_fork_followed_by_an_append_wrote_into_the_shared_block():
    cache = small()
    cache.allocate(1, 5)
    keys = torch.arange(10.0).reshape(5, 1, 2)
    cache.write(0, keys, -keys, cache.plan([1]))
    cache.fork(1, 2)
    new = torch.full((1, 1, 2), 99.0)
    cache.write(0, new, new, cache.append_batch([2], counts=1))
    tails = [cache.block(cache.get_sequence(seq_id).block_ids[1]).keys[0, :2, 0, 0].tolist() for seq_id in (1, 2)]
    assert tails[0][0] == 8.0 and tails[0][1] != 99.0, "the source is untouched"
    assert tails[1] == [8.0, 99.0], "the fork has a copy"


# ---------------------------------------------------------------- eviction


def filled(strategy):
    """Four sequences that every strategy ranks in another order."""
    cache = small(40, strategy=strategy)
    for seq_id, (tokens, priority) in enumerate([(5, 2), (9, 1), (3, 0), (9, 1)]):
        cache.allocate(seq_id, tokens, priority=priority)
    for seq_id in (0, 0, 2, 1):
        cache.touch(seq_id)
    return cache


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        (LRU(), [3, 0, 2, 1]),
        (LFU(), [3, 1, 2, 0]),
        (LongestFirst(), [1, 3, 0, 2]),
        (Priority(3), [2, 3, 1, 0]),
        (StreamingLLM(1, 1), [3, 0, 2, 1]),
    ],
)
def test_order_of_eviction(strategy, order):
    cache = filled(strategy)
    assert cache.select_eviction_target() == order[0] and cache.num_sequences == 4
    assert [cache.evict() for _ in order] == order
    assert cache.select_eviction_target() is None and cache.stats.total_evictions == 4 and cache.used_block_count == 0


def test_evict_to_threshold_returns_the_ids_in_order():
    cache = filled(LRU())  # 2, 3, 1 and 3 blocks of 40
    assert cache.evict_to_threshold(0.2) == [3]
    assert cache.utilization == 0.15
    assert cache.evict_to_threshold(0.1) == [0]
    assert cache.evict_to_threshold(0.1) == []
    assert cache.evict_to_threshold(0) == [2, 1]
    assert cache.evict_to_threshold() == []


def test_evict_to_threshold_defaults_to_the_own_threshold():
    cache = small(10, 4, eviction_threshold=0.3)
    for seq_id in range(5):
        cache.allocate(seq_id, 8)
    assert cache.evict_to_threshold() == [0, 1, 2, 3] and cache.utilization == 0.2


def test_flaw_a_priority_could_be_set_on_no_sequence():
    cache = filled(Priority(3))
    assert cache.set_priority(0, 0).priority == 0 and cache.evict() == 0, "older than sequence 2"
    for wrong in (3, -1):
        with pytest.raises(InvalidOperation, match=f"priority: expected an int in 0 … 2, got {wrong}"):
            cache.set_priority(1, wrong)
        with pytest.raises(InvalidOperation, match="priority: expected an int in 0 … 2"):
            cache.allocate(9, 1, priority=wrong)
    assert 9 not in cache and cache.get_sequence(1).priority == 1


class Counting(LRU):
    """LRU that notes how many sequences it was asked about."""

    def __init__(self):
        object.__setattr__(self, "asked", [])

    def score_sequences(self, sequences, now):
        self.asked.append(len(sequences))
        return super().score_sequences(sequences, now)


def test_flaw_eviction_scanned_every_sequence():
    strategy = Counting()
    cache = small(2000, strategy=strategy)
    for seq_id in range(1000):
        cache.allocate(seq_id, 1)
    assert strategy.asked == [], "nothing is scored before somebody asks"
    assert [cache.evict() for _ in range(100)] == list(range(100))
    assert strategy.asked == [1000], "each is scored once, and not again for each eviction"
    cache.touch(100)
    cache.append(500, 1)
    assert cache.evict() == 101
    assert strategy.asked == [1000, 2], "only what changed is scored again"
    cache.select_eviction_target()
    assert strategy.asked == [1000, 2]


# ---------------------------------------------------------------- streaming


@pytest.mark.parametrize(
    ("tokens", "sink", "window", "dropped", "blocks"),
    [(20, 4, 8, 8, 3), (20, 3, 6, 11, 3), (20, 4, 16, 0, 5), (20, 30, 1, 0, 5), (20, 1, 1, 18, 2), (17, 0, 4, 13, 2)],
)
def test_streaming_numbers(tokens, sink, window, dropped, blocks):
    cache = small()
    cache.allocate(1, tokens)
    assert cache.apply_streaming_llm(1, sink, window) == dropped
    info = cache.get_sequence(1)
    assert info.num_tokens == tokens - dropped and info.num_dropped_tokens == dropped
    assert info.num_blocks == cache.used_block_count == blocks, "blocks that hold only dropped tokens are free"
    assert cache.apply_streaming_llm(1, sink, window) == 0
    cache.check()


@pytest.mark.parametrize("tokens", range(9, 26))
@pytest.mark.parametrize(("sink", "window"), [(0, 3), (1, 5), (3, 5), (4, 4), (5, 2), (6, 0)])
def test_flaw_streaming_lost_tokens_off_the_edge_of_a_block(tokens, sink, window):
    cache = small()
    cache.allocate(1, tokens)
    numbers = torch.arange(float(tokens)).reshape(-1, 1, 1).expand(-1, 1, 2)
    cache.write(0, numbers, numbers, cache.plan([1]))
    cache.apply_streaming_llm(1, sink, window)
    kept = list(range(tokens))[:sink] + list(range(tokens))[tokens - window :]
    plan = cache.plan([1], len(kept))
    found, _ = cache.storage.gather(0, plan.slot_mapping)
    assert found[:, 0, 0].tolist() == kept
    assert plan.positions.tolist() == list(range(len(kept))), "positions inside the cache"


# ---------------------------------------------------------------- the report


def test_the_report():
    cache = filled(Priority(3))
    cache.fork(0, 9)
    cache.evict()
    text = str(cache)
    for part in (
        "PagedKvCache",
        "Strategy: Priority(3)",
        "Blocks: 8/40 used (20.0%)",
        "Memory: 0.00 MB / 0.00 MB",
        "Sequences: 4 active",
        "allocations=9, frees=1, evictions=1, forks=1, peak=9",
    ):
        assert part in text, text
    assert "Memory: 0.52 MB / 1.05 MB" in str(half_used())


def half_used():
    cache = PagedKvCache(4, 16, 32, 128)
    cache.allocate(1, 32)
    return cache
