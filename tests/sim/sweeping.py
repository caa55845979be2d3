"""A small trace and strategies that misbehave; a module of its own so that other processes can import them."""

from __future__ import annotations

import os

import numpy as np

from pagedkv.control.strategies import LRU
from pagedkv.sim.trace import NO_SESSION, Trace


def small_trace(seed: int = 0, num_requests: int = 300) -> Trace:
    """Random walks down a random tree: chained ids, dense in the order of first appearance."""
    rng = np.random.default_rng(seed)
    children: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    requests = []
    for _ in range(num_requests):
        request, at = [], -1
        for step in rng.zipf(1.7, rng.integers(1, 9)) % 12:
            if (at, step) not in children:
                children[at, step] = len(parents)
                parents.append(at)
            at = children[at, step]
            request.append(at)
        requests.append(request)
    lengths = np.array([len(request) for request in requests])
    return Trace(
        name="small",
        format="mooncake",
        block_tokens=16,
        times=np.arange(num_requests, dtype=np.float64),
        input_tokens=lengths * 16 - 5,
        output_tokens=np.full(num_requests, 20),
        sessions=np.full(num_requests, NO_SESSION),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        ids=np.concatenate(requests).astype(np.int32),
        parents=np.array(parents, np.int32),
    )


class Mine(LRU):
    """A good one: scores as LRU does."""


class WrongShape(LRU):
    def score_blocks(self, blocks, now):
        return blocks.last_access[:-1]


class NotANumber(LRU):
    def score_blocks(self, blocks, now):
        return blocks.last_access * np.nan


class Raises(LRU):
    def score_blocks(self, blocks, now):
        raise LookupError("no such table")


class RaisesLate(LRU):
    """Works over the first requests, so that it fails where the work is done."""

    def score_blocks(self, blocks, now):
        if now > 50:
            raise LookupError("no such table")
        return blocks.last_access


class Learns(LRU):
    """Keeps a state from call to call: the more it has seen, the more it turns its mind."""

    def __init__(self):
        self.seen = 0

    def score_blocks(self, blocks, now):
        self.seen += 1
        return blocks.last_access if self.seen < 100 else -blocks.last_access


class Dies(LRU):
    """Ends its process, unless that is the one that the tests run in."""

    home = os.getpid()

    def score_blocks(self, blocks, now):
        if now > 50:
            os._exit(7)
        return blocks.last_access


class NeedsArguments(LRU):
    def __init__(self, size):
        self.size = size


class NoStrategy:
    pass
