"""A slow oracle of a pool and the tiers beneath it: requests as lists of content ids in, hits by level out.

Every level is a leaf cache of plain dictionaries. What a tier is told, and when, is written down here a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim.queue_oracles import Gdsf, LeafCache, LongestFirst, Node, Requests, S3Fifo, Sieve


class Lru(LeafCache):
    """The least recently used leaf goes first."""

    def choose(self) -> Node:
        return min(self.leaves(), key=lambda node: node.last_use)


class Lfu(LeafCache):
    """The leaf with the fewest uses goes first, among equals the least recently used."""

    def choose(self) -> Node:
        return min(self.leaves(), key=lambda node: (node.uses, node.last_use))


class Fifo(LeafCache):
    """The leaf that came first goes first; after a restart that is the least recently used."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.born: dict[int, int] = {}

    def choose(self) -> Node:
        return min(self.leaves(), key=lambda node: self.born[node.block])

    def store(self, block: int, parent: int | None, depth: int) -> None:
        super().store(block, parent, depth)
        self.born[block] = self.now


LEVELS: dict[str, type[LeafCache]] = {
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
    "longest_first": LongestFirst,
    "s3fifo": S3Fifo,
    "sieve": Sieve,
    "gdsf": Gdsf,
}


def match(cache: LeafCache, chain: list[int]) -> int:
    """How many leading blocks are there."""
    return next((depth for depth, block in enumerate(chain) if block not in cache.nodes), len(chain))


def leave(cache: LeafCache, chain: list[int]) -> None:
    """The chain goes, from its end up to a block that another chain continues."""
    cache.in_use = set()
    for block in reversed(chain):
        node = cache.nodes[block]
        if node.children:
            return
        if isinstance(cache, S3Fifo) and node.is_newcomer:
            cache.ghosts.append(block)
        cache.give_up(node)
        if isinstance(cache, Gdsf):
            cache.free_places.append(cache.freed.pop())


def reopened(cache: LeafCache) -> LeafCache:
    """What a disk has after a restart: the same blocks, stored anew in the order of their last use, parents first."""
    new = type(cache)(cache.capacity)
    new.now = cache.now
    for node in sorted(cache.nodes.values(), key=lambda node: node.last_use):
        path, above = [], node
        while above.block not in new.nodes:
            path.append(above)
            if above.parent is None:
                break
            above = cache.nodes[above.parent]
        for old in reversed(path):
            new.store(old.block, old.parent, old.depth)
            made = new.nodes[old.block]
            made.uses, made.last_use = old.uses, old.last_use
            if isinstance(new, Fifo):
                new.born[old.block] = old.last_use
    if isinstance(cache, Gdsf) and isinstance(new, Gdsf):
        new.place = {block: cache.place[block] for block in new.nodes}
        new.free_places = sorted(set(range(new.capacity)) - set(new.place.values()), reverse=True)
        new.freed = []
        for node in new.nodes.values():
            if node.children == 0:
                new.appraise(node)
    return new


@dataclass
class Outcome:
    """Hits of every request by level, blocks written by tier, blocks that the pool gave up."""

    hits: list[list[int]]
    written: list[int]
    reclaimed: int


class NaiveTiers:
    """A pool, the first level, and the tiers beneath it, each with its medium."""

    def __init__(self, levels: list[LeafCache], media: list[str], writes: str, exclusive: bool) -> None:
        self.levels, self.media, self.writes, self.exclusive = levels, media, writes, exclusive
        self.written = [0] * len(levels)
        self.told = [0] * len(levels)  # how much of what a level gave up the next one has heard
        self.reclaimed = 0

    def run(self, requests: Requests, restart_at: int | None) -> Outcome:
        hits = []
        for number, request in enumerate(requests):
            if number == restart_at:
                self.restart()
            hits.append(self.serve(request))
        return Outcome(hits, self.written[1:], self.reclaimed + len(self.levels[0].given_up))

    def restart(self) -> None:
        self.reclaimed += len(self.levels[0].given_up)
        for place, level in enumerate(self.levels):
            if place > 0 and self.media[place - 1] == "shared":
                continue  # a server of its own
            survives = place > 0 and self.media[place - 1] == "disk"
            self.levels[place] = reopened(level) if survives else type(level)(level.capacity)
        self.told = [0] * len(self.levels)

    def serve(self, request: list[int]) -> list[int]:
        reaches = [match(tier, request) for tier in self.levels[1:]]
        self.store(0, request)
        hits = [self.found]
        for place, reach in enumerate(reaches, start=1):
            hits.append(max(0, reach - sum(hits)))
            if hits[-1]:
                self.take(place, request[:reach], match(self.levels[0], request) >= reach)
        self.write_at_once(request, sum(hits))
        self.write_at_the_end(request)
        return hits

    def take(self, place: int, chain: list[int], has_it_all: bool = True) -> None:
        """A tier is read; what an exclusive one gives leaves it."""
        self.store(place, chain)
        if self.exclusive and has_it_all:
            before = len(self.levels[place].given_up)
            leave(self.levels[place], chain)
            del self.levels[place].given_up[before:]

    def write_at_once(self, request: list[int], found: int) -> None:
        """What is written when a request begins."""
        for place in range(1, len(self.levels)):
            if self.writes == "second-hit" and found:
                self.store(place, request[:found])
            elif self.writes == "reclaim":
                self.hand_down(place)

    def write_at_the_end(self, request: list[int]) -> None:
        """What is written when a request ends."""
        for place in range(1, len(self.levels)):
            if self.writes == "finish":
                self.store(place, request)

    def store(self, place: int, chain: list[int]) -> None:
        level = self.levels[place]
        before = len(level.nodes) + len(level.given_up)
        self.found = level.request(chain)
        self.written[place] += len(level.nodes) + len(level.given_up) - before

    def hand_down(self, place: int) -> None:
        """Every chain whose last block the level above gave up in this request is stored beneath it."""
        above = self.levels[place - 1]
        given_up = above.given_up[self.told[place - 1] :]
        self.told[place - 1] = len(above.given_up)
        for number, block in enumerate(given_up):
            if not any(self.chain_of[other][-2:-1] == [block] for other in given_up[:number]):
                self.store(place, self.chain_of[block])

    def with_chains(self, requests: Requests) -> NaiveTiers:
        """Remember of every block what precedes it."""
        self.chain_of = {block: request[: depth + 1] for request in requests for depth, block in enumerate(request)}
        return self
