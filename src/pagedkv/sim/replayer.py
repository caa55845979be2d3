"""Replay in time: a request holds its blocks while it is served, so concurrency takes room and has its victims.

A request that arrives takes the blocks of its input, the cached prefix shared, and of the output that it will write.
Its input becomes findable when its prefill is done; it leaves when its last token is decoded. Where there is no room,
the strategy chooses running requests that give their blocks back; they wait, first come first served, until there is
room again, and compute anew what is not cached by then. Their second look at the cache is no access of the trace.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections import deque

import numpy as np
import numpy.typing as npt

from pagedkv.control.content_cache import ContentCache
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.timing import Timing
from pagedkv.sim.trace import Trace

_PREFILLED, _SERVED = 0, 1


def _output_blocks(trace: Trace) -> npt.NDArray[np.int64]:
    return -(-trace.output_tokens // trace.block_tokens)


def most_blocks(trace: Trace) -> int:
    """Return how many blocks hold all requests at once, none of them shared."""
    return trace.num_accesses + int(_output_blocks(trace).sum())


class _Service:
    """The requests that run, those that wait, and when what happens next."""

    def __init__(self, trace: Trace, cache: ContentCache, timing: Timing) -> None:
        self._trace, self._cache, self._timing = trace, cache, timing
        self._due: list[tuple[float, int, int, int]] = []  # when, what, request, its run number
        self._runs: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self._output_blocks = _output_blocks(trace)
        self.needs = np.diff(trace.offsets) + self._output_blocks
        self.preempted = 0

    def arrive(self, request: int, now: float) -> int:
        """Start a request that fits the pool, whoever must go for it; returns the blocks found."""
        self.advance(now)
        while not self._cache.has_room(self._ids(request), int(self._output_blocks[request])):
            self._preempt()
        return self._start(request, now)

    def advance(self, now: float) -> None:
        """Let everything happen that is due by `now`."""
        while self._due and self._due[0][0] <= now:
            when, what, request, run = heapq.heappop(self._due)
            if self._runs.get(request) != run:
                continue  # preempted meanwhile
            if what == _PREFILLED:
                self._cache.commit(request)
                continue
            self._cache.free(request)
            del self._runs[request]
            self._resume(when)

    def _start(self, request: int, now: float) -> int:
        trace, timing = self._trace, self._timing
        found = self._cache.allocate(request, self._ids(request)).num_cached_tokens
        self._cache.append(request, int(self._output_blocks[request]))
        computed = max(0, int(trace.input_tokens[request]) - found * trace.block_tokens)
        prefilled = now + computed / timing.prefill_tokens_per_second
        served = prefilled + int(trace.output_tokens[request]) / timing.decode_tokens_per_second
        run = self._runs[request] = self._runs.get(request, 0) + 1
        heapq.heappush(self._due, (prefilled, _PREFILLED, request, run))
        heapq.heappush(self._due, (served, _SERVED, request, run))
        return found

    def _ids(self, request: int) -> npt.NDArray[np.int64]:
        start, stop = self._trace.offsets[request], self._trace.offsets[request + 1]
        return np.asarray(self._trace.ids[start:stop], np.int64)

    def _preempt(self) -> None:
        victim = int(self._cache.evict())
        self._runs[victim] += 1
        self._waiting.append(victim)
        self.preempted += 1

    def _resume(self, now: float) -> None:
        while self._waiting and self.needs[self._waiting[0]] <= self._cache.free_block_count:
            self._start(self._waiting.popleft(), now)


def replay_timed(trace: Trace, cache: ContentCache, strategy: str, timing: Timing) -> ReplayResult:
    """Replay `trace` in its own time; requests larger than the whole pool are refused and find nothing."""
    started = time.perf_counter()
    service = _Service(trace, cache, timing)
    hits = np.zeros(trace.num_requests, np.int32)
    refused = 0
    for request, now in enumerate(trace.times.tolist()):
        if service.needs[request] > cache.total_blocks:
            refused += 1
        else:
            hits[request] = service.arrive(request, now)
    service.advance(float("inf"))
    seconds, reclaimed = time.perf_counter() - started, cache.stats.blocks_reclaimed
    result = ReplayResult.of(trace, strategy, cache.total_blocks, hits, reclaimed=reclaimed, seconds=seconds)
    return dataclasses.replace(result, preempted=service.preempted, refused=refused)
