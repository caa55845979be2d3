"""Capacity planner: from a trace and a model's shape to GiB and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pagedkv.control.strategies import strategy_names
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.format import format_bytes, percent, share
from pagedkv.sim.baselines import LRU, OPTIMAL
from pagedkv.sim.curves import HitCurve, knee, lru_curve
from pagedkv.sim.disk_plan import price_disk
from pagedkv.sim.fleet_plan import plan_fleet
from pagedkv.sim.load import MAX_MEMORY, blocks_in, estimate_load
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_types import FleetOptions, Hardware, Level, Line, Load, Memory, Plan, Size, Verdict
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.sweeps import Progress, sweep
from pagedkv.sim.trace import MAX_BLOCKS, Floats, Int64s, Trace, require_content
from pagedkv.validate import require_number, shown

# The search for the smallest capacity that finds enough, and the memory of every replay on the way.

TOLERANCE = 1.01
"""Where a search stops: the capacity below which too little is found is within 1%."""
_POINTS = 8
_WORTH_PROCESSES = 1_000_000_000
"""Block accesses of one round of replays; less is done in this process before others have started and compiled."""


class Found(NamedTuple):
    """What one replay found; with the hits of every request only where `Search.keep` asked for them."""

    result: ReplayResult
    flops_saved: float  # prefill FLOPs of the tokens that were found

    @property
    def hit_blocks(self) -> int:
        """Blocks found."""
        return self.result.hit_blocks


class Search:
    """Replays of one trace, each done once; by default other processes are started for large traces only."""

    def __init__(self, trace: Trace, model: ModelShape, jobs: int | None, progress: Progress | None) -> None:
        self.trace = trace
        self._model = model
        self._jobs = jobs
        self._progress = progress
        self._found: dict[tuple[str, int], Found] = {}

    def run(self, strategies: Iterable[str], capacities: Iterable[int]) -> None:
        """Replay every strategy at every capacity, but nothing twice."""
        wanted = sorted(set(capacities))
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in dict.fromkeys(strategies):
            missing = tuple(blocks for blocks in wanted if (name, blocks) not in self._found)
            groups.setdefault(missing, []).append(name)
        for missing, names in groups.items():
            if missing:
                jobs = self._jobs_for(names, missing)
                for result in sweep(self.trace, names, missing, jobs=jobs, progress=self._progress):
                    self._found[result.strategy, result.blocks] = self._summary(result)

    def at(self, strategy: str, blocks: int) -> Found:
        """Return what a strategy finds with a capacity."""
        self.run([strategy], [blocks])
        return self._found[strategy, blocks]

    def keep(self, strategies: Iterable[str], blocks: int) -> None:
        """Replay once more and keep the hits of every request."""
        for result in sweep(self.trace, list(dict.fromkeys(strategies)), [blocks], jobs=1):
            self._found[result.strategy, blocks] = self._summary(result)._replace(result=result)

    @property
    def results(self) -> tuple[ReplayResult, ...]:
        """Every replay that was made, by strategy and capacity."""
        return tuple(self._found[key].result for key in sorted(self._found))

    def capacities(self, strategy: str) -> list[int]:
        """Return the capacities that a strategy was replayed with, ascending."""
        return sorted(blocks for name, blocks in self._found if name == strategy)

    def estimate(self, strategy: str, hits: int, enough: int) -> float:
        """Estimate the capacity that finds `hits` blocks from the replays up to `enough`; infinity if none does."""
        tried = [blocks for blocks in self.capacities(strategy) if blocks <= enough]
        high = next((blocks for blocks in tried if self.at(strategy, blocks).hit_blocks >= hits), None)
        if high is None:
            return math.inf
        low = max((blocks for blocks in tried if blocks < high), default=0)
        below = self.at(strategy, low).hit_blocks if low else 0
        share = (hits - below) / max(self.at(strategy, high).hit_blocks - below, 1)
        return low + share * (high - low)

    def smallest(self, strategy: str, hits: int, enough: int) -> int:
        """Return a capacity that finds `hits` blocks, and below which, within 1%, too few are found; `enough` does.

        More capacity may find less under a strategy that is no stack algorithm (Mattson et al. 1970); what is returned
        was replayed and does find `hits` all the same.
        """
        tried = [blocks for blocks in self.capacities(strategy) if blocks < enough]
        high = next((blocks for blocks in tried if self.at(strategy, blocks).hit_blocks >= hits), enough)
        low = max((blocks for blocks in tried if blocks < high), default=0)
        while high - low > 1 and high > low * TOLERANCE:
            middle = self._guess(strategy, hits, low, high)
            if self.at(strategy, middle).hit_blocks >= hits:
                high = middle
            else:
                low = middle
        return high

    def _jobs_for(self, names: Sequence[str], capacities: Sequence[int]) -> int | None:
        work = len(names) * len(capacities) * self.trace.num_accesses
        return 1 if self._jobs is None and work < _WORTH_PROCESSES else self._jobs

    def _guess(self, strategy: str, hits: int, low: int, high: int) -> int:
        """Interpolate in the logarithm of the capacity, but always leave a fifth of the bracket behind."""
        if low < 1:
            return max(1, high // 2)
        below, above = self.at(strategy, low).hit_blocks, self.at(strategy, high).hit_blocks
        share = min(max((hits - below) / max(above - below, 1), 0.2), 0.8)
        guess = round(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
        return min(max(guess, low + 1), high - 1)

    def _summary(self, result: ReplayResult) -> Found:
        cached = np.minimum(result.hits.astype(np.int64) * self.trace.block_tokens, self.trace.input_tokens)
        without_hits = replace(result, hits=np.zeros(0, np.int32))
        return Found(without_hits, float(self._model.prefill_flops(cached).sum()))


def smallest_lru(curve: HitCurve, hits: int) -> int:
    """Return the fewest blocks with which LRU finds `hits` blocks: exact, from the curve; at least 1."""
    return max(1, int(curve.blocks[np.searchsorted(curve.hit_blocks, hits)]))


def capacities_to_try(curve: HitCurve, wanted: Sequence[int]) -> list[int]:
    """Return the capacities that all strategies are compared at: those where LRU finds enough, and a few below."""
    last, first = max(wanted), max(1, min(wanted) // 8)
    spread = np.geomspace(first, last, _POINTS) if last > first else np.array([last])
    return sorted({*wanted, *(int(round(blocks)) for blocks in spread)})


# What holds the hit ratio back: the capacity, the strategy, or that there is nothing to reuse.

NOTHING = 0.1
"""Below this attainable hit ratio a cache of any size saves less than a tenth of the prefill."""
_LARGE_FACTOR = 2
"""Where LRU needs this many times the optimum's capacity, looking at the strategy comes before buying memory."""


def nothing_to_reuse(attainable: float) -> Verdict:
    """Judge traffic that hardly repeats itself."""
    found = f"finds only {percent(attainable)} of the blocks" if attainable else "finds nothing"
    text = (
        f"Nothing to reuse: even a cache without a limit {found}. Neither memory nor another strategy changes that; "
        "prompts have to share their beginnings first."
    )
    return Verdict("nothing", text, 0, 0, 0.0, 0.0, 0.0)


def judge(
    attainable: float, target: float, level: Level, sizes: tuple[Size, Size, Size], rival: Size | None = None
) -> Verdict:
    """Judge traffic for which no memory was given: by what LRU needs for the target, and what the optimum does.

    `sizes` are LRU, the best strategy and the optimum, all at the optimum's capacity; `rival` is the best strategy but
    LRU at the capacity that LRU needs.
    """
    if attainable < NOTHING:
        return nothing_to_reuse(attainable)
    lru, best, optimum = sizes
    regained = _regained(lru, best, optimum)
    needs = f"{share(target)} of what can be found at all takes {format_bytes(level.lru.bytes)} under LRU"
    least = format_bytes(level.optimum.bytes)
    if level.lru.blocks >= _LARGE_FACTOR * level.optimum.blocks:
        kind, text = "strategy", f"Limited by the strategy: {needs}, and {least} if the future were known."
    else:
        kind, text = "capacity", f"Limited by capacity: {needs}, and still {least} if the future were known."
    text = f"{text} {_advice(level, best, regained, rival)}"
    return Verdict(kind, text, optimum.blocks, optimum.bytes, *_losses(target, lru, optimum), regained)


def judge_memory(attainable: float, target: float, level: Level, memory: Memory) -> Verdict:
    """Judge a memory size: where LRU misses the target there, the larger of two losses names the cause.

    What the optimum lacks too is a matter of capacity; what only LRU lacks is one of the strategy.
    """
    if attainable < NOTHING:
        return nothing_to_reuse(attainable)
    lru, best, optimum = memory.lru, memory.best, memory.optimum
    to_capacity, to_strategy = _losses(target, lru, optimum)
    regained = _regained(lru, best, optimum)
    found = f"with {format_bytes(memory.bytes)} LRU finds {percent(lru.share)} of what can be found at all"
    if lru.share >= target:
        kind, text = "enough", f"Enough: {found}, and {format_bytes(level.lru.bytes)} would do for {share(target)}."
    else:
        kind = "strategy" if to_strategy > to_capacity else "capacity"
        cause = "the strategy" if kind == "strategy" else "capacity"
        text = f"Limited by {cause}: {found}, and {percent(optimum.share)} would be found if the future were known. "
        rival = next((size for size in memory.all if size.strategy != LRU), None)
        text += f"{_closed(best, regained, rival)} {share(target)} takes {format_bytes(level.lru.bytes)} under LRU."
    return Verdict(kind, text, lru.blocks, memory.bytes, to_capacity, to_strategy, regained)


def _losses(target: float, lru: Size, optimum: Size) -> tuple[float, float]:
    return max(0.0, target - optimum.share), max(0.0, min(target, optimum.share) - lru.share)


def _regained(lru: Size, best: Size, optimum: Size) -> float:
    gap = optimum.share - lru.share
    return min(1.0, (best.share - lru.share) / gap) if gap > 0 else 0.0


def _closed(best: Size, regained: float, rival: Size | None) -> str:
    if regained < 0.005:
        return f"LRU is best there: {_next_best(rival)}." if rival else "No other strategy was compared."
    return f"{best.strategy} closes {percent(regained)} of that gap."


def _next_best(rival: Size) -> str:
    return f"{rival.strategy}, the next, finds {percent(rival.share)} of what can be found in the same memory"


def _advice(level: Level, best: Size, regained: float, rival: Size | None) -> str:
    """Say what to buy and what to run, where no memory was given."""
    if level.best.strategy != LRU:
        return f"{level.best.strategy} takes {format_bytes(level.best.bytes)}: plan that."
    plan = f"plan {format_bytes(level.lru.bytes)} and keep LRU"
    if regained < 0.005:
        if rival is None:
            return f"No other strategy was compared: {plan}."
        return f"LRU is best here: {_next_best(rival)}, LRU {percent(level.lru.share)}; {plan}."
    return (
        f"No strategy compared reaches that with less: {plan}. With only {format_bytes(best.bytes)}, take "
        f"{best.strategy}: there it finds {percent(best.share)} of what can be found, which closes {percent(regained)} "
        "of the gap between LRU and the best possible."
    )


# What a plan may be asked for.

# They need arguments that only the operator knows, or look at something else than reuse.
_NOT_BY_DEFAULT = {"longestfirst", "priority", "streamingllm", "ttl"}


def default_strategies() -> tuple[str, ...]:
    """Return the registered strategies that are compared where none are named, LRU first."""
    return (LRU, *(name for name in strategy_names() if name not in _NOT_BY_DEFAULT | {LRU}))


def checked_share(target: object) -> float:
    """Return the share of the attainable hit ratio that is wanted."""
    try:
        return require_number("target", target, 0, 1, above=True)
    except InvalidOperation:
        wanted = "a share of the attainable hits above 0 and at most 1 (0.9 is 90%)"
        raise bad_argument("target", wanted, shown(target)) from None


def checked_names(strategies: Sequence[str] | None) -> tuple[str, ...]:
    """Return the strategies to compare, LRU first, the optimum left out."""
    if strategies is None:
        return default_strategies()
    if isinstance(strategies, str) or not all(isinstance(name, str) and name.strip() for name in strategies):
        raise bad_argument("strategies", "a sequence of names", f"{strategies!r}")
    named = [LRU if name.strip().lower() == LRU else name.strip() for name in strategies]
    return tuple(dict.fromkeys([LRU, *(name for name in named if name.lower() != OPTIMAL)]))


LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
"""Shares of the attainable hit ratio that every plan prices."""

_MAX_POINTS = 400


def plan(
    trace: Trace,
    model: ModelShape,
    *,
    target: float = 0.9,
    memory: int | None = None,
    strategies: Sequence[str] | None = None,
    hardware: Hardware | None = None,
    prefill_rate: float | None = None,
    disk_read: float | None = None,
    fleet: FleetOptions | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find the capacity that some traffic needs, what it saves, and what holds it back.

    Parameters
    ----------
    trace : Trace
        With the content of its blocks.
    model : ModelShape
        Gives a block its bytes and a token its FLOPs.
    target : float
        Share of the attainable hit ratio that is wanted, in (0, 1].
    memory : int, optional
        Bytes: also say what this much gives.
    strategies : sequence of str, optional
        To compare beside LRU; `default_strategies` where none are named.
    hardware : Hardware, optional
        To turn FLOPs into seconds.
    prefill_rate : float, optional
        Tokens per second of prefill as measured, the mean of prompts like these; in place of the rate of `hardware`.
    disk_read : float, optional
        Bytes per second that a disk reads: also price a disk tier beneath the pool.
    fleet : FleetOptions, optional
        Also find the cheapest fleet that meets a target; `memory` is that of one replica then.
    jobs : int, optional
        Processes that replay; by default this one alone, and one a core where a round takes longer than their start.
    progress : callable, optional
        Called with (cells done, cells asked for) of every round of replays.

    Returns
    -------
    Plan

    Raises
    ------
    InvalidOperation
        The trace is empty or carries lengths only, `target` is no share, `memory` does not hold one block, or a
        strategy is unknown.

    Notes
    -----
    What LRU needs is read from its exact curve (Mattson et al. 1970). The other strategies are replayed at capacities
    below that, and the one that needs least is searched to within 1%; so is the optimum.
    """
    require_content(trace)
    if not trace.num_accesses:
        raise bad_argument("trace", "at least one request with a block", f"{trace.name!r} with none")
    wanted, names, hardware = checked_share(target), checked_names(strategies), hardware or Hardware()
    if prefill_rate is not None:
        hardware = at_prefill_rate(prefill_rate, trace, model, hardware)
    if disk_read is not None:
        disk_read = require_number("disk_read", disk_read, 0, 1e15, above=True)
    if fleet is not None and memory is None:
        raise bad_argument("memory", "that of one replica, for a fleet", "none")
    load = estimate_load(trace, model, hardware)
    if (trace.num_distinct + 1) * trace.block_tokens * model.bytes_per_token + load.window_bytes >= MAX_MEMORY:
        raise bad_argument("model", "sizes that fit a memory", f"{model.bytes_per_token} bytes per token")
    fitting = None if memory is None else blocks_in(memory, trace, model, load)
    curve = lru_curve(trace)
    search = Search(trace, model, jobs, progress)
    planner = _Planner(trace, model, hardware, wanted, names, curve, search, load)
    made = planner.made(memory, fitting)
    if disk_read is not None and made.levels:
        beside = planner.size(LRU, fitting or min(max(1, load.peak_blocks), MAX_BLOCKS))
        made = replace(made, disk=price_disk(made, beside, disk_read))
    if fleet is not None and memory is not None:
        found = plan_fleet(trace, model, hardware, memory, fleet, load=load, curve=curve, jobs=jobs, progress=progress)
        made = replace(made, fleet=found)
    return made


def at_prefill_rate(rate: float, trace: Trace, model: ModelShape, hardware: Hardware) -> Hardware:
    """Return hardware that computes the prompts of a trace at so many tokens per second."""
    rate = require_number("prefill_rate", rate, 0, 1e12, above=True)
    flops = float(model.prefill_flops(trace.input_tokens).sum()) / max(1, trace.num_tokens)
    return replace(hardware, tflops=rate * flops / 1e12, mfu=1.0)


@dataclass(frozen=True, eq=False)
class _Planner:
    """The steps of a plan, around what they all need."""

    trace: Trace
    model: ModelShape
    hardware: Hardware
    target: float
    names: tuple[str, ...]
    curve: HitCurve
    search: Search
    load: Load

    @property
    def bytes_per_block(self) -> int:
        return self.trace.block_tokens * self.model.bytes_per_token

    @property
    def window_bytes(self) -> int:
        return self.load.peak_requests * self.model.window_bytes_per_sequence

    @property
    def attainable_hits(self) -> int:
        return int(self.curve.hit_blocks[-1])

    def made(self, memory: int | None, fitting: int | None) -> Plan:
        """Return the plan; `fitting` blocks go into `memory` bytes."""
        levels = self.levels(() if fitting is None else (fitting,))
        at_target = next((level for level in levels if level.share == self.target), None)
        given = None if fitting is None or memory is None else self.memory(memory, fitting)
        verdict = self.verdict(at_target, given)
        shown = fitting or (at_target.best.blocks if at_target else None)
        if shown:
            best = given.best if given else at_target.best if at_target else None
            self.search.keep([LRU, best.strategy if best else LRU, OPTIMAL], shown)
        trace, flops = self.trace, float(self.model.prefill_flops(self.trace.input_tokens).sum())
        seconds = flops / self.hardware.flops_per_second
        saved = self.load.prefill_load * at_target.best.seconds_saved / max(seconds, 1e-300) if at_target else 0.0
        bend = knee(self.curve)
        return Plan(
            trace_name=trace.name,
            trace_format=trace.format,
            requests=trace.num_requests,
            accesses=trace.num_accesses,
            distinct_blocks=trace.num_distinct,
            tokens=trace.num_tokens,
            span_seconds=float(trace.times[-1] - trace.times[0]),
            block_tokens=trace.block_tokens,
            bytes_per_block=self.bytes_per_block,
            model=self.model,
            hardware=self.hardware,
            target=self.target,
            attainable=self.curve.attainable,
            attainable_tokens=self.curve.token_attainable,
            attainable_blocks=smallest_lru(self.curve, self.attainable_hits) if self.attainable_hits else 0,
            prefill_flops=flops,
            prefill_seconds=seconds,
            levels=levels,
            at_target=at_target,
            knee=self.size(LRU, bend) if bend else None,
            memory=given,
            lines=self.lines(),
            load=replace(self.load, prefill_load_saved=saved),
            verdict=verdict,
            strategies=self.names,
            notes=self.notes(shown),
            curve=self.curve,
            runs=self.search.results,
            shown_blocks=shown,
        )

    def levels(self, also: tuple[int, ...]) -> tuple[Level, ...]:
        """Price every share; compare all strategies at the capacities in `also` too."""
        shares = sorted({*LEVELS, self.target})
        if not self.attainable_hits:
            return ()
        hits = [max(1, math.ceil(share * self.attainable_hits - 1e-9)) for share in shares]
        under_lru = [smallest_lru(self.curve, count) for count in hits]
        self.search.run([*self.names, OPTIMAL], [*capacities_to_try(self.curve, under_lru), *also])
        levels = [self._level(*given) for given in zip(shares, hits, under_lru, strict=True)]
        for place in range(len(levels) - 2, -1, -1):
            # Other strategies than LRU may need less for more: what reaches a higher share reaches this one, too.
            if levels[place + 1].best.blocks < levels[place].best.blocks:
                levels[place] = replace(levels[place], best=levels[place + 1].best)
        return tuple(levels)

    def _level(self, share: float, hits: int, under_lru: int) -> Level:
        estimates = {name: self.search.estimate(name, hits, under_lru) for name in self.names} | {LRU: under_lru}
        name = min(estimates, key=lambda name: estimates[name])
        blocks = under_lru if name == LRU else self.search.smallest(name, hits, under_lru)
        if blocks >= under_lru:
            name, blocks = LRU, under_lru
        bound = self.search.smallest(OPTIMAL, hits, blocks)
        return Level(share, self.size(LRU, under_lru), self.size(name, blocks), self.size(OPTIMAL, bound))

    def memory(self, memory: int, blocks: int) -> Memory:
        """Say what `blocks` blocks give under every strategy."""
        sizes = sorted((self.size(name, blocks) for name in self.names), key=lambda size: -size.hit_ratio)
        lru = next(size for size in sizes if size.strategy == LRU)
        # LRU where another one is only as good.
        best = lru if lru.hit_ratio >= sizes[0].hit_ratio else sizes[0]
        return Memory(memory, blocks, lru, best, self.size(OPTIMAL, blocks), tuple(sizes))

    def verdict(self, at_target: Level | None, memory: Memory | None) -> Verdict:
        """Judge the memory, or the smallest size that can do at all."""
        if at_target is None:
            return nothing_to_reuse(self.curve.attainable)
        if memory is not None:
            return judge_memory(self.curve.attainable, self.target, at_target, memory)
        blocks = at_target.optimum.blocks
        best = max((self.size(name, blocks) for name in self.names), key=lambda size: size.hit_ratio)
        sizes = (self.size(LRU, blocks), best, at_target.optimum)
        others = (self.size(name, at_target.lru.blocks) for name in self.names if name != LRU)
        rival = max(others, key=lambda size: size.hit_ratio, default=None)
        return judge(self.curve.attainable, self.target, at_target, sizes, rival)

    def size(self, strategy: str, blocks: int) -> Size:
        """Return what a strategy does with a capacity; replayed if it was not yet."""
        found = self.search.at(strategy, blocks)
        return Size(
            strategy=strategy,
            blocks=blocks,
            bytes=blocks * self.bytes_per_block + self.load.window_bytes,
            hit_ratio=found.result.hit_ratio,
            token_hit_ratio=found.result.token_hit_ratio,
            share=found.hit_blocks / self.attainable_hits if self.attainable_hits else 0.0,
            flops_saved=found.flops_saved,
            seconds_saved=found.flops_saved / self.hardware.flops_per_second,
        )

    def lines(self) -> tuple[Line, ...]:
        """Return the curves to draw: LRU, the optimum, the other strategies."""
        curve, places = self.curve, 1 + _thinned(len(self.curve.blocks) - 1)  # without the capacity 0
        exact = self._line(LRU, curve.blocks[places], curve.hit_ratio[places], curve.token_hit_ratio[places])
        return (exact, *(self._replayed(name) for name in (OPTIMAL, *self.names) if name != LRU))

    def _replayed(self, name: str) -> Line:
        results = [self.search.at(name, blocks).result for blocks in self.search.capacities(name)]
        found = [(result.blocks, result.hit_ratio, result.token_hit_ratio) for result in results]
        blocks, hits, tokens = np.array(found, np.float64).reshape(-1, 3).T.copy()
        return self._line(name, blocks.astype(np.int64), hits, tokens)

    def _line(self, name: str, blocks: Int64s, hits: Floats, tokens: Floats) -> Line:
        sizes = blocks * np.int64(self.bytes_per_block) + np.int64(self.load.window_bytes)
        return Line(name, blocks, sizes, hits, tokens)

    def notes(self, shown: int | None) -> tuple[str, ...]:
        """Say what was assumed, and what the size that is shown leaves out."""
        notes = list(self.model.notes)
        if shown is not None and self.load.peak_blocks > shown:
            notes.append(
                f"at the peak running requests alone hold {self.load.peak_blocks:,} blocks, more than the {shown:,} "
                "planned here: on one replica of this speed some would have to wait"
            )
        if self.model.state_bytes_per_sequence:
            notes.append(
                "states are counted once per running request, "
                f"{format_bytes(self.model.state_bytes_per_sequence)} each; an engine that resumes cached "
                "prefixes keeps one more at every place where it can"
            )
        if self.model.window_bytes_per_sequence:
            all_layers = self.model.bytes_per_token_all_layers / self.model.bytes_per_token
            notes.append(
                f"windowed layers are counted once per running request, {format_bytes(self.window_bytes)} at the "
                f"peak; an engine that keeps them for every cached block needs {all_layers:.1f}× the memory"
            )
        if self.model.kv_dtype in ("int8", "fp8"):
            notes.append(f"the scales of {self.model.kv_dtype} are not counted")
        return tuple(notes)


def _thinned(count: int) -> Int64s:
    """Return at most 400 places of `count`, the first and the last among them, evenly in their logarithm."""
    if count <= _MAX_POINTS:
        return np.arange(count, dtype=np.int64)
    return np.unique(np.round(np.geomspace(1, count, _MAX_POINTS)).astype(np.int64)) - 1
