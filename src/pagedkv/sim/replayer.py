"""Replay of a trace: hits and reclaimed blocks, at once or in time.

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
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pagedkv.control.content_cache import ContentCache
from pagedkv.control.protocol import Strategy
from pagedkv.errors import bad_argument
from pagedkv.sim.queueing import Timing, output_blocks, run_in_time
from pagedkv.sim.replicas import Fleet, FleetResult, run_fleet
from pagedkv.sim.tiered import Restart, TierResult, Tiers, TierSpec, TraceClock, run_tiered
from pagedkv.sim.trace import MAX_BLOCKS, Floats, Int64s, Trace, require_content
from pagedkv.validate import require_int, require_number, shown

# What one replay found: one cell of the table strategies × capacities.


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """The outcome of one replay.

    Attributes
    ----------
    strategy : str
        The name as it was asked for, ``"lru"`` or ``"optimal"`` say.
    blocks : int
        Capacity.
    requests, accesses : int
        Requests, and blocks that they touched.
    hit_blocks : int
        Blocks found: the longest cached prefix of every request.
    tokens, hit_tokens : int
        Input tokens, and those of them that lay in blocks found.
    reclaimed : int
        Cached blocks that were reclaimed.
    seconds : float
        Of the replay alone, on one core.
    hits : int32 [requests]
        Blocks found by every request; empty where the method does not give them.
    preempted, refused : int
        Replay in time: running requests that had to give their blocks back, and requests larger than the pool.
    queueing, ttft : float64 [requests]
        Replay in time: seconds from the arrival of every request until its prompt was begun, and to its first token;
        nan for one that was refused. Empty without time.
    utilisation : float64 [replicas]
        Replay in time with tiers or a fleet: the share of the time, from the first arrival to the last token, in which
        each replica, or the one, loaded and computed prompts.
    order : int64 [served requests]
        Replay in time with tiers or a fleet: the requests in the order in which their prompts were begun.
    tiers : tuple of TierResult
        Replay with tiers: what each of them did. All hits above are those of the pool and the tiers together.
    restart : Restart or None
        Replay with a restart: what was found after it.
    fleet : FleetResult or None
        Replay on a fleet: what its replicas did. All hits above are those of all replicas, each in its own cache.
    attainable : int or None
        Of a sweep with tiers or fleets: blocks that the optimum finds with the blocks of them all, in the order in
        which requests were served.
    """

    strategy: str
    blocks: int
    requests: int
    accesses: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    reclaimed: int
    seconds: float
    hits: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    preempted: int = 0
    refused: int = 0
    queueing: Floats = field(default_factory=lambda: np.zeros(0), repr=False)
    ttft: Floats = field(default_factory=lambda: np.zeros(0), repr=False)
    utilisation: Floats = field(default_factory=lambda: np.zeros(0), repr=False)
    order: Int64s = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    tiers: tuple[TierResult, ...] = ()
    restart: Restart | None = None
    fleet: FleetResult | None = None
    attainable: int | None = None

    @classmethod
    def of(
        cls, trace: Trace, strategy: str, blocks: int, hits: npt.NDArray[np.int32], *, reclaimed: int, seconds: float
    ) -> ReplayResult:
        """Return the outcome in which request i of `trace` found ``hits[i]`` blocks."""
        return cls(
            strategy=strategy,
            blocks=blocks,
            requests=trace.num_requests,
            accesses=trace.num_accesses,
            hit_blocks=int(hits.sum(dtype=np.int64)),
            tokens=trace.num_tokens,
            hit_tokens=trace.hit_tokens(hits),
            reclaimed=reclaimed,
            seconds=seconds,
            hits=hits,
        )

    @property
    def pool_hit_blocks(self) -> int:
        """Blocks found in the pool itself."""
        return self.hit_blocks - sum(tier.hit_blocks for tier in self.tiers)

    @property
    def pool_hit_ratio(self) -> float:
        """Blocks found in the pool itself over blocks touched; 0.0 for a trace without blocks."""
        return self.pool_hit_blocks / self.accesses if self.accesses else 0.0

    @property
    def hit_ratio(self) -> float:
        """Blocks found over blocks touched; 0.0 for a trace without blocks."""
        return self.hit_blocks / self.accesses if self.accesses else 0.0

    @property
    def token_hit_ratio(self) -> float:
        """Input tokens found over input tokens; 0.0 for a trace without tokens."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0

    @property
    def attained(self) -> float | None:
        """Blocks found over those that the optimum finds; None where that is not known."""
        if self.attainable is None:
            return None
        return self.hit_blocks / self.attainable if self.attainable else 1.0

    def ttft_percentile(self, percent: float) -> float:
        """Return the seconds within which so many of 100 requests had their first token; nan where none had one.

        The least time of a request that is enough for them: ``ttft_percentile(50)`` is that of one of them.

        Parameters
        ----------
        percent : float
            0 … 100.
        """
        came = self.ttft[~np.isnan(self.ttft)]
        percent = require_number("percent", percent, 0, 100)
        return float(np.percentile(came, percent, method="inverted_cdf")) if len(came) else float("nan")

    @property
    def mean_queueing(self) -> float:
        """Seconds that a request waited for its turn, of those that had it; nan where none had."""
        came = self.queueing[~np.isnan(self.queueing)]
        return float(came.mean()) if len(came) else float("nan")


# Replay in time of one pool: a request holds its blocks while it is served, so concurrency takes room, and requests are
# preempted. With tiers or a fleet they queue instead: `pagedkv.sim.queueing`.

_PREFILLED, _SERVED = 0, 1


class _Service:
    """The requests that run, those that wait, and when what happens next."""

    def __init__(self, trace: Trace, cache: ContentCache, clock: TraceClock, timing: Timing) -> None:
        self._trace, self._cache, self._clock, self._timing = trace, cache, clock, timing
        self._due: list[tuple[float, int, int, int]] = []  # when, what, request, its run number
        self._runs: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self._output_blocks = output_blocks(trace)
        self.needs = np.diff(trace.offsets) + self._output_blocks
        self.preempted = 0
        self._begun = np.full(trace.num_requests, np.nan)  # its last run
        self.queueing, self.ttft = np.full((2, trace.num_requests), np.nan)

    def arrive(self, request: int, now: float) -> int:
        """Start a request that fits the pool, whoever must go for it; returns the blocks found."""
        self.advance(now)
        self._clock.seconds = now
        while not self._cache.has_room(self._ids(request), int(self._output_blocks[request])):
            self._preempt()
        return self._start(request, now)

    def advance(self, now: float) -> None:
        """Let everything happen that is due by `now`."""
        while self._due and self._due[0][0] <= now:
            when, what, request, run = heapq.heappop(self._due)
            self._clock.seconds = when
            if self._runs.get(request) != run:
                continue  # preempted meanwhile
            if what == _PREFILLED:
                self._cache.commit(request)
                self._first_token(request, when)
                continue
            self._cache.free(request)
            del self._runs[request]
            self._resume(when)

    def _start(self, request: int, now: float) -> int:
        trace, timing = self._trace, self._timing
        found = self._cache.allocate(request, self._ids(request)).num_cached_tokens
        self._cache.append(request, int(self._output_blocks[request]))
        self._cache.tell_output(request, int(trace.output_tokens[request]))
        computed = max(0, int(trace.input_tokens[request]) - found * trace.block_tokens)
        prefilled = now + computed / timing.prefill_tokens_per_second
        served = prefilled + int(trace.output_tokens[request]) / timing.decode_tokens_per_second
        self._begun[request] = now
        run = self._runs[request] = self._runs.get(request, 0) + 1
        heapq.heappush(self._due, (prefilled, _PREFILLED, request, run))
        heapq.heappush(self._due, (served, _SERVED, request, run))
        return found

    def _first_token(self, request: int, now: float) -> None:
        if np.isnan(self.ttft[request]):  # one that was preempted has its first token already
            arrived = self._trace.times[request]
            self.queueing[request], self.ttft[request] = self._begun[request] - arrived, now - arrived

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


def replay_timed(trace: Trace, cache: ContentCache, strategy: str, timing: Timing, clock: TraceClock) -> ReplayResult:
    """Replay `trace` in its own time; requests larger than the whole pool are refused and find nothing."""
    started = time.perf_counter()
    service = _Service(trace, cache, clock, timing)
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
    return dataclasses.replace(
        result, preempted=service.preempted, refused=refused, queueing=service.queueing, ttft=service.ttft
    )


# One replay: the requests of a trace through the control plane that serves models.


def replay(
    trace: Trace,
    blocks: int,
    strategy: Strategy = "lru",
    *,
    timing: Timing | None = None,
    tiers: Tiers | Sequence[TierSpec] | None = None,
    fleet: Fleet | None = None,
) -> ReplayResult:
    """Replay a trace and count the hits.

    Parameters
    ----------
    trace : Trace
    blocks : int
        Capacity, 1 … 2³¹−2; more than the trace ever fills is fine.
    strategy : str or EvictionStrategy
        A registered name with its arguments, or an object.
    timing : Timing, optional
        Without it a request comes and goes at once. With it a request holds its blocks until it is served, so
        concurrency takes room; the result says when first tokens came.
    tiers : Tiers or sequence of TierSpec, optional
        Tiers beneath the pool, the fastest first, or a restart, which knows no time.
    fleet : Fleet, optional
        Replicas that share `blocks` and the blocks of the tiers, and the routing of requests to them.

    Returns
    -------
    ReplayResult

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only, `blocks` is out of range, the strategy is unknown or returns something
        else than scores, the routing policy gives no order, a replica has no block of a tier, or there is a restart
        in time.

    Examples
    --------
    >>> replay(trace, 2_000, tiers=[TierSpec("disk", 20_000)]).tiers[0].hit_ratio  # doctest: +SKIP
    """
    require_content(trace)
    tiers = as_tiers(tiers, timing)
    require_fleet(fleet)
    blocks = require_int("blocks", blocks, 1, MAX_BLOCKS)
    if fleet is not None or tiers is not None:
        return _replay_levels(trace, blocks, strategy, timing, tiers or Tiers(), fleet)
    # A pool larger than the trace ever fills finds the same hits in less memory.
    most = trace.num_distinct if timing is None else trace.num_accesses + int(output_blocks(trace).sum())
    clock = TraceClock()
    cache = ContentCache(min(blocks, max(1, most)), strategy, clock=clock)
    if timing is not None:
        return dataclasses.replace(replay_timed(trace, cache, str(strategy), timing, clock), blocks=blocks)
    started = time.perf_counter()
    hits = cache.run(trace.ids, trace.offsets, trace.times, trace.output_tokens)
    seconds = time.perf_counter() - started
    reclaimed = cache.stats.blocks_reclaimed
    return ReplayResult.of(trace, str(strategy), blocks, hits, reclaimed=reclaimed, seconds=seconds)


def _replay_levels(
    trace: Trace, blocks: int, strategy: Strategy, timing: Timing | None, tiers: Tiers, fleet: Fleet | None
) -> ReplayResult:
    """Replay with tiers, a restart, on a fleet, or with some of them in time."""
    started = time.perf_counter()
    told, waits = None, None
    if timing is not None:
        found, told, waits = run_in_time(trace, blocks, strategy, timing, tiers, fleet or Fleet(1))
    elif fleet is not None:
        found, told = run_fleet(trace, blocks, strategy, tiers, fleet)
    else:
        found = run_tiered(trace, blocks, strategy, tiers)
    seconds = time.perf_counter() - started
    result = ReplayResult.of(trace, str(strategy), blocks, found.hits, reclaimed=found.reclaimed, seconds=seconds)
    if waits is not None:
        result = dataclasses.replace(
            result,
            refused=waits.refused,
            queueing=waits.queueing,
            ttft=waits.ttft,
            order=waits.order,
            utilisation=waits.busy / waits.seconds if waits.seconds else np.zeros_like(waits.busy),
        )
    return dataclasses.replace(
        result, tiers=found.tiers(), restart=found.restart(), fleet=told if fleet is not None else None
    )


def as_tiers(tiers: Tiers | Sequence[TierSpec] | None, timing: Timing | None) -> Tiers | None:
    """Return the tiers to replay with; None for the pool alone."""
    if tiers is not None and not isinstance(tiers, Tiers):
        if isinstance(tiers, str) or not isinstance(tiers, Sequence):
            raise bad_argument("tiers", "a sequence of TierSpec", shown(tiers), "write [TierSpec(…)]")
        tiers = Tiers(tuple(tiers)) if len(tiers) else None
    if timing is not None and not isinstance(timing, Timing):
        raise bad_argument("timing", "a Timing", shown(timing), "write Timing(prefill_tokens_per_second=…)")
    if tiers is not None and tiers.restart_at is not None and timing is not None:
        raise bad_argument("restart_at", "none together with timing: a restart knows no time", f"{tiers.restart_at}")
    return tiers


def require_fleet(fleet: Fleet | None) -> None:
    """Refuse what is no fleet."""
    if fleet is not None and not isinstance(fleet, Fleet):
        raise bad_argument("fleet", "a Fleet", shown(fleet), "write Fleet(replicas, routing)")
