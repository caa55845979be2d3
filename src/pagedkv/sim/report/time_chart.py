"""The hit ratio in windows of time, and the traffic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pagedkv.sim.report import facts
from pagedkv.sim.report.charts import Frame, Series, bars, floor, grid, label_ends, line
from pagedkv.sim.report.evidence import Evidence, shown_name
from pagedkv.sim.report.figure import figure, legend, ratio_cell, section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, duration, percent, short
from pagedkv.sim.report.scale import even_time_ticks, ratio_ticks
from pagedkv.sim.result import ReplayResult

__all__ = ["time_section"]


def time_section(evidence: Evidence) -> Markup | None:
    """Return the chart of the hit ratio in windows of time, above the traffic."""
    cells = evidence.detailed
    if not cells:
        return None
    windows = [facts.per_window(evidence.trace, cell.hits) for cell in cells]
    first = windows[0]
    starts: facts.Floats = np.arange(len(first.accesses), dtype=np.float64) * first.seconds
    lines = [_time_line(evidence, cell, window, starts) for cell, window in zip(cells, windows, strict=True)]
    title = f"Hits over time, {evidence.where}"
    heads = ["from", "requests", "blocks", *(line.name for line in lines)]
    rows = [
        [
            (duration(start), float(start)),
            (count(first.requests[i]), int(first.requests[i])),
            (count(first.accesses[i]), int(first.accesses[i])),
            *(ratio_cell(window.hit_blocks[i], window.accesses[i]) for window in windows),
        ]
        for i, start in enumerate(starts)
    ]
    return section(
        "time",
        "Hits over time",
        tag("p", f"Windows of {duration(first.seconds)}, {evidence.where}. Below: the blocks touched.", class_="lede"),
        legend(lines),
        figure("time-chart", title, f"{len(starts)} windows.", lambda frame: _draw_time(frame, lines, first)),
        table("The figures over time", heads, rows, is_folded=True),
    )


def _time_line(evidence: Evidence, cell: ReplayResult, window: facts.Windows, starts: facts.Floats) -> Series:
    some = window.accesses > 0
    ratios = window.hit_blocks[some] / window.accesses[some]
    middles = starts[some] + window.seconds / 2
    name = shown_name(cell.strategy)
    tips = [
        f"{name}, from {duration(start)} on: {percent(ratio)}"
        for start, ratio in zip(starts[some], ratios, strict=True)
    ]
    return Series(name, f"{evidence.looks[cell.strategy]} fine", list(middles), list(ratios), tips)


def _draw_time(frame: Frame, lines: Sequence[Series], windows: facts.Windows) -> Iterator[Markup]:
    end = len(windows.accesses) * windows.seconds
    across = frame.across(0.0, end)
    split = frame.bottom - 62
    upper = Frame(frame.name, frame.width, split, frame.right_margin, frame.left_margin, frame.top_margin, 0)
    ticks = ratio_ticks(max(max(series.ys) for series in lines))
    up = upper.up(ticks[-1])
    yield from grid(upper, up, ticks, lambda tick: f"{100 * tick:g}%", "hit ratio")
    for series in lines:
        yield from line(series, across, up)
    yield from label_ends(upper, lines, across, up)
    most = int(windows.accesses.max())
    lower = Frame(frame.name, frame.width, frame.height, frame.right_margin, frame.left_margin, split + 16)
    edges = [i * windows.seconds for i in range(len(windows.accesses) + 1)]
    tips = [
        f"from {duration(edges[i])} on: {count(windows.accesses[i])} blocks of {count(windows.requests[i])} requests"
        for i in range(len(windows.accesses))
    ]
    yield from bars(across, lower.up(most), edges, list(windows.accesses), tips, "muted")
    yield tag("text", short(most), class_="tick", x=frame.left - 7, y=lower.top + 9, text_anchor="end")
    yield tag("text", "blocks", class_="tick", x=0.0, y=lower.bottom)
    yield from floor(frame, across, even_time_ticks(end, frame.most_ticks), duration, "time since the first request")
