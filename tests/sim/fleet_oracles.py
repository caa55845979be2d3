"""A fleet straight from the definition: lists and sets, one replica after the other."""

from __future__ import annotations

from collections import OrderedDict

from tests.sim.oracles import Requests, prefix_length


class NaiveHomes:
    """Where every block went last, and the different blocks that came behind it."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self.replica: dict[int, int] = {}
        self.behind: dict[int, set[int]] = {}

    def note(self, request: list[int], replica: int) -> None:
        for block in request:
            self.replica[block] = replica
        for block, after in zip(request, request[1:], strict=False):
            self.behind.setdefault(block, set()).add(after)

    def of(self, request: list[int]) -> int | None:
        known = [block for block in request if block in self.replica]
        if not known or len(self.behind.get(known[-1], ())) >= 2 * self.replicas:
            return None
        return self.replica[known[-1]]


def naive_fleet(
    requests: Requests, capacity: int, replicas: int, routing: str, block_tokens: int
) -> tuple[list[int], list[int]]:
    """Which replica serves every request, and the blocks that it finds there by LRU."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
    load = [0.0] * replicas
    homes = NaiveHomes(replicas)
    served, hits = [], []
    for number, request in enumerate(requests):
        least = min(range(replicas), key=lambda replica: load[replica])
        if routing == "round_robin":
            chosen = number % replicas
        elif routing == "least_load":
            chosen = least
        elif routing == "sticky":
            home = homes.of(request)
            chosen = least if home is None else home
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
        while len(cache) > capacity // replicas:
            cache.popitem(last=False)
        homes.note(request, chosen)
        load = [0.995 * tokens for tokens in load]
        load[chosen] += (len(request) - found) * block_tokens
        served.append(chosen)
        hits.append(found)
    return served, hits
