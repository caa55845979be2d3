"""How much KV cache some traffic needs: from a trace and a model's shape to GiB and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pagedkv.errors import InvalidOperation
from pagedkv.sim.curves import HitCurve, knee, lru_curve
from pagedkv.sim.hit_curve import require_content
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_arguments import (
    LRU,
    blocks_in,
    check_sizes,
    checked_names,
    checked_share,
)
from pagedkv.sim.plan_load import estimate_load
from pagedkv.sim.plan_search import OPTIMAL, Search, capacities_to_try, smallest_lru
from pagedkv.sim.plan_types import Hardware, Level, Line, Load, Memory, Plan, Size, Verdict
from pagedkv.sim.plan_verdict import format_bytes, judge, judge_memory, nothing_to_reuse
from pagedkv.sim.trace import Trace

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
        raise InvalidOperation(f"trace expects at least one request with a block, got {trace.name!r} with none")
    wanted, names, hardware = checked_share(target), checked_names(strategies), hardware or Hardware()
    load = estimate_load(trace, model, hardware)
    check_sizes(trace, model, load)
    fitting = None if memory is None else blocks_in(memory, trace, model, load)
    curve = lru_curve(trace)
    search = Search(trace, model, jobs, progress)
    return _Planner(trace, model, hardware, wanted, names, curve, search, load).made(memory, fitting)


class _Planner:
    """The steps of a plan, around what they all need."""

    def __init__(
        self,
        trace: Trace,
        model: ModelShape,
        hardware: Hardware,
        target: float,
        names: tuple[str, ...],
        curve: HitCurve,
        search: Search,
        load: Load,
    ) -> None:
        self.trace, self.model, self.hardware, self.target = trace, model, hardware, target
        self.names, self.curve, self.search, self.load = names, curve, search, load
        self.bytes_per_block = trace.block_tokens * model.bytes_per_token
        self.attainable_hits = int(curve.hit_blocks[-1])

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
        saved = at_target.best.seconds_saved if at_target else 0.0
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
            prefill_seconds=flops / self.hardware.flops_per_second,
            levels=levels,
            at_target=at_target,
            knee=self.size(LRU, bend) if bend else None,
            memory=given,
            lines=self.lines(),
            load=replace(
                self.load, prefill_load_saved=self.load.prefill_load * saved / max(self._seconds(flops), 1e-300)
            ),
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
        return tuple(self._level(*given) for given in zip(shares, hits, under_lru, strict=True))

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
        return judge(self.curve.attainable, self.target, at_target, sizes)

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
            seconds_saved=self._seconds(found.flops_saved),
        )

    def lines(self) -> tuple[Line, ...]:
        """Return the curves to draw: LRU, the optimum, the other strategies."""
        first = 1 if self.curve.blocks[0] == 0 else 0
        places = _thinned(len(self.curve.blocks) - first) + first
        exact = self._line(
            LRU, self.curve.blocks[places], self.curve.hit_ratio[places], self.curve.token_hit_ratio[places]
        )
        return (exact, *(self._replayed(name) for name in (OPTIMAL, *self.names) if name != LRU))

    def _replayed(self, name: str) -> Line:
        blocks = self.search.capacities(name)
        results = [self.search.at(name, count).result for count in blocks]
        ratios = ([result.hit_ratio for result in results], [result.token_hit_ratio for result in results])
        return self._line(name, np.array(blocks, np.int64), *(np.array(values, np.float64) for values in ratios))

    def _line(self, name: str, blocks: np.ndarray, hits: np.ndarray, tokens: np.ndarray) -> Line:
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
        if self.load.window_bytes:
            all_layers = self.model.bytes_per_token_all_layers / self.model.bytes_per_token
            notes.append(
                f"windowed layers are counted once per running request, {format_bytes(self.load.window_bytes)} at the "
                f"peak; an engine that keeps them for every cached block needs {all_layers:.1f}× the memory"
            )
        if self.model.kv_dtype in ("int8", "fp8"):
            notes.append(f"the scales of {self.model.kv_dtype} are not counted")
        return tuple(notes)

    def _seconds(self, flops: float) -> float:
        return flops / self.hardware.flops_per_second


def _thinned(count: int) -> np.ndarray:
    """Return at most 400 places of `count`, the first and the last among them, evenly in their logarithm."""
    if count <= _MAX_POINTS:
        return np.arange(count)
    return np.unique(np.round(np.geomspace(1, count, _MAX_POINTS)).astype(np.int64)) - 1
