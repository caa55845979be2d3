"""Every built-in strategy decides as it always did: replays and random calls against frozen digests.

``golden_replays.json`` holds them. A change that is meant to decide otherwise writes it anew, and says so::

    PYTHONPATH=src python tests/control/test_golden_replays.py > tests/control/golden_replays.json
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from pagedkv import BlockManager, BlockRemoved, BlockStored, InvalidOperation, OutOfMemory, parse_strategy
from pagedkv.control.content_cache import ContentCache
from pagedkv.sim import read_trace

GOLDEN = Path(__file__).with_name("golden_replays.json")
TRACES = Path(__file__).parents[3] / "shared" / "traces"

STRATEGIES = (
    "lru",
    "lfu",
    "longest_first",
    "priority:levels=4",
    "streaming_llm:sink=2,window=8",
    "fifo",
    "s3fifo",
    "sieve",
    "gdsf",
    "ttl:ticks=40",
    "adaptive",
)
CAPACITIES = {
    "mooncake_conversation": (1_000, 10_000, 60_000),
    "coding_agents": (500, 4_000, 20_000),
    "random": (1, 7, 60, 500, 3_000),
}


class Digest:
    """What was decided, as a few letters"""

    def __init__(self):
        self.sha = hashlib.sha256()

    def add(self, *what):
        for part in what:
            self.sha.update(np.asarray(part, np.int64).tobytes() if not isinstance(part, str) else part.encode())

    def __str__(self):
        return self.sha.hexdigest()[:16]


def random_requests(seed, count=6_000):
    """Requests that go on where earlier ones stopped, popular ones more often; then other ones become popular."""
    draw, fresh = random.Random(seed), iter(range(10**9))
    known, requests = [[]], []
    for i in range(count):
        if i % 2_000 == 1_999:
            known = known[-20:]
        known_one = known[int(len(known) * draw.random() ** 3)]
        request = known_one[: int(draw.random() * 1.3 * len(known_one))]
        request = request + [next(fresh) for _ in range(int(draw.random() * 8))]
        known.append(request[:40])
        requests.append(request)
    return np.array(sum(requests, []), np.int64), np.cumsum([0, *map(len, requests)])


def requests_of(source):
    if source == "random":
        return random_requests(seed=11)
    trace = read_trace(TRACES / f"{source}.jsonl.gz")
    return trace.ids, trace.offsets


def replays(strategy, requests, capacities):
    """Whole replays at each capacity: the hits of every request and how many blocks were reclaimed"""
    digest = Digest()
    for blocks in capacities:
        cache = ContentCache(blocks, parse_strategy(strategy))
        digest.add(cache.run(*requests), cache.stats.blocks_reclaimed, cache.cached_block_count)
    return str(digest)


class Caller:
    """Calls a cache at random, as a busy server might, and notes what comes of it"""

    def __init__(self, strategy, seed, blocks, block_size):
        self.chance, self.digest = random.Random(seed), Digest()
        self.cache = BlockManager(blocks, block_size, strategy=parse_strategy(strategy), on_full="evict")
        self.cache.subscribe(self.hear)
        self.most = blocks * block_size // 3

    def hear(self, event):
        if isinstance(event, (BlockStored, BlockRemoved)):
            self.digest.add(type(event).__name__, event.block_id)

    def below(self, limit):
        return int(self.chance.random() * limit)

    def tokens(self):
        """A prompt: one of a few long texts up to some place, then something of its own"""
        text = self.below(5)
        shared = [text * 7 % 10 + place % 3 for place in range(self.below(self.most))]
        return shared + [self.below(3) for _ in range(1 + self.below(6))]

    def step(self, seq_id):
        cache, live = self.cache, self.cache.sequence_ids
        other = live[self.below(len(live))] if live else 0
        chance = self.chance.random()
        if chance < 0.35 or not live:
            info = cache.allocate(seq_id, self.tokens(), priority=self.below(4), cache_salt="ab"[self.below(2)])
            self.digest.add(info.block_ids, info.num_cached_tokens)
            cache.commit(seq_id)
        elif chance < 0.55:
            self.digest.add(cache.append(other, [self.below(3) for _ in range(1 + self.below(5))]).block_ids)
            cache.commit(other)
        elif chance < 0.60:
            self.digest.add(cache.append(other, 1 + self.below(4)).block_ids)
        elif chance < 0.66:
            self.digest.add(cache.fork(other, seq_id).block_ids)
        elif chance < 0.72:
            info = cache.get_sequence(other)
            cache.truncate(other, self.below(info.num_tokens + 1))
        elif chance < 0.76:
            cache.touch(other)
        elif chance < 0.79:
            cache.pin(other)
        elif chance < 0.82:
            cache.unpin(other)
        elif chance < 0.84:
            self.digest.add(cache.apply_streaming_llm(other, self.below(4), self.below(9)))
        elif chance < 0.87:
            self.digest.add(cache.evict())
        elif chance < 0.872:
            self.digest.add(cache.clear_prefix_cache())
        else:
            cache.free(other)

    def run(self, calls=1_500):
        for seq_id in range(calls):
            try:
                self.step(seq_id)
            except (InvalidOperation, OutOfMemory) as error:
                self.digest.add(type(error).__name__)
            self.digest.add(self.cache.sequence_ids)
        self.cache.check()
        stats = self.cache.stats
        self.digest.add(stats.total_allocations, stats.total_frees, stats.total_evictions, stats.total_forks)
        self.digest.add(stats.prefix_hits, stats.prefix_hit_tokens, stats.partial_hit_tokens)
        self.digest.add(stats.blocks_reclaimed, stats.blocks_copied, self.cache.sequence_ids)
        return str(self.digest)


def calls(strategy):
    """Random calls of small caches, with blocks of one token and of several"""
    return "-".join(Caller(strategy, *setting).run() for setting in ((1, 40, 2), (2, 150, 1), (3, 90, 4)))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("source", CAPACITIES)
def test_replays_are_equal_to_the_bit(source, golden):
    if source != "random" and not TRACES.exists():
        pytest.skip("the traces are not at hand")
    requests = requests_of(source)
    found = {strategy: replays(strategy, requests, CAPACITIES[source]) for strategy in STRATEGIES}
    assert found == golden[source]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_calls_are_equal_to_the_bit(strategy, golden):
    assert calls(strategy) == golden["calls"][strategy]


if __name__ == "__main__":
    everything = {source: requests_of(source) for source in CAPACITIES}
    answer = {
        source: {strategy: replays(strategy, requests, CAPACITIES[source]) for strategy in STRATEGIES}
        for source, requests in everything.items()
    }
    answer["calls"] = {strategy: calls(strategy) for strategy in STRATEGIES}
    json.dump(answer, sys.stdout, indent=1)
    print()
