"""Slow oracles of the strategies that keep a queue, a clock or a price, from their papers, held to leaves.

A trace is a trie of blocks. Only leaves go: blocks that no cached block continues and that the running request does not
use. A request finds its cached prefix, then takes a place for each block that is missing (one is given up where none is
free), then stores them in order; of a request larger than the cache the first blocks are stored.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

Requests = list[list[int]]


def looping_requests(seed: int, requests: int = 400, blocks: int = 25) -> Requests:
    """Requests that continue prefixes of earlier ones, the recent and the popular ones more often."""
    rng = np.random.default_rng(seed)
    made: Requests = []
    fresh = 0
    for _ in range(requests):
        if made and rng.random() < 0.8:
            newest = len(made) - 1
            before = made[int(newest - min(newest, rng.zipf(1.4)))] if rng.random() < 0.7 else made[newest // 9]
        else:
            before = []
        grown = int(rng.integers(0, blocks // 4))
        made.append(before[: int(rng.integers(0, len(before) + 1))] + list(range(fresh, fresh + grown)))
        fresh += grown
    return made


@dataclass
class Node:
    """One cached block."""

    block: int
    parent: int | None
    depth: int
    children: int = 0
    uses: int = 1
    hits: int = 0
    moment: int = 0
    last_use: int = 0
    is_newcomer: bool = False
    price: int = 0


class LeafCache:
    """A cache of blocks; subclasses say which leaf goes, and may remember things."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nodes: dict[int, Node] = {}
        self.clock = 0
        self.now = 0
        self.given_up: list[int] = []

    def run(self, requests: Requests) -> list[int]:
        """Return the hits of every request."""
        return [self.request(request) for request in requests]

    def request(self, request: list[int]) -> int:
        """Serve one request."""
        self.now += 1
        found = 0
        while found < len(request) and request[found] in self.nodes:
            found += 1
        for block in request[:found]:
            node = self.nodes[block]
            node.uses, node.hits, node.last_use = node.uses + 1, node.hits + 1, self.now
        self.in_use = set(request[:found])
        taken = found
        while taken < len(request):
            if len(self.nodes) + taken - found == self.capacity:
                if not self.leaves():
                    break
                self.give_up(self.choose())
            taken += 1
        for depth in range(found, taken):
            self.store(request[depth], request[depth - 1] if depth else None, depth)
        self.in_use = set()
        if taken:
            self.let_go(request[:taken])
        return found

    def leaves(self) -> list[Node]:
        """All blocks that may go."""
        return [node for node in self.nodes.values() if node.children == 0 and node.block not in self.in_use]

    def store(self, block: int, parent: int | None, depth: int) -> None:
        self.clock += 1
        self.nodes[block] = Node(block, parent, depth, moment=self.clock, last_use=self.now)
        if parent is not None:
            self.nodes[parent].children += 1

    def give_up(self, node: Node) -> None:
        self.given_up.append(node.block)
        del self.nodes[node.block]
        if node.parent is not None:
            self.nodes[node.parent].children -= 1

    def choose(self) -> Node:
        """Return the leaf that goes."""
        raise NotImplementedError

    def let_go(self, request: list[int]) -> None:
        """The request ends."""


class LongestFirst(LeafCache):
    """The deepest leaf goes first, among equals the least recently used."""

    def choose(self) -> Node:
        return min(self.leaves(), key=lambda node: (-node.depth, node.last_use))


class S3Fifo(LeafCache):
    """Yang et al., SOSP 2023, algorithm 1.

    S holds newcomers, a tenth of the cache; M the proven ones; G the last ninety per cent given up from S.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.share = max(1, capacity // 10)
        self.ghosts: deque[int | None] = deque([], max(1, capacity - capacity // 10))

    def store(self, block: int, parent: int | None, depth: int) -> None:
        super().store(block, parent, depth)
        if block in self.ghosts:
            self.ghosts[self.ghosts.index(block)] = None
        else:
            self.nodes[block].is_newcomer = True

    def choose(self) -> Node:
        while True:
            leaves = sorted(self.leaves(), key=lambda node: node.moment)
            newcomers = [node for node in leaves if node.is_newcomer]
            proven = [node for node in leaves if not node.is_newcomer]
            is_full = sum(node.is_newcomer for node in self.nodes.values()) >= self.share
            if newcomers and (is_full or not proven):
                node = newcomers[0]
                if node.hits < 2:
                    self.ghosts.append(node.block)
                    return node
                node.is_newcomer, node.hits = False, 0
            else:
                node = proven[0]
                if node.hits == 0:
                    return node
                node.hits = min(node.hits, 3) - 1
            self.clock += 1
            node.moment = self.clock


class Sieve(LeafCache):
    """Zhang et al., NSDI 2024, algorithm 1: the hand goes from the oldest leaf to the newest and starts over."""

    hand = 0

    def choose(self) -> Node:
        while True:
            node = self.next_leaf()
            self.hand = node.moment
            if node.hits == 0:
                return node
            node.hits = 0

    def next_leaf(self) -> Node:
        leaves = self.leaves()
        newer = [node for node in leaves if node.moment > self.hand]
        return min(newer or leaves, key=lambda node: node.moment)

    def give_up(self, node: Node) -> None:
        super().give_up(node)
        if all(leaf.moment <= self.hand for leaf in self.leaves()):
            self.hand = 0


class Gdsf(LeafCache):
    """Cherkasova 1998 with equal sizes: uses times cost above a price, which is that of the last block given up.

    A block has its price from when it became a leaf that nobody uses.
    """

    level = 0

    def choose(self) -> Node:
        # Block ids break ties in the cache; here they are known by the place that a block took.
        return min(self.leaves(), key=lambda node: (node.price, self.place[node.block]))

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.place: dict[int, int] = {}
        self.free_places = list(range(capacity))[::-1]
        self.freed: list[int] = []

    def appraise(self, node: Node) -> None:
        node.price = self.level + node.uses * (256 + node.depth)

    def store(self, block: int, parent: int | None, depth: int) -> None:
        super().store(block, parent, depth)
        self.place[block] = self.free_places.pop() if self.free_places else self.freed.pop(0)

    def give_up(self, node: Node) -> None:
        self.level = node.price
        super().give_up(node)
        self.freed.append(self.place.pop(node.block))
        if node.parent is not None:
            parent = self.nodes[node.parent]
            if parent.children == 0 and parent.block not in self.in_use:
                self.appraise(parent)

    def let_go(self, request: list[int]) -> None:
        last = self.nodes[request[-1]]
        if last.children == 0:
            self.appraise(last)
