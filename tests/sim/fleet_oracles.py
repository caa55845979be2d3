"""A fleet straight from the definition: lists and sets, one replica after the other."""

from __future__ import annotations

from collections import OrderedDict

from tests.sim.oracles import Requests, prefix_length


def naive_fleet(
    requests: Requests, capacity: int, replicas: int, routing: str, block_tokens: int
) -> tuple[list[int], list[int]]:
    """Which replica serves every request, and the blocks that it finds there by LRU."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
    load = [0.0] * replicas
    home: dict[int, int] = {}
    served, hits = [], []
    for number, request in enumerate(requests):
        least = min(range(replicas), key=lambda replica: load[replica])
        if routing == "round_robin":
            chosen = number % replicas
        elif routing == "least_load":
            chosen = least
        elif routing == "sticky":
            known = [home[block] for block in request[1:] if block in home]
            chosen = known[-1] if known else least
        else:
            limit = 1.25 * sum(load) / replicas + len(request) * block_tokens
            allowed = [replica for replica in range(replicas) if load[replica] <= limit]
            chosen = min(
                allowed, key=lambda replica: (-prefix_length(request, caches[replica]), load[replica], replica)
            )
        cache = caches[chosen]
        found = prefix_length(request, cache)
        for block in reversed(request):
            cache[block] = None
            cache.move_to_end(block)
            home[block] = chosen
        while len(cache) > capacity // replicas:
            cache.popitem(last=False)
        load = [0.995 * tokens for tokens in load]
        load[chosen] += (len(request) - found) * block_tokens
        served.append(chosen)
        hits.append(found)
    return served, hits
