"""`Plan` and its parts: hardware, sizes, levels, load, verdict, fleets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pagedkv.errors import bad_argument
from pagedkv.sim.curves import HitCurve
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.replayer import ReplayResult
from pagedkv.validate import require_int, require_number

_GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """How fast one serving replica computes; the default is of the order of one H100 in bfloat16.

    Attributes
    ----------
    tflops : float
        Peak rate in 10¹² FLOP/s.
    mfu : float
        Share of the peak that prefill reaches, in (0, 1].
    decode_tokens_per_second : float
        Of one running request.
    """

    tflops: float = 400.0
    mfu: float = 0.5
    decode_tokens_per_second: float = 50.0

    def __post_init__(self) -> None:
        for name, high in (("tflops", 1e12), ("mfu", 1.0), ("decode_tokens_per_second", 1e9)):
            require_number(name, getattr(self, name), 0, high, above=True)

    @property
    def flops_per_second(self) -> float:
        """FLOP/s that prefill reaches."""
        return self.tflops * 1e12 * self.mfu


@dataclass(frozen=True)
class Size:
    """What one strategy does with one capacity.

    Attributes
    ----------
    strategy : str
    blocks, bytes : int
        Capacity; the bytes count the windows and states of running requests too (`Load.window_bytes`).
    hit_ratio, token_hit_ratio : float
    share : float
        Of the attainable hit ratio, 0 … 1.
    flops_saved, seconds_saved : float
        Prefill that need not be done, over the whole trace.
    """

    strategy: str
    blocks: int
    bytes: int
    hit_ratio: float
    token_hit_ratio: float
    share: float
    flops_saved: float
    seconds_saved: float

    @property
    def gib(self) -> float:
        """Capacity in 2³⁰ bytes."""
        return self.bytes / _GIB


@dataclass(frozen=True)
class Level:
    """The smallest capacity that reaches a share of the attainable hit ratio.

    Attributes
    ----------
    share : float
        What is wanted, 0.9 for 90% of what a cache without a limit finds.
    lru, best, optimum : Size
        Under LRU (exact), under the strategy that needs least, and as no strategy can beat it. The last two are within
        1% of the smallest capacity; what they reach there was replayed.
    """

    share: float
    lru: Size
    best: Size
    optimum: Size


@dataclass(frozen=True)
class Memory:
    """What a given memory size gives.

    Attributes
    ----------
    bytes, blocks : int
        The memory, and the blocks that fit.
    lru, best, optimum : Size
    all : tuple of Size
        Every strategy, the best first.
    """

    bytes: int
    blocks: int
    lru: Size
    best: Size
    optimum: Size
    all: tuple[Size, ...]


@dataclass(frozen=True)
class DiskPrice:
    """What a share of the attainable hit ratio costs in memory, and in memory with a disk beneath it.

    Attributes
    ----------
    share : float
        What is wanted, 0.9 for 90% of what a cache without a limit finds.
    memory_alone : Size
        The smallest memory under LRU that reaches it.
    disk_blocks, disk_bytes : int
        Of the disk that reaches it instead: it holds what `memory_alone` would. 0 where the memory beside it does.
    hit_ratio, disk_hit_ratio : float
        Blocks found in both, and in the disk alone, over blocks touched.
    first_token : float
        Seconds until prefill is done, with memory and disk: loading and computing, the mean of all requests.
    first_token_memory : float
        With `memory_alone` instead.
    """

    share: float
    memory_alone: Size
    disk_blocks: int
    disk_bytes: int
    hit_ratio: float
    disk_hit_ratio: float
    first_token: float
    first_token_memory: float


@dataclass(frozen=True)
class DiskPlan:
    """Memory or disk: what each share of the attainable costs, how soon the first token comes, and what to buy.

    Requests are taken to be stored on the disk when they end, LRU to rule both, and prefill to begin at once.

    Attributes
    ----------
    read_bytes_per_second : float
    load_tokens_per_second, prefill_tokens_per_second : float
        Tokens that the disk gives, and that are computed: the mean of the trace.
    memory : Size
        Beside the disk: the given memory, or what running requests hold at the peak.
    first_token, first_token_without : float
        Seconds until prefill is done with that memory and no disk, and without a cache; means of all requests.
    prices : tuple of DiskPrice
        For 80, 90 and 95% and the target, ascending.
    choice : str
        ``"disk"``, ``"memory"`` or ``"neither"``.
    advice : str
        Why, in a sentence or two.
    """

    read_bytes_per_second: float
    load_tokens_per_second: float
    prefill_tokens_per_second: float
    memory: Size
    first_token: float
    first_token_without: float
    prices: tuple[DiskPrice, ...]
    choice: str
    advice: str


@dataclass(frozen=True, eq=False)
class Line:
    """A curve: hit ratios by capacity, ascending.

    Attributes
    ----------
    name : str
        ``"lru"`` (exact, thinned to at most 400 points), ``"optimal"``, or a strategy's name (replayed points).
    blocks, bytes : int64 [n]
    hit_ratio, token_hit_ratio : float64 [n]
    """

    name: str
    blocks: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    hit_ratio: npt.NDArray[np.float64]
    token_hit_ratio: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What runs at the same time, from the arrival times and an estimate of the service times.

    A request is taken to run from its arrival for its whole prefill at the stated rate, as if it were alone and nothing
    were cached, and then for its output tokens at the decode rate.

    Attributes
    ----------
    mean_requests, peak_requests : float, int
        The mean is over the time from the first arrival until the last request is served.
    mean_blocks, peak_blocks : float, int
        Blocks that running requests hold, outputs included; the mean as above.
    shared : bool
        True where a block that several running requests hold is counted once; False for traces too large for that.
    prefill_load, prefill_load_saved : float
        Prefill time over the span of the trace, without a cache (above 1 one replica cannot keep up), and the part
        of it that the best strategy saves at the target.
    window_bytes : int
        Windows and recurrent states of the requests that run at the peak.
    """

    mean_requests: float
    peak_requests: int
    mean_blocks: float
    peak_blocks: int
    shared: bool
    prefill_load: float
    prefill_load_saved: float
    window_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What holds the hit ratio back.

    Attributes
    ----------
    kind : str
        ``"nothing"`` (to reuse), ``"capacity"``, ``"strategy"``, or ``"enough"`` (nothing holds it back at this size).
    text : str
        Two or three sentences for people.
    blocks, bytes : int
        The size that is judged: the given memory, else the smallest at which the optimum reaches the target.
    lost_to_capacity, lost_to_strategy : float
        Shares of the attainable hit ratio that are missing at the target there: those that the optimum does not find
        either, and those that only LRU does not find.
    regained : float
        The part of the gap between LRU and the optimum that the best strategy closes, 0 … 1.
    """

    kind: str
    text: str
    blocks: int
    bytes: int
    lost_to_capacity: float
    lost_to_strategy: float
    regained: float


# Fleets: what to try, what each configuration does, and which to order.


@dataclass(frozen=True)
class Prices:
    """What hardware costs an hour, in any currency.

    Attributes
    ----------
    replica_hour : float
        One replica with its GPUs.
    gib_hour, disk_gib_hour : float
        2³⁰ bytes of memory, beside a replica or in a shared tier; and of disk.
    """

    replica_hour: float = 0.0
    gib_hour: float = 0.0
    disk_gib_hour: float = 0.0

    def __post_init__(self) -> None:
        for name in ("replica_hour", "gib_hour", "disk_gib_hour"):
            require_number(name, getattr(self, name), 0, 1e12)

    @property
    def are_given(self) -> bool:
        """Whether anything costs anything."""
        return self.replica_hour + self.gib_hour + self.disk_gib_hour > 0


@dataclass(frozen=True)
class FleetSize:
    """One configuration.

    Attributes
    ----------
    replicas : int
    routing : str
    pool_bytes, host_bytes, disk_bytes : int
        Of each replica: its pool, and the memory and the disk beneath it; 0 for none.
    shared_bytes : int
        Of one tier that all share; 0 for none.
    """

    replicas: int
    routing: str
    pool_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0
    shared_bytes: int = 0

    def cost(self, prices: Prices) -> float:
        """Return what it costs an hour."""
        memory = self.replicas * self.host_bytes + self.shared_bytes
        disk = self.replicas * self.disk_bytes
        return (
            self.replicas * prices.replica_hour + memory / _GIB * prices.gib_hour + disk / _GIB * prices.disk_gib_hour
        )


HOST_READ, DISK_READ, SHARED_READ = 25e9, 5e9, 2.5e9
"""Bytes per second at which a replica loads where nothing is known: over PCIe 4, from an NVMe disk, from a network."""


@dataclass(frozen=True)
class FleetOptions:
    """What fleets to try, and what the one to order must reach.

    Attributes
    ----------
    replicas : tuple of int
    routings : tuple of str
        Names of `pagedkv.fleet.routing_names`, or ``"module:Class"``.
    host_memory, disk : tuple of int
        Bytes beside each replica, 0 for none.
    shared : tuple of int
        Bytes of one tier for all, 0 for none.
    share : float or None
        Of the attainable hit ratio, in (0, 1]; None where only the time counts.
    ttft_p99 : float or None
        Seconds within which 99 of 100 requests must have their first token; None where only the share counts.
    prices : Prices
        Without any the fewest replicas are the cheapest, then the least memory, then the least disk.
    host_read, disk_read, shared_read : float
        Bytes per second at which a replica loads from each tier.
    """

    replicas: tuple[int, ...]
    routings: tuple[str, ...] = ("prefix",)
    host_memory: tuple[int, ...] = (0,)
    disk: tuple[int, ...] = (0,)
    shared: tuple[int, ...] = (0,)
    share: float | None = 0.9
    ttft_p99: float | None = None
    prices: Prices = Prices()
    host_read: float = HOST_READ
    disk_read: float = DISK_READ
    shared_read: float = SHARED_READ

    def __post_init__(self) -> None:
        for name in ("replicas", "routings", "host_memory", "disk", "shared"):
            if not getattr(self, name):
                raise bad_argument(name, "at least one", "none")
        for number in self.replicas:
            require_int("replicas", number, 1, 1024)
        for name in ("host_memory", "disk", "shared"):
            for number in getattr(self, name):
                require_int(name, number, 0, 2**62)
        for name in ("host_read", "disk_read", "shared_read"):
            require_number(name, getattr(self, name), 0, 1e15, above=True)
        if self.share is None and self.ttft_p99 is None:
            raise bad_argument("share", "a share of the attainable, a ttft_p99, or both", "neither")
        if self.share is not None:
            require_number("share", self.share, 0, 1, above=True)
        if self.ttft_p99 is not None:
            require_number("ttft_p99", self.ttft_p99, 0, 1e9, above=True)


@dataclass(frozen=True)
class FleetOutcome:
    """What one configuration does with the trace, replayed in time.

    Attributes
    ----------
    size : FleetSize
    cost : float
        An hour; 0 without prices.
    hit_ratio : float
        Blocks found in pools and tiers over blocks touched.
    share : float
        Of the attainable hit ratio.
    ttft_p50, ttft_p99 : float
        Seconds within which so many of 100 requests have their first token; nan where none has one.
    service_p99 : float
        The same without the wait in the queue.
    queueing : float
        Seconds that a request waits for its turn, the mean.
    utilisation : float
        Share of the time in which the busiest replica loads and computes prompts.
    refused : int
        Requests larger than the pool of a replica.
    meets : bool
        Whether it reaches what is wanted.
    """

    size: FleetSize
    cost: float
    hit_ratio: float
    share: float
    ttft_p50: float
    ttft_p99: float
    service_p99: float
    queueing: float
    utilisation: float
    refused: int
    meets: bool


@dataclass(frozen=True)
class FleetPlan:
    """Which fleet to order.

    Attributes
    ----------
    options : FleetOptions
    prefill_tokens_per_second, decode_tokens_per_second : float
        Of one replica: prompts at the mean rate of the trace, and the answer of one request.
    one_pool : tuple of float
        Of the attainable, what one pool of the memory of 1, … replicas finds under LRU, for every number asked for.
    outcomes : tuple of FleetOutcome
        Everything that was replayed, the cheapest first.
    candidates : int
        Configurations that were asked for; those not replayed cost more than `best`.
    best : FleetOutcome or None
        The cheapest that meets what is wanted; of several of one cost the one with the soonest first token.
    nearest : FleetOutcome
        `best`, or where none meets it the one that lacks least.
    verdict : str
        What to order, or what is lacking and what would help.
    """

    options: FleetOptions
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    one_pool: tuple[float, ...]
    outcomes: tuple[FleetOutcome, ...]
    candidates: int
    best: FleetOutcome | None
    nearest: FleetOutcome
    verdict: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The answer to "how much KV cache does this traffic need?".

    Attributes
    ----------
    trace_name, trace_format : str
    requests, accesses, distinct_blocks, tokens : int
        Of the trace; tokens are input tokens.
    span_seconds : float
        From the first arrival to the last.
    block_tokens, bytes_per_block : int
        Tokens of a block of the trace, and its bytes in the layers that keep every token.
    model : ModelShape
    hardware : Hardware
    target : float
        Share of the attainable hit ratio that is wanted.
    attainable, attainable_tokens : float
        Hit ratios of a cache without a limit.
    attainable_blocks : int
        The smallest LRU capacity that finds all of it.
    prefill_flops, prefill_seconds : float
        Of the whole trace without a cache.
    levels : tuple of Level
        For 50, 80, 90, 95 and 99% and the target, ascending; empty where nothing is attainable.
    at_target : Level or None
        The one of `levels` that was asked for.
    knee : Size or None
        Where the LRU curve over the logarithm of the capacity bends most.
    memory : Memory or None
        What the given memory size gives.
    lines : tuple of Line
        LRU first, the optimum second, then the strategies.
    load : Load
    verdict : Verdict
    strategies : tuple of str
        That were compared, LRU always among them.
    notes : tuple of str
        Assumptions that a reader has to know.
    curve : HitCurve
        The exact LRU curve, all of it.
    runs : tuple of ReplayResult
        Every replay that was made, ``"optimal"`` among the strategies. Those at `shown_blocks` of LRU, the best
        strategy and the optimum have the `hits` of every request, the others none.
    shown_blocks : int or None
        The given memory; without it the best strategy's capacity at the target.
    disk : DiskPlan or None
        Whether to buy memory or a disk, where a read rate was given and there is something to reuse.
    fleet : FleetPlan or None
        Which fleet to order, where fleets were asked for.
    """

    trace_name: str
    trace_format: str
    requests: int
    accesses: int
    distinct_blocks: int
    tokens: int
    span_seconds: float
    block_tokens: int
    bytes_per_block: int
    model: ModelShape
    hardware: Hardware
    target: float
    attainable: float
    attainable_tokens: float
    attainable_blocks: int
    prefill_flops: float
    prefill_seconds: float
    levels: tuple[Level, ...]
    at_target: Level | None
    knee: Size | None
    memory: Memory | None
    lines: tuple[Line, ...]
    load: Load
    verdict: Verdict
    strategies: tuple[str, ...]
    notes: tuple[str, ...]
    curve: HitCurve = field(repr=False)
    runs: tuple[ReplayResult, ...] = field(repr=False)
    shown_blocks: int | None
    disk: DiskPlan | None = None
    fleet: FleetPlan | None = None
