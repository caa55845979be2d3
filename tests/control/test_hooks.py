"""The hooks of a strategy: what they hear, in every cache alike, and what happens when they fail."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import (
    LRU,
    BlockManager,
    BlockRemoved,
    BlockStored,
    InvalidOperation,
    OutOfMemory,
    PagedKvCache,
)
from pagedkv.control.content_cache import ContentCache


class Spy(LRU):
    """LRU that notes every hook by the content of the blocks; `on_reclaim` answers what it is told to."""

    def __init__(self):
        self.__dict__.update(heard=[], hashes={}, cache=None, answer=lambda: None, fails=())

    def _contents(self, blocks):
        size = self.cache.block_size
        return [int(self.cache._state.contents[block * size]) // size for block in blocks.block_id.tolist()]

    def _note(self, hook, blocks):
        if hook in self.fails:
            raise ZeroDivisionError(hook)
        contents = self._contents(blocks)
        self.heard.append((hook, *contents))
        self.hashes.update(zip(contents, blocks.prefix_hash.tolist(), strict=True))

    def on_hit(self, blocks, now):
        self._note("hit", blocks)

    def on_store(self, blocks, now):
        self._note("store", blocks)

    def on_reclaim(self, block, now):
        self._note("reclaim", block)
        return self.answer()


def spied(kind, num_blocks, block_size=1, **options):
    spy = Spy()
    size = () if kind is ContentCache else (block_size,)
    cache = kind(num_blocks, *size, strategy=spy, **options)
    spy.__dict__["cache"] = cache
    return cache, spy


def tokens(cache, request):
    return [block * cache.block_size + i for block in request for i in range(cache.block_size)]


def serve(cache, seq_id, request):
    """One request from the first call to the last; a model leaves its last token to compute, a trace does not."""
    if isinstance(cache, ContentCache):
        return cache.run(np.array(request), np.array([0, len(request)]))
    cache.allocate(seq_id, tokens(cache, request))
    cache.commit(seq_id)
    return cache.free(seq_id)


CACHES = {
    "BlockManager": lambda blocks: spied(BlockManager, blocks, 3),
    "PagedKvCache": lambda blocks: spied(PagedKvCache, blocks, 3, num_kv_heads=1, head_dim=2),
    "ContentCache": lambda blocks: spied(ContentCache, blocks),
}


@pytest.fixture(params=CACHES)
def make(request):
    return CACHES[request.param]


def test_every_hook_is_called_when_its_docstring_says(make):
    cache, spy = make(6)
    for seq_id, request in enumerate([[1, 2, 90], [1, 2, 91], [3, 92], [1, 2, 3, 93]]):
        serve(cache, seq_id, request)
    assert spy.heard == [
        ("store", 1, 2, 90),
        ("hit", 1, 2),
        ("store", 91),
        ("store", 3, 92),
        # [3] under [1, 2] is another block than [3] at the root; six places: two are needed, none is free.
        ("reclaim", 90),
        ("reclaim", 91),
        ("hit", 1, 2),
        ("store", 3, 93),
    ]
    cache.check()


def test_hooks_and_subscribers_hear_the_same(make):
    cache, spy = make(12)
    events, holds = [], {}

    def hear(event):
        cache.check()  # consistent whenever a subscriber is called
        if isinstance(event, BlockStored):
            holds[event.block_id] = event.token_ids[0] // cache.block_size
            events.append(("store", holds[event.block_id]))
        else:
            events.append(("reclaim", holds.pop(event.block_id)))

    cache.subscribe(hear)
    rng = np.random.default_rng(4)
    for seq_id in range(120):
        chain = [int(rng.integers(0, 3))]
        for _ in range(int(rng.integers(0, 4))):
            chain.append(chain[-1] * 3 + 10 + int(rng.integers(0, 2)))
        serve(cache, seq_id, [*chain, 10_000 + seq_id])
    told = [(call[0], block) for call in spy.heard if call[0] != "hit" for block in call[1:]]
    assert told == events and cache.stats.blocks_reclaimed == [call[0] for call in spy.heard].count("reclaim") > 50
    found = sum(len(call) - 1 for call in spy.heard if call[0] == "hit")
    assert found * cache.block_size == cache.stats.prefix_hit_tokens
    cache.check()


def test_a_request_of_a_trace_larger_than_the_cache_asks_too():
    cache, spy = spied(ContentCache, 3)
    serve(cache, 0, [1, 2])
    serve(cache, 1, [1, 3, 4, 5, 6])
    assert spy.heard == [("store", 1, 2), ("reclaim", 2), ("hit", 1), ("store", 3, 4)]


def test_what_a_request_finds_is_never_offered():
    cache, spy = spied(ContentCache, 4)
    serve(cache, 0, [1, 2])
    serve(cache, 1, [7, 8])
    serve(cache, 2, [1, 3, 4])  # must give up 2, which makes a leaf of the 1 that it found
    assert spy.heard[2:] == [("reclaim", 2), ("reclaim", 8), ("hit", 1), ("store", 3, 4)]


def test_a_block_that_is_kept_is_asked_about_again(make):
    cache, spy = make(3)
    serve(cache, 0, [1])
    serve(cache, 1, [2])
    serve(cache, 2, [3])
    answers = iter([100, 50, None, None])
    spy.__dict__["answer"] = lambda: next(answers)
    serve(cache, 3, [4, 5])
    asked = [call[1] for call in spy.heard if call[0] == "reclaim"]
    assert asked == [1, 2, 3, 2]  # 1 goes to 100, 2 to 50, 3 is let go, then 2 comes first
    cache.check()


def test_a_strategy_may_keep_every_block_of_a_large_pool_once():
    class Once(LRU):
        seen = set()

        def on_reclaim(self, block, now):
            number = int(block.block_id[0])
            return None if number in self.seen else self.seen.add(number) or 2**40 + number

    cache = BlockManager(10_500, 1, strategy=Once())
    for seq_id in range(10_500):
        cache.allocate(seq_id, [seq_id])
        cache.commit(seq_id)
        cache.free(seq_id)
    cache.allocate(0, 1)
    assert len(Once.seen) == 10_500 and cache.stats.blocks_reclaimed == 1


# ---------------------------------------------------------------- prefix hashes


def hashes_of(cache, spy, salt, seq_id):
    cache.allocate(seq_id, [1, 2], cache_salt=salt)
    cache.commit(seq_id)
    cache.free(seq_id)
    return spy.hashes[1], spy.hashes[2]


def test_a_prefix_hash_names_content_for_good():
    cache, spy = spied(BlockManager, 4)
    first = {salt: hashes_of(cache, spy, salt, 0) for salt in map(str, range(40))}
    assert len({one for pair in first.values() for one in pair}) == 80
    cache.clear_prefix_cache()
    again = {salt: hashes_of(cache, spy, salt, 0) for salt in map(str, reversed(range(40)))}
    assert again == first
    other, spy_of_other = spied(BlockManager, 9)
    assert hashes_of(other, spy_of_other, "7", 3) == first["7"]
    cache.allocate(1, [2, 1, 3])
    cache.commit(1)
    assert spy.hashes[2] != first["0"][1]


def test_prefix_hashes_are_for_strategies_with_hooks():
    class Curious(LRU):
        def score_blocks(self, blocks, now):
            return blocks.prefix_hash

    with pytest.raises(InvalidOperation, match="prefix_hash is kept for strategies with hooks"):
        serve(BlockManager(4, 1, strategy=Curious()), 0, [1])


# ---------------------------------------------------------------- hooks that fail


def filled(make, blocks=4):
    cache, spy = make(blocks)
    for seq_id in range(blocks):
        serve(cache, seq_id, [seq_id + 1])
    spy.heard.clear()
    return cache, spy


def is_whole(cache, blocks):
    cache.check()
    assert cache.used_block_count == 0 and cache.free_block_count == blocks and cache.num_sequences == 0


def test_a_strategy_that_keeps_for_ever(make):
    cache, spy = filled(make)
    spy.__dict__["answer"] = lambda: 7
    for _ in range(3):
        with pytest.raises(InvalidOperation, match="Spy.on_reclaim: expected to evict some block"):
            serve(cache, 9, [8])
    is_whole(cache, 4)
    assert cache.cached_block_count == 4 and cache.stats.blocks_reclaimed == 0
    spy.__dict__["answer"] = lambda: None
    serve(cache, 9, [8])
    is_whole(cache, 4)


WRONG = [1.5, float("nan"), np.float64(3), "x", True, [3], np.zeros(2, np.int64), np.zeros((1, 1)), 2**63, -(2**63) - 1]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_wrong_answer_is_named(make, wrong):
    cache, spy = filled(make)
    answers = iter([None, wrong])
    spy.__dict__["answer"] = lambda: next(answers)
    removed = []
    cache.subscribe(lambda event: removed.append(event) if isinstance(event, BlockRemoved) else None)
    with pytest.raises(InvalidOperation, match="Spy.on_reclaim's score: expected an int"):
        serve(cache, 9, [8, 9])
    is_whole(cache, 4)
    assert len(removed) == cache.stats.blocks_reclaimed == 0  # what it had let go of before is there as well
    spy.__dict__["answer"] = lambda: None
    serve(cache, 9, [8, 9])
    is_whole(cache, 4)


@pytest.mark.parametrize("hook", ["hit", "store", "reclaim"])
def test_an_exception_in_a_hook(make, hook):
    cache, spy = filled(make)
    held, faults = set(np.flatnonzero(cache.snapshot().indexed).tolist()), 0
    cache.subscribe(lambda it: held.add(it.block_id) if isinstance(it, BlockStored) else held.remove(it.block_id))
    spy.__dict__["fails"] = {hook}
    for i in range(40):  # the log of a call that failed is not carried along
        try:
            serve(cache, 100 + i, [i % 3 + 1, 50 + i])
        except ZeroDivisionError as error:
            faults += 1
            assert str(error) == hook
            if 100 + i in cache:  # commit is done when on_store hears of it
                assert hook == "store"
                cache.free(100 + i)
        cache.check()
        assert held == set(np.flatnonzero(cache.snapshot().indexed).tolist())
    assert faults > 10
    spy.__dict__["fails"] = ()
    serve(cache, 9, [8, 9])
    is_whole(cache, 4)


def test_an_allocation_that_its_hook_refuses_never_was():
    cache, spy = spied(BlockManager, 6, 2)
    serve(cache, 0, [1, 2, 3])
    spy.__dict__["fails"] = {"hit"}
    with pytest.raises(ZeroDivisionError):
        cache.allocate(7, tokens(cache, [1, 2, 4]))
    assert 7 not in cache and cache.match_prefix(tokens(cache, [1, 2, 3, 9])) == 6
    spy.__dict__["fails"] = ()
    assert cache.allocate(7, tokens(cache, [1, 2, 4])).num_cached_tokens == 4
    cache.check()


# ---------------------------------------------------------------- nothing is given up in vain


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.allocate(9, 7),
        lambda cache: cache.allocate(9, [1, 5, 6, 7, 8, 9]),
        lambda cache: cache.append(100, 7),
        lambda cache: cache.append_batch([100, 101], counts=[3, 4]),
        lambda cache: cache.allocate(100, 3),
        lambda cache: cache.append(100, "x"),
        lambda cache: cache.append_batch([100, 77], counts=[1, 1]),
    ],
)
def test_a_call_that_fails_gives_nothing_up(call):
    cache, spy = spied(BlockManager, 6)
    for seq_id in (100, 101):
        cache.allocate(seq_id, 1)
    for seq_id in range(4):
        serve(cache, seq_id, [seq_id + 1])
    spy.heard.clear()
    before = cache.snapshot()
    with pytest.raises((OutOfMemory, InvalidOperation, KeyError)):
        call(cache)
    assert spy.heard == [] and cache.cached_block_count == 4 and cache.stats == before.stats
    cache.check()
    cache.append_batch([100, 101], counts=[1, 3])
    assert [call[0] for call in spy.heard] == ["reclaim"] * 4


def test_streaming_asks_before_it_copies():
    cache, spy = spied(BlockManager, 5)
    cache.allocate(0, [1, 2, 3])
    cache.fork(0, 1)
    serve(cache, 2, [8])
    serve(cache, 3, [9])
    spy.heard.clear()
    assert cache.apply_streaming_llm(1, 1, 1) == 1
    assert spy.heard == [("reclaim", 8)]
    cache.check()
