"""Slow oracles, each straight from the definition: requests as lists of content ids in, hits per request out.

A hit is a block of the longest cached prefix. Afterwards every block of the request is cached; of a request larger than
the cache the first blocks stay.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import combinations

Requests = list[list[int]]

NEVER = 1 << 60


def prefix_length(request: list[int], cached: Collection[int]) -> int:
    """How many leading blocks of the request are cached."""
    for depth, block in enumerate(request):
        if block not in cached:
            return depth
    return len(request)


def naive_lru(requests: Requests, capacity: int) -> list[int]:
    """LRU that touches the blocks of a request from its tail to its head, so that the head is the most recent."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = []
    for request in requests:
        hits.append(prefix_length(request, cache))
        for block in reversed(request):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


@dataclass
class _Block:
    """What a cache that gives up leaves knows of a block."""

    parent: int | None
    created: int
    last_use: int
    uses: int = 1
    children: int = 0


def _give_up_leaves(requests: Requests, capacity: int, rank: Callable[[_Block], tuple[int, ...]]) -> list[int]:
    """A cache that gives up the lowest-ranked leaf that the running request does not use."""
    cache: dict[int, _Block] = {}
    hits = []
    for now, request in enumerate(requests):
        found = prefix_length(request, cache)
        hits.append(found)
        for block in request[:found]:
            cache[block].last_use = now
            cache[block].uses += 1
        for depth in range(found, len(request)):
            if len(cache) == capacity:
                idle = [block for block, it in cache.items() if not it.children and it.last_use != now]
                if not idle:
                    break
                victim = cache.pop(min(idle, key=lambda block: rank(cache[block])))
                if victim.parent is not None:
                    cache[victim.parent].children -= 1
            parent = request[depth - 1] if depth else None
            if parent is not None:
                cache[parent].children += 1
            cache[request[depth]] = _Block(parent, now, now)
    return hits


def naive_leaf_lru(requests: Requests, capacity: int) -> list[int]:
    """The least recently used leaf goes first."""
    return _give_up_leaves(requests, capacity, lambda block: (block.last_use,))


def naive_fifo(requests: Requests, capacity: int) -> list[int]:
    """The leaf that came first goes first."""
    return _give_up_leaves(requests, capacity, lambda block: (block.created,))


def naive_lfu(requests: Requests, capacity: int) -> list[int]:
    """The leaf that the fewest requests used since it came goes first, among equals the least recently used."""
    return _give_up_leaves(requests, capacity, lambda block: (block.uses, block.last_use))


def next_uses(requests: Requests) -> list[dict[int, int]]:
    """For every request and each of its blocks the next request that uses the block again, or NEVER."""
    coming: dict[int, int] = {}
    result: list[dict[int, int]] = []
    for now in range(len(requests) - 1, -1, -1):
        result.append({block: coming.get(block, NEVER) for block in requests[now]})
        coming.update(dict.fromkeys(requests[now], now))
    return result[::-1]


def naive_belady(requests: Requests, capacity: int) -> list[int]:
    """Belady's MIN over prefixes: the latest next use goes first, the deeper block on ties; nothing has to be kept."""
    upcoming = next_uses(requests)
    cache: dict[int, tuple[int, int]] = {}
    hits = []
    for now, request in enumerate(requests):
        hits.append(prefix_length(request, cache))
        for depth, block in enumerate(request):
            cache[block] = (upcoming[now][block], depth)
        for block in sorted(cache, key=lambda block: cache[block])[capacity:]:
            del cache[block]
    return hits


def plain_belady(requests: Requests, capacity: int) -> int:
    """Belady's MIN that knows nothing of prefixes: the number of blocks found, wherever in the request they stand."""
    upcoming = next_uses(requests)
    cache: dict[int, int] = {}
    hits = 0
    for now, request in enumerate(requests):
        hits += sum(block in cache for block in request)
        cache.update(upcoming[now])
        for block in sorted(cache, key=lambda block: (cache[block], -block))[capacity:]:
            del cache[block]
    return hits


def exhaustive_optimum(requests: Requests, capacity: int) -> int:
    """The most hits that any choice of what to keep can have, by trying all of them; for tiny traces."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for now, request in enumerate(requests):
        later = set().union(*requests[now + 1 :])
        reached: Counter[frozenset[int]] = Counter()
        for cached, hits in best.items():
            total = hits + prefix_length(request, cached)
            useful = sorted((cached | set(request)) & later)
            for size in range(min(capacity, len(useful)) + 1):
                for kept in map(frozenset, combinations(useful, size)):
                    reached[kept] = max(reached[kept], total)
        best = dict(reached)
    return max(best.values())
