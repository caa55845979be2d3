"""What is told of replays: measures of every strategy and size, in the same digits on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pagedkv.sim.baselines import LRU, OPTIMAL
from pagedkv.sim.replayer import ReplayResult

Cells = dict[tuple[str, int], ReplayResult]


@dataclass(frozen=True)
class Measure:
    """One group of rows: a number, or None, for a strategy and blocks of some cells, and the form it is written in."""

    title: str
    value: Callable[[Cells, str, int], float | None]
    form: str
    marks_best: bool = False  # in each column; the optimum is a bound and does not compete

    def written(self, value: float | None) -> str:
        """Return a value as text."""
        return "-" if value is None or value != value else format(value, self.form)


def closed_gap(cells: Cells, strategy: str, blocks: int) -> float | None:
    """Return how much of the way from LRU to the optimum a strategy goes; None where there is no way, or no end."""
    lru, best = cells.get((LRU, blocks)), cells.get((OPTIMAL, blocks))
    if lru is None or best is None or strategy in (LRU, OPTIMAL) or best.hit_blocks <= lru.hit_blocks:
        return None
    return (cells[strategy, blocks].hit_blocks - lru.hit_blocks) / (best.hit_blocks - lru.hit_blocks)


def _of(value: Callable[[ReplayResult], float | None]) -> Callable[[Cells, str, int], float | None]:
    return lambda cells, *cell: value(cells[cell])


def _speed(result: ReplayResult) -> float | None:
    return result.accesses / result.seconds / 1e6 if result.seconds > 0 else None


_ALWAYS = (
    Measure("hit ratio", _of(lambda result: result.hit_ratio), ".2%", marks_best=True),
    Measure("token hit ratio", _of(lambda result: result.token_hit_ratio), ".2%", marks_best=True),
    Measure("gap from LRU to the optimum closed", closed_gap, "z.1%"),
    Measure("of what the optimum finds in all these blocks", _of(lambda result: result.attained), ".1%"),
    Measure("blocks reclaimed", _of(lambda result: result.reclaimed), ",.0f"),
)
_PREEMPTED = Measure("requests preempted", _of(lambda result: result.preempted), ",.0f")
_REFUSED = Measure("requests refused: larger than the pool", _of(lambda result: result.refused), ",.0f")
_BUSIEST = Measure(
    "computed by the busiest replica, over the mean",
    _of(lambda result: result.fleet.busiest if result.fleet else None),
    ".2f",
)
_SPEED = Measure("million block accesses per second", _of(_speed), ".1f")
PERCENTS = (50, 90, 99)


def _in_time(results: Sequence[ReplayResult]) -> Iterator[Measure]:
    """Yield the measures of replays in time."""
    if not any(len(result.ttft) for result in results):
        return
    for percent in PERCENTS:
        value = partial(lambda percent, result: result.ttft_percentile(percent), percent)
        yield Measure(f"seconds to the first token, p{percent}", _of(value), ".2f")
    yield Measure("seconds in the queue, mean", _of(lambda result: result.mean_queueing), ".2f")
    if any(len(result.utilisation) for result in results):
        yield Measure("utilisation, mean of the replicas", _of(_mean_utilisation), ".1%")
        if any(len(result.utilisation) > 1 for result in results):
            yield Measure("utilisation, the busiest replica", _of(_most_utilisation), ".1%")
    else:
        yield _PREEMPTED
    yield _REFUSED


def _mean_utilisation(result: ReplayResult) -> float | None:
    return float(result.utilisation.mean()) if len(result.utilisation) else None


def _most_utilisation(result: ReplayResult) -> float | None:
    return float(result.utilisation.max()) if len(result.utilisation) else None


def _in_tiers(results: Sequence[ReplayResult]) -> Iterator[Measure]:
    """Yield the measures of replays with tiers, or with a restart."""
    tiers = next((result.tiers for result in results if result.tiers), ())
    if tiers:
        yield Measure(
            "hit ratio of the pool", _of(lambda result: result.pool_hit_ratio if result.tiers else None), ".2%"
        )
    for place, tier in enumerate(tiers):
        of = partial(lambda place, name, result: getattr(result.tiers[place], name) if result.tiers else None, place)
        yield Measure(f"hit ratio of the {tier.medium} tier", _of(partial(of, "hit_ratio")), ".2%")
        yield Measure(f"blocks written to the {tier.medium} tier", _of(partial(of, "written")), ",.0f")
        yield Measure("  as a share of all blocks touched", _of(partial(of, "written_share")), ".2%")
    if any(result.restart for result in results):
        after = _of(lambda result: result.restart.hit_ratio if result.restart else None)
        yield Measure("hit ratio in the 10% after the restart", after, ".2%", marks_best=True)


def by_fleet(results: Sequence[ReplayResult]) -> list[ReplayResult]:
    """Return the results with the fleet of each as a part of its strategy's name: ``lru, 8 x prefix``."""
    return [
        replace(result, strategy=f"{result.strategy}, {result.fleet}") if result.fleet else result for result in results
    ]


class Measures:
    """Replays as a table: a column for every capacity, and under each measure a row for every strategy."""

    def __init__(self, results: Sequence[ReplayResult]) -> None:
        named = by_fleet(results)
        self._cells: Cells = {(result.strategy, result.blocks): result for result in named}
        self.strategies = list(dict.fromkeys(result.strategy for result in named))
        self.capacities = sorted({result.blocks for result in named})
        on_a_fleet = any(result.fleet for result in named)
        self.measures = [
            *_ALWAYS,
            *_in_tiers(named),
            *_in_time(named),
            *([_BUSIEST] if on_a_fleet else ()),
            _SPEED,
        ]

    def rows(self, measure: Measure, capacities: Sequence[int]) -> list[tuple[str, list[float | None]]]:
        """Return the values of every strategy that has any."""
        rows = [(name, [self._value(measure, name, blocks) for blocks in capacities]) for name in self.strategies]
        return [(name, values) for name, values in rows if any(value is not None for value in values)]

    def best(self, measure: Measure, blocks: int) -> float | None:
        """Return the highest value of a column, where several strategies compete for it."""
        rivals = [name for name in self.strategies if name != OPTIMAL]
        values = [value for name in rivals if (value := self._value(measure, name, blocks)) is not None]
        return max(values) if measure.marks_best and len(values) > 1 else None

    def _value(self, measure: Measure, strategy: str, blocks: int) -> float | None:
        return measure.value(self._cells, strategy, blocks) if (strategy, blocks) in self._cells else None
