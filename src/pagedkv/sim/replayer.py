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
from pagedkv.sim.replicas import Fleet, FleetReplay, FleetResult
from pagedkv.sim.tiered import Restart, TieredReplay, TierResult, Tiers, TierSpec
from pagedkv.sim.trace import MAX_BLOCKS, Trace, require_content
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
        Timed replay: running requests that had to give their blocks back, and requests larger than the pool.
    tiers : tuple of TierResult
        Replay with tiers: what each of them did. All hits above are those of the pool and the tiers together.
    restart : Restart or None
        Replay with a restart: what was found after it.
    fleet : FleetResult or None
        Replay on a fleet: what its replicas did. All hits above are those of all replicas, each in its own cache.
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
    tiers: tuple[TierResult, ...] = ()
    restart: Restart | None = None
    fleet: FleetResult | None = None

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


# Replay in time: a request holds its blocks while it is served, so concurrency takes room, and requests are preempted.


@dataclass(frozen=True)
class Timing:
    """How fast requests are served, for a replay in which each holds its blocks while it runs.

    Parameters
    ----------
    prefill_tokens_per_second, decode_tokens_per_second : float
        Of one request.
    """

    prefill_tokens_per_second: float = 10_000.0
    decode_tokens_per_second: float = 50.0

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            require_number(name, getattr(self, name), 0, above=True)


_PREFILLED, _SERVED = 0, 1


def _output_blocks(trace: Trace) -> npt.NDArray[np.int64]:
    return -(-trace.output_tokens // trace.block_tokens)


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
        Without it a request comes and goes at once. With it a request holds its blocks from its arrival until it is
        served, so concurrency takes room, and running requests may be preempted.
    tiers : Tiers or sequence of TierSpec, optional
        Tiers beneath the pool, the fastest first, or a restart. Not together with `timing`.
    fleet : Fleet, optional
        Replicas that share `blocks`, and the routing of requests to them. Not together with `timing` or `tiers`.

    Returns
    -------
    ReplayResult

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only, `blocks` is out of range, the strategy is unknown or returns something
        else than scores, the routing policy gives no order, or two of `tiers`, `timing` and `fleet` are given.

    Examples
    --------
    >>> replay(trace, 2_000, tiers=[TierSpec("disk", 20_000)]).tiers[0].hit_ratio  # doctest: +SKIP
    """
    require_content(trace)
    tiers = as_tiers(tiers, timing)
    require_fleet_alone(fleet, timing, tiers)
    blocks = require_int("blocks", blocks, 1, MAX_BLOCKS)
    if fleet is not None:
        return _replay_fleet(trace, blocks, strategy, fleet)
    if tiers is not None:
        return _replay_tiered(trace, blocks, strategy, tiers)
    # A pool larger than the trace ever fills finds the same hits in less memory.
    most = trace.num_distinct if timing is None else trace.num_accesses + int(_output_blocks(trace).sum())
    cache = ContentCache(min(blocks, max(1, most)), strategy)
    if timing is not None:
        return dataclasses.replace(replay_timed(trace, cache, str(strategy), timing), blocks=blocks)
    started = time.perf_counter()
    hits = cache.run(trace.ids, trace.offsets)
    seconds = time.perf_counter() - started
    reclaimed = cache.stats.blocks_reclaimed
    return ReplayResult.of(trace, str(strategy), blocks, hits, reclaimed=reclaimed, seconds=seconds)


def as_tiers(tiers: Tiers | Sequence[TierSpec] | None, timing: Timing | None) -> Tiers | None:
    """Return the tiers to replay with; None for the pool alone."""
    if tiers is not None and not isinstance(tiers, Tiers):
        if isinstance(tiers, str) or not isinstance(tiers, Sequence):
            raise bad_argument("tiers", "a sequence of TierSpec", shown(tiers), "write [TierSpec(…)]")
        tiers = Tiers(tuple(tiers)) if len(tiers) else None
    if timing is not None and not isinstance(timing, Timing):
        raise bad_argument("timing", "a Timing", shown(timing), "write Timing(prefill_tokens_per_second=…)")
    if tiers is not None and timing is not None:
        raise bad_argument("tiers", "none together with timing: tiers know no time", shown(tiers))
    return tiers


def require_fleet_alone(fleet: Fleet | None, timing: Timing | None, tiers: Tiers | None) -> None:
    """Refuse what is no fleet, and one together with what its replicas do not know."""
    if fleet is not None and not isinstance(fleet, Fleet):
        raise bad_argument("fleet", "a Fleet", shown(fleet), "write Fleet(replicas, routing)")
    if fleet is not None and (timing is not None or tiers is not None):
        raise bad_argument("fleet", "none together with timing or tiers: replicas know of their pools", shown(fleet))


def _replay_fleet(trace: Trace, blocks: int, strategy: Strategy, fleet: Fleet) -> ReplayResult:
    made = FleetReplay(trace, blocks, strategy, fleet)
    made.run()
    result = ReplayResult.of(trace, str(strategy), blocks, made.hits, reclaimed=made.reclaimed, seconds=made.seconds)
    return dataclasses.replace(result, fleet=made.result())


def _replay_tiered(trace: Trace, blocks: int, strategy: Strategy, tiers: Tiers) -> ReplayResult:
    made = TieredReplay(trace, blocks, strategy, tiers)
    started = time.perf_counter()
    made.run()
    seconds = time.perf_counter() - started
    result = ReplayResult.of(trace, str(strategy), blocks, made.hits, reclaimed=made.reclaimed, seconds=seconds)
    return dataclasses.replace(result, tiers=made.results(), restart=made.restart())
