"""The hit ratio against the size of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pagedkv.sim.hit_curve import HitCurve
from pagedkv.sim.report.charts import Frame, Series, dots, floor, grid, label_ends, line, upright
from pagedkv.sim.report.evidence import LRU, Evidence, shown_name
from pagedkv.sim.report.figure import figure, legend, section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, percent, short
from pagedkv.sim.report.scale import Scale, log_ticks, ratio_ticks

__all__ = ["curve_section"]

_GIB = 1024**3


def curve_section(evidence: Evidence, below: Markup | None = None) -> Markup:
    """Return the chart of hit ratio against size: LRU's curve, all strategies, the limits; `below` at its end."""
    lines = _lines(evidence)
    if not lines:
        return section("curve", "Hit ratio against size", tag("p", "Nothing was replayed.", class_="quiet-text"))
    title = "Hit ratio against the size of the cache"
    description = f"{len(lines)} lines. A cache without a limit finds {percent(evidence.attainable)} of the blocks."
    return section(
        "curve",
        title,
        tag(
            "p",
            "Share of the touched blocks that lie in the longest cached prefix of their request. ",
            "The size is drawn on a log scale: each step to the right multiplies it.",
            class_="lede",
        ),
        legend(lines),
        figure("curve-chart", title, description, lambda frame: _draw(evidence, lines[::-1], frame)),
        _curve_table(evidence, evidence.curve) if evidence.curve is not None else None,
        below,
    )


def _lines(evidence: Evidence) -> list[Series]:
    lines = []
    if evidence.curve is not None and evidence.curve.attainable:
        lines.append(_curve_line(evidence, evidence.curve))
    for name in evidence.points:
        points, look = evidence.points[name], evidence.looks[name]
        if not points.blocks or (name == LRU and lines and evidence.curve is not None):
            continue
        sizes = zip(points.blocks, points.ratios, strict=True)
        tips = [f"{shown_name(name)}, {evidence.size(blocks)}: {percent(ratio)}" for blocks, ratio in sizes]
        xs = [_place(evidence, blocks) for blocks in points.blocks]
        lines.append(Series(shown_name(name), look, xs, points.ratios, tips, is_labelled=look != "quiet"))
    return sorted(lines, key=_rank)


def _curve_line(evidence: Evidence, curve: HitCurve) -> Series:
    """Return LRU's curve at no more sizes than a chart has pixels."""
    last = float(curve.blocks[-1])
    sizes = np.unique(np.geomspace(1, max(last, 2), 300).astype(np.int64))
    return Series(
        "lru", "c1 curve", [_place(evidence, float(size)) for size in sizes], [float(y) for y in curve.at(sizes)]
    )


def _rank(line: Series) -> int:
    """Place LRU and the optimum first in the legend, and on top of the others in the drawing."""
    return ("c1", "ink", "c2", "c3", "c4", "quiet").index(line.look.split()[0])


def _place(evidence: Evidence, blocks: float) -> float:
    return evidence.num_bytes(blocks) / (_GIB if evidence.bytes_per_block else 1)


def _draw(evidence: Evidence, lines: list[Series], frame: Frame) -> Iterator[Markup]:
    low, high = _ends(evidence, lines)
    across = frame.across(low, high, is_log=True)
    ticks = ratio_ticks(max(evidence.attainable, *(max(line.ys) for line in lines)))
    up = frame.up(ticks[-1])
    yield from grid(frame, up, ticks, lambda tick: f"{100 * tick:g}%", "hit ratio")
    unit = "size of the cache, " + ("GiB" if evidence.bytes_per_block else "blocks")
    yield from floor(frame, across, log_ticks(low, high, frame.most_ticks), _tick, unit)
    yield from line(Series("", "limit", [low, high], [evidence.attainable] * 2), across, up)
    limit = f"no limit {percent(evidence.attainable)}"
    yield tag("text", limit, class_="note soft", x=frame.left + 6, y=up(evidence.attainable) - 6)
    yield from _marks(evidence, frame, across)
    for series in lines:
        yield from line(series.clipped(low), across, up)
    if evidence.curve is not None:
        yield from dots(
            _curve_points(evidence, evidence.curve, _steps(evidence.curve, (1, 1.5, 2, 3, 5, 7))), across, up
        )
    yield from label_ends(frame, lines, across, up)


def _ends(evidence: Evidence, lines: list[Series]) -> tuple[float, float]:
    """Return the sizes between which something happens: what is marked, and where a line leaves its first height."""
    places = [
        _place(evidence, blocks) for blocks in (*evidence.capacities, evidence.chosen_blocks, evidence.knee) if blocks
    ]
    for series in lines:
        rises = [x for x, y in zip(series.xs, series.ys, strict=True) if y - series.ys[0] > 0.03 * evidence.attainable]
        places += [rises[0] / 1.5 if rises else series.xs[0], series.xs[-1]]
    low, high = min(places), max(places)
    return (low / 1.15, high * 1.15) if high > low else (low / 2, high * 2)


def _marks(evidence: Evidence, frame: Frame, across: Scale) -> Iterator[Markup]:
    marks = [("knee", evidence.knee), (evidence.chosen_name, evidence.chosen_blocks)]
    for row, (name, blocks) in enumerate((name, blocks) for name, blocks in marks if blocks):
        value = _place(evidence, blocks)
        yield from upright(frame, across, value, f"{name} {evidence.sized(blocks)}", row)


def _steps(curve: HitCurve, factors: Sequence[float]) -> list[int]:
    """Return round capacities over the whole curve: every power of ten times every factor, and the last."""
    last = int(curve.blocks[-1])
    sizes = {int(factor * 10**power) for power in range(len(str(last))) for factor in factors}
    return sorted(size for size in sizes | {last} if 0 < size <= last)


def _curve_points(evidence: Evidence, curve: HitCurve, sizes: list[int]) -> Series:
    """Return points on the curve that tell their figures when they are pointed at."""
    ratios = [curve.at(size) for size in sizes]
    tips = [f"lru, {evidence.size(size)}: {percent(ratio)}" for size, ratio in zip(sizes, ratios, strict=True)]
    return Series("", "c1 ghost", [_place(evidence, size) for size in sizes], ratios, tips)


def _curve_table(evidence: Evidence, curve: HitCurve) -> Markup:
    rows = []
    for size in _steps(curve, (1, 2, 5)):
        ratio = curve.at(size)
        share = ratio / evidence.attainable if evidence.attainable else 0.0
        memory = [(evidence.sized(size), size)] if evidence.bytes_per_block else []
        rows.append([(count(size), size), *memory, (percent(ratio), ratio), (percent(share), share)])
    heads = ["blocks", *(["memory"] if evidence.bytes_per_block else []), "hit ratio", "of the attainable"]
    return table("The figures of LRU’s curve", heads, rows, is_folded=True)


def _tick(value: float) -> str:
    return short(value) if value >= 1 else f"{value:g}"
