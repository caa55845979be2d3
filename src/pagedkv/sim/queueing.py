"""Replay of a trace in time on one replica or several: queues, loads from tiers, and the time to the first token.

A request is routed when it arrives and waits on its replica, first come first served. A replica loads and computes one
prompt at a time. It begins the next one when that is done and there is room for its blocks, those of its answer
included; what is cached and not in use makes room. It looks then into the pool and the tiers, loads, level by level,
the leading part with which the prompt is done soonest, and computes the rest. When that is done the input is findable
and the first token is out. The answer is decoded beside others at a fixed rate. With its last token a request gives its
blocks back, and it is written to the tiers then, or when their `writes` say, which takes no time. None is preempted.

What is due by an arrival happens before it. At the same time prompts are done before requests end, each by number.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pagedkv.control.protocol import Strategy
from pagedkv.sim.replicas import NOWHERE, Fleet, FleetResult, Router
from pagedkv.sim.tiered import LevelHits, TieredPool, Tiers, TraceClock, tiered_pools
from pagedkv.sim.trace import Floats, Int64s, Trace
from pagedkv.validate import require_number


@dataclass(frozen=True)
class Timing:
    """How fast requests are served, for a replay in which each holds its blocks while it runs.

    With tiers or a fleet a replica loads and computes one prompt at a time, and requests queue for it; without either
    each prompt of one pool is computed at its own rate beside the others, and the strategy preempts requests for those
    that arrive.

    Parameters
    ----------
    prefill_tokens_per_second, decode_tokens_per_second : float
        Of one request.
    bytes_per_token : float
        Of keys and values, which loads from tiers carry.
    """

    prefill_tokens_per_second: float = 10_000.0
    decode_tokens_per_second: float = 50.0
    bytes_per_token: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            require_number(name, getattr(self, name), 0, above=True)
        require_number("bytes_per_token", self.bytes_per_token, 0)


def output_blocks(trace: Trace) -> Int64s:
    """Return how many blocks the answer of each request takes, int64 [requests]."""
    return -(-trace.output_tokens // trace.block_tokens)


@dataclass(frozen=True, eq=False)
class Waits:
    """When requests of a replay in time had their turn.

    Attributes
    ----------
    queueing : float64 [requests]
        Seconds from the arrival until the prompt is begun; nan where that never happened.
    ttft : float64 [requests]
        Seconds from the arrival to the first token; nan where that never came.
    busy : float64 [replicas]
        Seconds in which prompts were loaded and computed.
    seconds : float
        From the first arrival to the last token.
    refused : int
        Requests larger than the pool.
    order : int64 [served requests]
        In which their prompts were begun.
    """

    queueing: Floats
    ttft: Floats
    busy: Floats
    seconds: float
    refused: int
    order: Int64s


@dataclass(eq=False)
class _Replica:
    """A pool and the requests that were sent to it."""

    pool: TieredPool
    waiting: deque[int] = field(default_factory=deque)
    is_busy: bool = False


_PREFILLED, _SERVED = 0, 1


class _Service:
    """The replicas, and when what happens next."""

    def __init__(
        self, trace: Trace, pools: list[TieredPool], clock: TraceClock, timing: Timing, tiers: Tiers, fleet: Fleet
    ) -> None:
        self._trace, self._clock, self._timing, self._tiers = trace, clock, timing, tiers
        self._replicas = [_Replica(pool) for pool in pools]
        self._router = Router(trace, fleet)
        self._due: list[tuple[float, int, int]] = []  # when, what, request
        self._ids = np.asarray(trace.ids).astype(np.int64)
        self._offsets = trace.offsets.tolist()
        self._input_tokens, self._output_tokens = trace.input_tokens.tolist(), trace.output_tokens.tolist()
        self._output_blocks = output_blocks(trace).tolist()
        self.found = LevelHits(trace, tiers, pools)
        self.sent = np.zeros(fleet.replicas, np.int64)  # and not done
        self.served = np.full(trace.num_requests, NOWHERE, np.int32)
        self.queueing, self.ttft = np.full((2, trace.num_requests), np.nan)
        self.busy = np.zeros(fleet.replicas)
        self.order: list[int] = []
        self.last = 0.0

    def arrive(self, request: int, now: float) -> None:
        """Send a request that fits a pool to a replica."""
        self.advance(now)
        self._clock.seconds = now
        ids = self._blocks(request)
        replica = self._router.route(ids, self.found.reaches(ids), self.sent.copy())
        self.served[request] = replica
        self.sent[replica] += 1
        self._replicas[replica].waiting.append(request)
        self._begin(replica, now)

    def advance(self, now: float) -> None:
        """Let everything happen that is due by `now`."""
        while self._due and self._due[0][0] <= now:
            when, what, request = heapq.heappop(self._due)
            self._clock.seconds = when
            replica = int(self.served[request])
            at = self._replicas[replica]
            if what == _PREFILLED:
                at.pool.books.commit(request)
                at.is_busy = False
                served = when + self._output_tokens[request] / self._timing.decode_tokens_per_second
                heapq.heappush(self._due, (served, _SERVED, request))
            else:
                at.pool.books.free(request)
                at.pool.finished(self._blocks(request))
                self.sent[replica] -= 1
                self.last = when
            self._begin(replica, when)

    def _begin(self, replica: int, now: float) -> None:
        """Begin the prompt that has waited longest, if the replica is free and has room for it."""
        at = self._replicas[replica]
        if at.is_busy or not at.waiting:
            return
        request = at.waiting[0]
        ids, more = self._blocks(request), self._output_blocks[request]
        if not at.pool.books.has_room(ids, more):
            return
        at.waiting.popleft()
        at.is_busy = True
        self.order.append(request)
        hits, seconds = self._soonest(request, at.pool.reaches(ids))
        at.pool.begin(request, ids, more, hits)
        at.pool.books.tell_output(request, self._output_tokens[request])
        arrived = float(self._trace.times[request])
        self.found.by_level[:, request] = hits
        self.busy[replica] += seconds
        self.queueing[request] = now - arrived
        self.ttft[request] = now + seconds - arrived
        heapq.heappush(self._due, (now + seconds, _PREFILLED, request))

    def _soonest(self, request: int, reaches: list[int]) -> tuple[list[int], float]:
        """Return how many blocks of every level to use, so that a prompt is done soonest, and after how many seconds.

        Levels are used from the pool down to some level; of two that are done at the same time the lower one.
        """
        found, loaded = reaches[0], 0.0
        hits = [found, *[0] * len(self._tiers.levels)]
        best = list(hits), self._computed(request, found)
        for place, (tier, reach) in enumerate(zip(self._tiers.levels, reaches[1:], strict=True), start=1):
            if reach > found:
                hits[place] = reach - found
                loaded += tier.seconds(hits[place] * self._trace.block_tokens * self._timing.bytes_per_token)
                found = reach
                seconds = loaded + self._computed(request, found)
                if seconds <= best[1]:
                    best = list(hits), seconds
        return best

    def _computed(self, request: int, found: int) -> float:
        """Return how long it takes to compute a prompt of which so many blocks are there."""
        left = max(0, self._input_tokens[request] - found * self._trace.block_tokens)
        return float(left / self._timing.prefill_tokens_per_second)

    def _blocks(self, request: int) -> Int64s:
        return self._ids[self._offsets[request] : self._offsets[request + 1]]


def run_in_time(
    trace: Trace, blocks: int, strategy: Strategy, timing: Timing, tiers: Tiers, fleet: Fleet
) -> tuple[LevelHits, FleetResult, Waits]:
    """Replay a trace in its own time on a fleet whose pools have `blocks` together.

    Requests larger than the pool of a replica are refused and find nothing; they are not routed.
    """
    each, needs = fleet.blocks_each(blocks), np.diff(trace.offsets) + output_blocks(trace)
    most = max(1, int(needs.sum()))
    clock = TraceClock()
    pools = tiered_pools(trace, each, strategy, tiers, clock, replicas=fleet.replicas, most=most)
    service = _Service(trace, pools, clock, timing, tiers, fleet)
    fits = (needs <= each).tolist()
    for request, now in enumerate(trace.times.tolist()):
        if fits[request]:
            service.arrive(request, now)
    service.advance(float("inf"))
    found = service.found
    order = np.array(service.order, np.int64)
    waits = Waits(service.queueing, service.ttft, service.busy, service.last, fits.count(False), order)
    return found, FleetResult.of(trace, fleet, service.served, found.hits), waits
