"""Data of a report: trace, replays and curve, and which of them are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pagedkv.format import count
from pagedkv.sim.baselines import LRU, OPTIMAL
from pagedkv.sim.curves import HitCurve, knee
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.report.html import format_bytes, round_count, short
from pagedkv.sim.trace import Trace

_COLOURS = ("c2", "c3", "c4")


def shown_name(strategy: str) -> str:
    """Return how the charts call a strategy."""
    return "best possible" if strategy == OPTIMAL else strategy


@dataclass(frozen=True)
class Points:
    """The hit ratios of one strategy at some capacities, ascending."""

    name: str
    blocks: tuple[int, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """A trace and what replays of it found."""

    trace: Trace
    results: Sequence[ReplayResult]  # the optimum among them
    curve: HitCurve | None = None  # of LRU
    lines: tuple[Points, ...] | None = None  # what the curve chart shows beside it; the results by default
    bytes_per_block: float | None = None  # of the model at hand: sizes are then told in GiB
    extra_bytes: float = 0.0  # what a cache of any size needs on top
    chosen_blocks: int | None = None  # a size to mark, by this name
    chosen_name: str = "chosen"
    knee_blocks: int | None = None  # a size to mark; found on the curve where it is not given

    @cached_property
    def attainable(self) -> float:
        """The hit ratio of a cache without a limit."""
        return self.trace.attainable_hit_ratio

    @cached_property
    def beneath(self) -> str:
        """The tiers beneath every pool, to follow its size; empty without any."""
        tiers = next((result.tiers for result in self.results if result.tiers), ())
        return "".join(f" and a {tier.medium} tier of {count(tier.blocks)} blocks" for tier in tiers)

    @cached_property
    def capacities(self) -> list[int]:
        """Every capacity that was replayed, ascending."""
        return sorted({result.blocks for result in self.results})

    @cached_property
    def points(self) -> dict[str, Points]:
        """What the curve chart shows, by strategy."""
        if self.lines is not None:
            return {line.name: line for line in self.lines}
        names = dict.fromkeys(result.strategy for result in self.results)
        cells = {name: [cell for size in self.capacities if (cell := self.cell(name, size))] for name in names}
        return {
            name: Points(name, tuple(cell.blocks for cell in found), tuple(cell.hit_ratio for cell in found))
            for name, found in cells.items()
        }

    @cached_property
    def strategies(self) -> list[str]:
        """Every strategy but the optimum, the best on average first."""
        return sorted((name for name in self.points if name != OPTIMAL), key=lambda name: -self._merit(name))

    @cached_property
    def looks(self) -> dict[str, str]:
        """The CSS class of every strategy: LRU, the three best others and the optimum stand out, the rest is quiet."""
        # What finds just what LRU finds would only hide it.
        others = [name for name in self.strategies if not self._is_lru(name)]
        looks = dict.fromkeys(self.strategies, "quiet") | dict(zip(others, _COLOURS, strict=False))
        return looks | {LRU: "c1", OPTIMAL: "ink"}

    def cell(self, strategy: str, blocks: int) -> ReplayResult | None:
        """Return the replay of one strategy at one capacity, if there was one."""
        return self._cells.get((strategy, blocks))

    @cached_property
    def shown_blocks(self) -> int:
        """The capacity that the detailed charts show: the replayed one nearest to the chosen size, or to the knee."""
        if not self.capacities:
            return 0
        aim = self.chosen_blocks or self.knee or self.capacities[len(self.capacities) // 2]
        return min(self.capacities, key=lambda blocks: abs(math.log(max(blocks, 1) / aim)))

    @cached_property
    def best(self) -> ReplayResult | None:
        """The best strategy's replay at the capacity shown; LRU's where another one is only as good."""
        cells = [self.cell(name, self.shown_blocks) for name in self.strategies]
        return max(
            (cell for cell in cells if cell), key=lambda cell: (cell.hit_blocks, cell.strategy == LRU), default=None
        )

    @cached_property
    def detailed(self) -> list[ReplayResult]:
        """The replays that the detailed charts show: the best strategy, LRU and the optimum, where hits are known."""
        names = [self.best.strategy] if self.best else []
        cells = [self.cell(name, self.shown_blocks) for name in dict.fromkeys([*names, LRU, OPTIMAL])]
        return [cell for cell in cells if cell and len(cell.hits) == self.trace.num_requests > 0]

    @cached_property
    def knee(self) -> int | None:
        """The size at which LRU's curve bends most."""
        if self.knee_blocks is None and self.curve is not None:
            return knee(self.curve) or None
        return self.knee_blocks

    def num_bytes(self, blocks: float) -> float:
        """Return the memory of a capacity; blocks where no model is known."""
        return blocks if self.bytes_per_block is None else blocks * self.bytes_per_block + self.extra_bytes

    def size(self, blocks: float) -> str:
        """Return a capacity in words: GiB where the model is known, and blocks."""
        if self.bytes_per_block is None:
            return f"{count(blocks)} block{'s' if blocks != 1 else ''}"
        return f"{format_bytes(self.num_bytes(blocks))} ({round_count(blocks)} blocks)"

    @property
    def where(self) -> str:
        """At which capacity the detailed charts look."""
        return f"at {self.size(self.shown_blocks)}"

    def sized(self, blocks: float) -> str:
        """Return a capacity in one figure, for axes and table heads."""
        return short(blocks) if self.bytes_per_block is None else format_bytes(self.num_bytes(blocks))

    @cached_property
    def _cells(self) -> dict[tuple[str, int], ReplayResult]:
        return {(result.strategy, result.blocks): result for result in self.results}

    def _is_lru(self, strategy: str) -> bool:
        lru, line = self.points.get(LRU), self.points[strategy]
        return strategy == LRU or (lru is not None and (line.blocks, line.ratios) == (lru.blocks, lru.ratios))

    def _merit(self, strategy: str) -> float:
        """Return the mean hit ratio; above LRU's curve where there is one, as the sizes may differ."""
        line = self.points[strategy]
        above = [0.0 if self.curve is None else self.curve.at(size) for size in line.blocks]
        return sum(line.ratios) / max(len(line.ratios), 1) - sum(above) / max(len(above), 1)
