"""Replays as tables: a column for every capacity, a row for every strategy under each measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pagedkv.cli.replay_output import CurveFacts
    from pagedkv.sim.result import ReplayResult

__all__ = ["cell_tables", "closed_gap", "curve_table"]

_LRU = "lru"
_OPTIMAL = "optimal"
_COLUMN_WIDTH = 12
BEST = "*"

Cells = dict[tuple[str, int], "ReplayResult"]


@dataclass(frozen=True)
class _Measure:
    """One group of rows.

    Attributes
    ----------
    title : str
    value : callable
        (cells, strategy, blocks) to the number; None where there is none.
    form : str
        How the number is written.
    marks_best : bool
        Whether the highest of a column is marked; the optimum is a bound and does not compete.
    """

    title: str
    value: Callable[[Cells, str, int], float | None]
    form: str
    marks_best: bool = False


def closed_gap(cells: Cells, strategy: str, blocks: int) -> float | None:
    """Return how much of the way from LRU to the optimum a strategy goes; None where there is no way, or no end."""
    lru, best = cells.get((_LRU, blocks)), cells.get((_OPTIMAL, blocks))
    if lru is None or best is None or strategy in (_LRU, _OPTIMAL) or best.hit_blocks <= lru.hit_blocks:
        return None
    return (cells[strategy, blocks].hit_blocks - lru.hit_blocks) / (best.hit_blocks - lru.hit_blocks)


def _speed(cells: Cells, strategy: str, blocks: int) -> float | None:
    result = cells[strategy, blocks]
    return result.accesses / result.seconds / 1e6 if result.seconds > 0 else None


_ALWAYS = (
    _Measure("hit ratio", lambda cells, *cell: cells[cell].hit_ratio, ".2%", marks_best=True),
    _Measure("token hit ratio", lambda cells, *cell: cells[cell].token_hit_ratio, ".2%", marks_best=True),
    _Measure("gap from LRU to the optimum closed", closed_gap, "z.1%"),
    _Measure("blocks reclaimed", lambda cells, *cell: cells[cell].reclaimed, ",.0f"),
)
_IN_TIME = (
    _Measure("requests preempted", lambda cells, *cell: cells[cell].preempted, ",.0f"),
    _Measure("requests refused: larger than the pool", lambda cells, *cell: cells[cell].refused, ",.0f"),
)
_SPEED = _Measure("million block accesses per second", _speed, ".1f")


def cell_tables(results: Sequence[ReplayResult], timed: bool, width: int) -> Iterator[Table]:
    """Lay out the results, in as many tables beneath each other as the width of the terminal asks for."""
    cells: Cells = {(result.strategy, result.blocks): result for result in results}
    strategies = list(dict.fromkeys(result.strategy for result in results))
    capacities = sorted({result.blocks for result in results})
    names = max(max(map(len, strategies), default=0) + 2, 20)
    per_table = max(1, (width - names) // _COLUMN_WIDTH)
    measures = [*_ALWAYS, *(_IN_TIME if timed else ()), _SPEED]
    for first in range(0, len(capacities), per_table):
        yield _table(cells, strategies, capacities[first : first + per_table], measures)
    if any(_best(cells, strategies, blocks, _ALWAYS[0]) is not None for blocks in capacities):
        yield _note(f"{BEST} the best of its column, the optimum left out")


def _table(cells: Cells, strategies: list[str], capacities: list[int], measures: Sequence[_Measure]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column("blocks")
    for blocks in capacities:
        table.add_column(f"{blocks:,}", justify="right", no_wrap=True)
    for measure in measures:
        rows = [(name, [measure.value(cells, name, blocks) for blocks in capacities]) for name in strategies]
        rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
        if not rows:
            continue
        table.add_row(Text(measure.title, style="dim italic"))
        best = [_best(cells, strategies, blocks, measure) for blocks in capacities]
        for name, values in rows:
            table.add_row(Text(f"  {name}"), *map(_written, values, best, [(name, measure)] * len(values)))
    return table


def _best(cells: Cells, strategies: list[str], blocks: int, measure: _Measure) -> float | None:
    """Return the highest value of a column, where several strategies compete for it."""
    rivals = [name for name in strategies if name != _OPTIMAL]
    values = [value for name in rivals if (value := measure.value(cells, name, blocks)) is not None]
    return max(values) if measure.marks_best and len(values) > 1 else None


def _written(value: float | None, best: float | None, place: tuple[str, _Measure]) -> Text:
    name, measure = place
    if value is None:
        return Text("-")
    text = format(value, measure.form)
    if best is not None and value == best and name != _OPTIMAL:
        return Text(f"{text} {BEST}", style="bold")
    return Text(f"{text}  " if measure.marks_best else text)


def _note(text: str) -> Table:
    note = Table.grid()
    note.add_row(Text(text, style="dim"))
    return note


def curve_table(curve: CurveFacts) -> Table:
    """Show the LRU curve, a row for each capacity."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold", title="the exact LRU curve")
    table.title_justify = "left"
    for heading in ("blocks", "hit ratio", "token hit ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for blocks, ratio, token_ratio in zip(curve.blocks, curve.hit_ratio, curve.token_hit_ratio, strict=True):
        table.add_row(f"{blocks:,}", f"{ratio:.2%}", f"{token_ratio:.2%}")
    return table
