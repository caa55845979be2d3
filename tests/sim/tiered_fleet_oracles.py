"""A fleet with tiers, at once and in time, straight from the definition: lists, sets and dictionaries."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from tests.sim.fleet_oracles import NaiveHomes
from tests.sim.oracles import Requests
from tests.sim.tier_oracles import LEVELS, Lru, NaiveTiers, match

Level = tuple[str, str, int]  # medium, strategy, blocks of all replicas together


class NaiveRouter:
    """The policies by name, the load and the homes that they look at."""

    def __init__(self, replicas: int, routing: str, block_tokens: int) -> None:
        self.replicas, self.routing, self.block_tokens = range(replicas), routing, block_tokens
        self.load = [0.0] * replicas
        self.homes = NaiveHomes(replicas)
        self.number = 0

    def route(self, request: list[int], ends: list[list[int]], queue: list[int]) -> int:
        """`ends`: how many leading blocks each level of each replica has."""
        matched = [[max(0, end - max([0, *of[:place]])) for place, end in enumerate(of)] for of in ends]
        chosen = self.choose(request, matched, queue)
        self.number += 1
        self.homes.note(request, chosen)
        self.load = [0.995 * tokens for tokens in self.load]
        self.load[chosen] += (len(request) - sum(matched[chosen])) * self.block_tokens
        return chosen

    def choose(self, request: list[int], matched: list[list[int]], queue: list[int]) -> int:
        least = min(self.replicas, key=lambda replica: (queue[replica], self.load[replica], replica))
        if self.routing == "round_robin":
            return self.number % len(self.replicas)
        if self.routing == "least_load":
            return least
        if self.routing == "sticky":
            home = self.homes.of(request)
            return least if home is None else home
        limit = 1.25 * sum(self.load) / len(self.replicas) + len(request) * self.block_tokens
        allowed = [replica for replica in self.replicas if self.load[replica] <= limit]

        def rank(replica: int) -> tuple[float, ...]:
            return (-sum(matched[replica]), *(-found for found in matched[replica]), self.load[replica], replica)

        return min(allowed, key=rank)


@dataclass
class FleetOutcome:
    """Where every request went, what it found by level, blocks written by tier, blocks that the pools gave up."""

    served: list[int]
    hits: list[list[int]]
    written: list[int]
    reclaimed: int
    queueing: dict[int, float] = field(default_factory=dict)
    ttft: dict[int, float] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)
    last: float = 0.0


class NaiveFleet:
    """Replicas with a pool, tiers of their own, and shared ones."""

    def __init__(
        self, requests: Requests, pool: tuple[str, int], tiers: list[Level], writes: str, exclusive: bool, count: int
    ) -> None:
        self.requests, self.pool, self.tiers = requests, pool, tiers
        shared = {
            place: LEVELS[name](blocks) for place, (medium, name, blocks) in enumerate(tiers) if medium == "shared"
        }
        media = [medium for medium, _, _ in tiers]
        self.replicas = [
            NaiveTiers(
                [
                    self.new_pool(pool[0], pool[1] // count),
                    *(shared.get(place) or LEVELS[name](size // count) for place, (_, name, size) in enumerate(tiers)),
                ],
                media,
                writes,
                exclusive,
            ).with_chains(requests)
            for _ in range(count)
        ]

    def new_pool(self, name: str, blocks: int) -> Lru:
        return LEVELS[name](blocks)

    def ends(self, request: list[int]) -> list[list[int]]:
        return [[match(level, request) for level in replica.levels] for replica in self.replicas]

    def run(self, routing: str, block_tokens: int, restart_at: int | None) -> FleetOutcome:
        router = NaiveRouter(len(self.replicas), routing, block_tokens)
        served, hits = [], []
        for number, request in enumerate(self.requests):
            if number == restart_at:
                for replica in self.replicas:
                    replica.restart()
            served.append(router.route(request, self.ends(request), [0] * len(self.replicas)))
            hits.append(self.replicas[served[-1]].serve(request))
        return self.outcome(served, hits)

    def outcome(self, served: list[int], hits: list[list[int]]) -> FleetOutcome:
        written = [sum(replica.written[place] for replica in self.replicas) for place in range(1, len(self.tiers) + 1)]
        given_up = sum(replica.reclaimed + len(replica.levels[0].given_up) for replica in self.replicas)
        return FleetOutcome(served, hits, written, given_up)


class HeldLru(Lru):
    """LRU whose requests hold their blocks for a while, and blocks beside them that nobody ever finds."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.in_use = set()
        self.users: dict[int, int] = {}  # of blocks that are there
        self.holds: dict[int, tuple[list[int], int, int]] = {}  # of a request: its chain, how much it found, its answer
        self.started: dict[int, int] = {}

    def taken(self) -> int:
        """Blocks that cannot go: in use, computed now, or of answers."""
        coming = sum(len(chain) - found + more for chain, found, more in self.holds.values())
        return coming + sum(1 for users in self.users.values() if users)

    def has_room(self, chain: list[int], more: int) -> bool:
        found = match(self, chain)
        idle = sum(1 for block in chain[:found] if not self.users.get(block))
        return len(chain) - found + more <= self.capacity - self.taken() - idle

    def start(self, request: int, chain: list[int], more: int) -> None:
        self.now += 1
        found = match(self, chain)
        for block in chain[:found]:
            self.users[block] = self.users.get(block, 0) + 1
            self.nodes[block].last_use = self.now
        self.holds[request] = (chain, found, more)
        answers = sum(len(chain) - found + more for chain, found, more in self.holds.values())
        while len(self.nodes) + answers > self.capacity:
            self.give_up(self.choose())
        self.started[request] = self.now

    def leaves(self):
        return [node for node in super().leaves() if not self.users.get(node.block)]

    def commit(self, request: int) -> None:
        chain, found, more = self.holds[request]
        for depth in range(found, len(chain)):
            self.store(chain[depth], chain[depth - 1] if depth else None, depth)
            self.nodes[chain[depth]].last_use = self.started[request]
            self.users[chain[depth]] = 1
        self.holds[request] = (chain, len(chain), more)

    def free(self, request: int) -> None:
        chain, _, _ = self.holds.pop(request)
        for block in chain:
            self.users[block] -= 1


@dataclass
class Rates:
    """Tokens per second of a prompt and of an answer, bytes of a token; seconds before a load and bytes a second."""

    prefill: float
    decode: float
    bytes_per_token: float = 0.0
    loads: tuple[tuple[float, float | None], ...] = ()  # of every tier


class NaiveQueues(NaiveFleet):
    """The same in time: queues, one prompt at a time on each replica, answers beside it."""

    def new_pool(self, name: str, blocks: int) -> HeldLru:
        assert name == "lru"
        return HeldLru(blocks)

    def run_in_time(
        self,
        routing: str,
        block_tokens: int,
        rates: Rates,
        times: list[float],
        inputs: list[int],
        outputs: list[int],
    ) -> FleetOutcome:
        count = len(self.replicas)
        router = NaiveRouter(count, routing, block_tokens)
        size, more = block_tokens, [-(-tokens // block_tokens) for tokens in outputs]
        waiting: list[list[int]] = [[] for _ in range(count)]
        prompt_of: list[int | None] = [None] * count
        open_requests = [0] * count
        events: list[tuple[float, int, int, str]] = []
        served = [-1] * len(times)
        hits = [[0] * (1 + len(self.tiers)) for _ in times]
        made = self.outcome(served, hits)
        made.busy = [0.0] * count

        def compute(request: int, found: int) -> float:
            return max(0, inputs[request] - found * size) / rates.prefill

        def soonest(request: int, ends: list[int]) -> tuple[float, list[int]]:
            """Try every level as the lowest that is used."""
            best: tuple[float, list[int]] | None = None
            for lowest in range(len(ends)):
                used, loading = [ends[0]], 0.0
                for place in range(1, lowest + 1):
                    blocks = max(0, ends[place] - sum(used))
                    used.append(blocks)
                    if blocks:
                        latency, speed = rates.loads[place - 1]
                        num_bytes = blocks * size * rates.bytes_per_token
                        loading += latency + (num_bytes / speed if speed is not None else 0.0)
                seconds = loading + compute(request, sum(used))
                used += [0] * (len(ends) - len(used))
                if best is None or seconds <= best[0]:
                    best = seconds, used
            assert best is not None
            return best

        def begin(replica: int, now: float) -> None:
            if prompt_of[replica] is not None or not waiting[replica]:
                return
            request, levels = waiting[replica][0], self.replicas[replica]
            chain, pool = self.requests[request], levels.levels[0]
            if not pool.has_room(chain, more[request]):
                return
            waiting[replica].pop(0)
            prompt_of[replica] = request
            seconds, used = soonest(request, [match(level, chain) for level in levels.levels])
            pool.start(request, chain, more[request])
            for place, blocks in enumerate(used[1:], start=1):
                if blocks:
                    levels.take(place, chain[: sum(used[: place + 1])])
            levels.write_at_once(chain, sum(used))
            hits[request] = used
            made.busy[replica] += seconds
            made.queueing[request] = now - times[request]
            made.ttft[request] = now + seconds - times[request]
            heapq.heappush(events, (now + seconds, 0, request, "prompt"))

        def happen(until: float) -> None:
            while events and events[0][0] <= until:
                now, _, request, what = heapq.heappop(events)
                replica = served[request]
                levels = self.replicas[replica]
                if what == "prompt":
                    levels.levels[0].commit(request)
                    prompt_of[replica] = None
                    heapq.heappush(events, (now + outputs[request] / rates.decode, 1, request, "answer"))
                else:
                    levels.levels[0].free(request)
                    levels.write_at_the_end(self.requests[request])
                    open_requests[replica] -= 1
                    made.last = now
                begin(replica, now)

        for request, now in enumerate(times):
            chain = self.requests[request]
            if len(chain) + more[request] > self.pool[1] // count:
                continue
            happen(now)
            replica = served[request] = router.route(chain, self.ends(chain), list(open_requests))
            open_requests[replica] += 1
            waiting[replica].append(request)
            begin(replica, now)
        happen(float("inf"))
        told = self.outcome(served, hits)
        made.written, made.reclaimed = told.written, told.reclaimed
        return made
