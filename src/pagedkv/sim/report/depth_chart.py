"""The hit ratio by depth in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pagedkv.sim.report import facts
from pagedkv.sim.report.charts import Frame, Series, floor, grid, label_ends, line
from pagedkv.sim.report.evidence import Evidence, shown_name
from pagedkv.sim.report.figure import figure, legend, ratio_cell, section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, percent, short
from pagedkv.sim.report.scale import log_ticks, ratio_ticks

__all__ = ["depth_section"]


def depth_section(evidence: Evidence) -> Markup | None:
    """Return the chart of the hit ratio by depth in the prompt."""
    cells = evidence.detailed
    depths = [facts.per_depth(evidence.trace, cell.hits) for cell in cells]
    if not cells or not len(depths[0].accesses):
        return None
    edges = _depth_edges(len(depths[0].accesses))
    touched = np.add.reduceat(depths[0].accesses, edges[:-1])
    found = [np.add.reduceat(depth.hit_blocks, edges[:-1]) for depth in depths]
    names = [_depths(int(low), int(high)) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    places = [float((low + 1) * high) ** 0.5 for low, high in zip(edges[:-1], edges[1:], strict=True)]
    lines = []
    for cell, hits in zip(cells, found, strict=True):
        ratios = list(hits / touched)
        name = shown_name(cell.strategy)
        tips = [f"{name}, {where}: {percent(ratio)}" for where, ratio in zip(names, ratios, strict=True)]
        lines.append(Series(name, evidence.looks[cell.strategy], places, ratios, tips))
    heads = ["depth", "blocks touched", *(line.name for line in lines)]
    rows = [
        [
            (name, int(edges[i])),
            (count(touched[i]), int(touched[i])),
            *(ratio_cell(hits[i], touched[i]) for hits in found),
        ]
        for i, name in enumerate(names)
    ]
    title = f"Hit ratio by depth in the prompt, {evidence.where}"
    unit = f"depth in the prompt, blocks of {count(evidence.trace.block_tokens)} tokens"
    lede = f"How often the block at a depth was found, {evidence.where}; block 1 is the first of a prompt."
    return section(
        "depth",
        "Hits by depth",
        tag("p", lede, class_="lede"),
        legend(lines),
        figure("depth-chart", title, f"{len(names)} depths.", lambda frame: _draw_depths(frame, lines, unit)),
        table("The figures by depth", heads, rows, is_folded=True),
    )


def _depth_edges(deepest: int) -> facts.Ints:
    """Return where the bins of depths begin, and the end: single blocks first, then ever wider bins."""
    wide = np.geomspace(8, max(deepest, 9), max(2, int(12 * np.log10(max(deepest, 9) / 8)) + 1)).astype(np.int64)
    inner = np.union1d(np.arange(8), wide)
    return np.append(inner[inner < deepest], deepest).astype(np.int64)


def _depths(low: int, high: int) -> str:
    return f"block {count(high)}" if high == low + 1 else f"blocks {count(low + 1)} to {count(high)}"


def _draw_depths(frame: Frame, lines: Sequence[Series], unit: str) -> Iterator[Markup]:
    deepest = max(lines[0].xs[-1], 2.0)
    across = frame.across(1.0, deepest, is_log=True)
    ticks = ratio_ticks(max(max(series.ys) for series in lines))
    up = frame.up(ticks[-1])
    yield from grid(frame, up, ticks, lambda tick: f"{100 * tick:g}%", "hit ratio")
    yield from floor(frame, across, log_ticks(1.0, deepest, frame.most_ticks), short, unit)
    for series in lines:
        yield from line(series, across, up)
    yield from label_ends(frame, lines, across, up)
