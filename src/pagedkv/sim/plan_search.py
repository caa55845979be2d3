"""The search for the smallest capacity that finds enough, and the memory of every replay on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pagedkv.sim.hit_curve import HitCurve
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.sweeping import sweep
from pagedkv.sim.trace import Trace

__all__ = ["OPTIMAL", "Found", "Search", "capacities_to_try", "smallest_lru"]

OPTIMAL = "optimal"
TOLERANCE = 1.01
"""Where a search stops: the capacity below which too little is found is within 1%."""
_POINTS = 8
_WORTH_PROCESSES = 1_000_000_000
"""Block accesses of one round of replays; less is done in this process before others have started and compiled."""


@dataclass(frozen=True, eq=False)
class Found:
    """What one replay found.

    Attributes
    ----------
    result : ReplayResult
        Without the hits of every request, except where `Search.keep` asked for them.
    flops_saved : float
        Prefill FLOPs of the tokens that were found.
    """

    result: ReplayResult
    flops_saved: float

    @property
    def hit_blocks(self) -> int:
        """Blocks found."""
        return self.result.hit_blocks


class Search:
    """Replays of one trace, each done once.

    Parameters
    ----------
    trace : Trace
    model : ModelShape
    jobs : int or None
        Processes, as in `sweep`; by default others are started for large traces only.
    progress : callable, optional
        Called with (cells done, cells asked for) of the sweep that runs.
    """

    def __init__(
        self, trace: Trace, model: ModelShape, jobs: int | None, progress: Callable[[int, int], None] | None = None
    ) -> None:
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
                for result in sweep(
                    self.trace, names, missing, jobs=self._jobs_for(names, missing), progress=self._progress
                ):
                    self._found[result.strategy, result.blocks] = self._summary(result)

    def at(self, strategy: str, blocks: int) -> Found:
        """Return what a strategy finds with a capacity."""
        self.run([strategy], [blocks])
        return self._found[strategy, blocks]

    def keep(self, strategies: Iterable[str], blocks: int) -> None:
        """Replay once more and keep the hits of every request."""
        for result in sweep(self.trace, list(dict.fromkeys(strategies)), [blocks], jobs=1):
            self._found[result.strategy, blocks] = replace(self._summary(result), result=result)

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
        """Return a capacity that finds `hits` blocks, and below which, within 1%, too few are found.

        Parameters
        ----------
        strategy : str
        hits : int
            Blocks to find, at least 1.
        enough : int
            A capacity that is known to find them.

        Notes
        -----
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
