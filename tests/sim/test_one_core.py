"""The simulator and the caches that serve models are one: the same calls give the same evictions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.user_strategies import Modulo, PlainSieve, Recorder, SmallestFirst
from tests.sim.queue_oracles import looping_requests
from tests.sim.traces import chained_requests

from pagedkv import (
    FIFO,
    GDSF,
    LFU,
    LRU,
    S3FIFO,
    SIEVE,
    TTL,
    Adaptive,
    BlockManager,
    BlockRemoved,
    LongestFirst,
    PagedKvCache,
    Priority,
    StreamingLLM,
)
from pagedkv.control.content_cache import ContentCache

BUILT_IN = [
    LRU(),
    LFU(),
    LongestFirst(),
    Priority(3),
    StreamingLLM(1, 2),
    FIFO(),
    S3FIFO(),
    SIEVE(),
    GDSF(),
    TTL(5),
    Adaptive(),
]
OF_USERS = [SmallestFirst(), Modulo(3), PlainSieve()]


def as_arrays(requests):
    offsets = np.cumsum([0, *map(len, requests)])
    return np.array([block for request in requests for block in request], np.int64), offsets.astype(np.int64)


def removed_by(cache):
    heard = []
    cache.subscribe(lambda event: heard.append(int(event.block_id)) if isinstance(event, BlockRemoved) else None)
    return heard


def by_run(requests, blocks, strategy):
    cache = ContentCache(blocks, strategy)
    heard = removed_by(cache)
    hits = cache.run(*as_arrays(requests)).tolist()
    cache.check()
    return hits, heard


def by_calls(cache, requests, serve):
    """Allocate, compute, commit, free, one request after the other; block b holds the tokens b * size and on"""
    heard, hits, size = removed_by(cache), [], cache.block_size
    for seq_id, request in enumerate(requests):
        tokens = [block * size + i for block in request for i in range(size)]
        info = cache.allocate(seq_id, tokens)
        hits.append(info.num_cached_tokens // size)
        serve(seq_id)
        cache.free(seq_id)
    cache.check()
    return hits, heard


def by_manager(requests, blocks, strategy, size):
    manager = BlockManager(blocks, size, strategy=strategy)
    return by_calls(manager, requests, manager.commit)


def by_cache(requests, blocks, strategy, size):
    cache = PagedKvCache(blocks, size, 1, 4, strategy=strategy, dtype="float32")

    def serve(seq_id):
        plan = cache.plan([seq_id])
        fresh = torch.full((len(plan.slot_mapping), 1, 4), float(seq_id))
        cache.write(0, fresh, -fresh, plan)
        cache.commit(plan)

    return by_calls(cache, requests, serve)


def by_content_calls(requests, blocks, strategy):
    cache = ContentCache(blocks, strategy)
    return by_calls(cache, requests, cache.commit)


@st.composite
def cases(draw, ends):
    """Requests that fit, and a capacity; a request may end in a block of its own, which a model must compute anew."""
    requests = draw(chained_requests(max_requests=40, max_fresh=5))
    blocks = draw(st.integers(2, 25))
    fresh = sum(map(len, requests))
    if not ends:
        return [request[:blocks] for request in requests if request], blocks
    return [[*request[: blocks - 1], fresh + i] for i, request in enumerate(requests)], blocks


@pytest.mark.parametrize("strategy", BUILT_IN + OF_USERS, ids=lambda strategy: type(strategy).__name__)
@settings(max_examples=settings.default.max_examples // 12)
@given(case=cases(ends=True))
def test_simulator_and_caches_evict_alike(strategy, case):
    requests, blocks = case
    expected = by_run(requests, blocks, copy.deepcopy(strategy))
    for size in (1, 3):
        assert by_manager(requests, blocks, copy.deepcopy(strategy), size) == expected
        assert by_cache(requests, blocks, copy.deepcopy(strategy), size) == expected


@pytest.mark.parametrize("strategy", BUILT_IN + OF_USERS, ids=lambda strategy: type(strategy).__name__)
@settings(max_examples=settings.default.max_examples // 6)
@given(case=cases(ends=False))
def test_a_whole_run_is_its_calls(strategy, case):
    requests, blocks = case
    expected = by_run(requests, blocks, copy.deepcopy(strategy))
    assert by_content_calls(requests, blocks, copy.deepcopy(strategy)) == expected
    silent = ContentCache(blocks, copy.deepcopy(strategy))
    assert silent.run(*as_arrays(requests)).tolist() == expected[0]
    assert silent.stats.blocks_reclaimed == len(expected[1])


@pytest.mark.parametrize(
    "strategy",
    [LRU(), LFU(), LongestFirst(), FIFO(), Priority(3), TTL(5)],
    ids=lambda strategy: type(strategy).__name__,
)
@settings(max_examples=settings.default.max_examples // 6)
@given(case=cases(ends=False))
def test_a_compiled_rule_and_its_twin_in_numpy_evict_alike(strategy, case):
    assert by_run(*case, Recorder(strategy)) == by_run(*case, strategy)


def content_removed(requests, blocks, strategy):
    """What was removed, by content: blocks that hooks give up are taken again in another order of ids."""
    cache, holds, removed = ContentCache(blocks, strategy), {}, []

    def hear(event):
        if isinstance(event, BlockRemoved):
            removed.append(holds.pop(event.block_id))
        else:
            holds[event.block_id] = event.token_ids[0]

    cache.subscribe(hear)
    hits = cache.run(*as_arrays(requests)).tolist()
    cache.check()
    return hits, removed


@settings(max_examples=settings.default.max_examples // 2)
@given(requests=chained_requests(max_requests=40), blocks=st.integers(1, 25))
def test_sieve_in_plain_python_on_hooks_is_the_compiled_one(requests, blocks):
    assert content_removed(requests, blocks, PlainSieve()) == content_removed(requests, blocks, SIEVE())


@pytest.mark.parametrize("blocks", [1, 10, 40, 150])
def test_the_two_sieves_on_longer_traces(blocks):
    requests = looping_requests(7)
    expected = content_removed(requests, blocks, SIEVE())
    assert content_removed(requests, blocks, PlainSieve()) == expected and len(expected[1]) > 200


def test_evictions_happen_and_differ():
    requests = looping_requests(3)
    orders = {str(strategy): tuple(by_run(requests, 60, strategy)[1]) for strategy in BUILT_IN}
    assert min(map(len, orders.values())) > 100
    assert orders["LRU"] == orders["StreamingLLM(sink=1, window=2)"] == orders["Priority(3)"] == orders["TTL(ticks=5)"]
    assert len(set(orders.values())) == 8
