"""SVG charts of a report: scales, axes, lines, bars, and one section a chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.format import count, digits, percent, share
from pagedkv.sim.baselines import LRU
from pagedkv.sim.curves import HitCurve
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.report import facts
from pagedkv.sim.report.evidence import Evidence, shown_name
from pagedkv.sim.report.html import Markup, duration, format_bytes, rough_duration, round_count, short, tag
from pagedkv.sim.trace import Floats, Int64s

# Where a value lies on an axis, and which values the axis names.

_TIMES = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400)
_EVEN_TIMES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True)
class Scale:
    """A straight map from values ``low … high`` to pixels ``start … stop``, of logarithms where `is_log`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; what lies outside of the scale is drawn at its end."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        part = (value - low) / (high - low) if high > low else 0.5
        return self.start + part * (self.stop - self.start)


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """Return round values from 0 on, the last at or above `high`: the axis ends there."""
    if not high > 1e-15:
        high = 1.0
    raw = high / most
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def ratio_ticks(high: float) -> list[float]:
    """Return ticks for a share: above `high` with some air, but never above 1."""
    return linear_ticks(min(1.0, high * 1.04))


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return 1-2-5 steps between `low` and `high`; only 1s, or every other power of ten, where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [factor * 10.0**power for power in powers for factor in factors] for factors in ((1, 2, 5), (1, 3), (1,))
    ]
    choices += [[10.0**power for power in powers if power % every == 0] for every in (2, 3, 6)]
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    return next((ticks for ticks in inside if len(ticks) <= most), inside[-1])


def byte_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return powers of two between `low` and `high`, so that each is a round number of KiB, MiB, GiB or TiB.

    Where there is room, one and a half times each power as well; where there is not, every second, fifth or tenth.
    """
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    choices = [[factor * 2.0**power for power in powers for factor in (1, 1.5)]]
    choices += [[2.0**power for power in powers if power % every == 0] for every in (1, 2, 5, 10)]
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    return next((ticks for ticks in inside if len(ticks) <= most), inside[-1])


def time_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return seconds, minutes, hours and days between `low` and `high` for a log axis."""
    ticks = [tick for tick in _TIMES if low * 0.999 <= tick <= high * 1.001]
    return ticks[:: max(1, math.ceil(len(ticks) / most))]


def even_time_ticks(high: float, most: int = 7) -> list[float]:
    """Return times from 0 to at most `high` in equal steps that a clock would have."""
    days = 86400 * math.ceil(high / 86400 / most)
    step = next((step for step in _EVEN_TIMES if high <= step * most), days)
    return [float(step * i) for i in range(int(high / step) + 1)]


Array = npt.NDArray[Any]
Format = Callable[[float], str]
_LINE_HEIGHT = 15.0


@dataclass(frozen=True)
class Frame:
    """The size of a drawing and of the margins around its plotting area, in pixels."""

    name: str
    width: float
    height: float
    right_margin: float
    left: float = 46.0
    top: float = 46.0
    bottom_margin: float = 44.0

    @property
    def right(self) -> float:
        """Where the plotting area ends."""
        return self.width - self.right_margin

    @property
    def bottom(self) -> float:
        """The lower end of the plotting area."""
        return self.height - self.bottom_margin

    @property
    def most_ticks(self) -> int:
        """Ticks for which the horizontal axis has room."""
        return int((self.right - self.left) / 62)

    def across(self, low: float, high: float, *, is_log: bool = False) -> Scale:
        """Return a horizontal scale."""
        return Scale(low, high, self.left, self.right, is_log)

    def up(self, high: float) -> Scale:
        """Return a vertical scale from 0 on."""
        return Scale(0.0, high, self.bottom, self.top)


WIDE = Frame("wide", 860, 380, right_margin=140)
WIDE_BARE = Frame("wide", 860, 340, right_margin=24)
NARROW = Frame("narrow", 360, 290, right_margin=22)


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a chart."""

    name: str
    look: str  # the CSS class that gives colour and dashes
    xs: Sequence[float]
    ys: Sequence[float]
    tips: Sequence[str] = ()  # what hovering over a point says; a line without tips has no dots
    is_labelled: bool = True  # whether the name stands at the end of the line

    def clipped(self, low: float) -> Series:
        """Return the line from the value `low` of the horizontal axis on."""
        first = next((i for i, x in enumerate(self.xs) if x >= low), len(self.xs))
        return replace(self, xs=self.xs[first:], ys=self.ys[first:], tips=self.tips[first:])


def grid(frame: Frame, up: Scale, ticks: Sequence[float], write: Format, title: str) -> Iterator[Markup]:
    """Draw the horizontal grid lines with their values, and what the vertical axis shows."""
    for tick in ticks:
        y = up(tick)
        yield tag("line", class_="grid", x1=frame.left, x2=frame.right, y1=y, y2=y)
        yield tag("text", write(tick), class_="tick", x=frame.left - 7, y=y + 4, text_anchor="end")
    yield tag("text", title, class_="axis", x=0.0, y=12.0)


def ratio_grid(frame: Frame, high: float) -> tuple[Scale, Iterator[Markup]]:
    """Return the vertical scale of a hit ratio up to `high` or a little above, and its grid."""
    ticks = ratio_ticks(high)
    up = frame.up(ticks[-1])
    return up, grid(frame, up, ticks, share, "hit ratio")


def floor(frame: Frame, across: Scale, ticks: Sequence[float], write: Format, title: str) -> Iterator[Markup]:
    """Draw the horizontal axis."""
    yield tag("line", class_="base", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom)
    for tick in ticks:
        x = across(tick)
        yield tag("line", class_="base", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4)
        yield tag("text", write(tick), class_="tick", x=x, y=frame.bottom + 18, text_anchor="middle")
    yield tag("text", title, class_="axis", x=(frame.left + frame.right) / 2, y=frame.height - 6, text_anchor="middle")


def line(series: Series, across: Scale, up: Scale) -> Iterator[Markup]:
    """Draw a line and its dots."""
    if len(series.xs) > 1:
        places = zip(series.xs, series.ys, strict=True)
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in places)
        yield tag("polyline", class_=f"line {series.look}", points=path)
    yield from dots(series, across, up)


def dots(series: Series, across: Scale, up: Scale) -> Iterator[Markup]:
    """Draw the points of a line that have something to say."""
    for x, y, tip in zip(series.xs, series.ys, series.tips, strict=False):
        yield tag("circle", tag("title", tip), class_=f"dot {series.look}", cx=across(x), cy=up(y), r=3.5)


def bars(
    across: Scale, up: Scale, edges: Sequence[float], heights: Sequence[float], tips: Sequence[str], look: str
) -> Iterator[Markup]:
    """Draw a bar from edge to edge for every height."""
    for left, right, height, tip in zip(edges[:-1], edges[1:], heights, tips, strict=True):
        if height > 0:
            x = across(left)
            width = max(across(right) - x - 1.0, 0.5)
            tall = max(up(0) - up(height), 1.0)
            box = {"x": x + 0.5, "y": up(0) - tall, "width": width, "height": tall}
            yield tag("rect", tag("title", tip), class_=f"bar {look}", **box)


def upright(frame: Frame, across: Scale, value: float, name: str, row: int = 0) -> Iterator[Markup]:
    """Mark a value of the horizontal axis by a line with its name above the plotting area."""
    x, y = across(value), frame.top - 19 + 14 * row
    shift, anchor = (-5, "end") if x > (frame.left + frame.right) / 2 else (5, "start")
    yield tag("line", class_="mark", x1=x, x2=x, y1=y - 8, y2=frame.bottom)
    yield tag("text", name, class_="note", x=x + shift, y=y, text_anchor=anchor)


def ratio_lines(frame: Frame, across: Scale, lines: Sequence[Series], *axis: Markup) -> Iterator[Markup]:
    """Draw lines of hit ratios with their grid and their names; `axis` lies beneath them."""
    up, drawn = ratio_grid(frame, max(max(series.ys) for series in lines))
    yield from drawn
    yield from axis
    for series in lines:
        yield from line(series, across, up)
    yield from label_ends(frame, lines, across, up)


def histogram(
    frame: Frame, across: Scale, edges: Floats, heights: Array, tips: Sequence[str], write: Format, title: str
) -> Iterator[Markup]:
    """Draw bars with their grid; `write` and `title` are those of the vertical axis."""
    ticks = linear_ticks(float(heights.max()))
    up = frame.up(ticks[-1])
    yield from grid(frame, up, ticks, write, title)
    yield from bars(across, up, list(edges), list(heights), tips, "b1")


def label_ends(frame: Frame, lines: Sequence[Series], across: Scale, up: Scale) -> Iterator[Markup]:
    """Write the names of lines beside their last points, moved apart where they would cover each other."""
    if frame.right_margin <= 60:  # no room
        return
    ends = sorted((up(s.ys[-1]), across(s.xs[-1]), s.look, s.name) for s in lines if s.is_labelled and len(s.xs))
    heights = _apart([end[0] for end in ends], frame.top + 4, frame.bottom)
    edge = frame.right + 5
    for (y, x, look, name), free in zip(ends, heights, strict=True):
        if frame.right - x > 4 or abs(free - y) > 3:
            points = f"{x + 5:.1f},{y:.1f} {edge:.1f},{free:.1f}"
            yield tag("polyline", class_=f"leader {look}", points=points)
        yield tag("text", _cut(name), class_=f"name {look}", x=frame.right + 9, y=free + 4)


def _apart(places: Sequence[float], low: float, high: float) -> list[float]:
    """Return ascending places with at least one line height between them, as near to the given ones as a sweep gets."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + _LINE_HEIGHT if moved else low))
    limit = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - _LINE_HEIGHT
    return moved


def _cut(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# A chart with all that belongs to it: heading, two drawings (desktop, phone), legend, the figures as a table.

Cell = object
"""Text, markup, or (text, number to sort by)."""


def section(key: str, heading: str, *content: object) -> Markup:
    """Return one card of the page."""
    return tag("section", tag("h2", heading, id=f"{key}-heading"), *content, id=key, aria_labelledby=f"{key}-heading")


def chart_section(
    key: str,
    heading: str,
    lede: str,
    draw: Callable[[Frame], Iterable[Markup]],
    *below: object,
    title: str,
    description: str | None = None,
    lines: Sequence[Series] = (),
    frames: Sequence[Frame] = (WIDE, NARROW),
) -> Markup:
    """Return a chart as one card: what it shows, the names of its lines, a drawing for each frame, what lies below.

    The style sheet shows the drawing that fits the screen.
    """
    drawings = [_drawing(f"{key}-chart-{frame.name}", title, description or lede, frame, draw) for frame in frames]
    names = legend(lines) if lines else None
    return section(key, heading, tag("p", lede, class_="lede"), names, tag("figure", *drawings), *below)


def _drawing(key: str, title: str, description: str, frame: Frame, draw: Callable[[Frame], Iterable[Markup]]) -> Markup:
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *draw(frame),
        class_=f"chart {frame.name}",
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
        xmlns="http://www.w3.org/2000/svg",
    )


def legend(lines: Sequence[Series]) -> Markup:
    """Return the names of the lines, each behind a piece of the line."""
    return tag("ul", *(tag("li", _swatch(line), line.name) for line in lines), class_="legend")


def _swatch(line: Series) -> Markup:
    pieces = [tag("line", class_=f"line {line.look}", x1=1, x2=23, y1=6, y2=6)]
    if line.tips:
        pieces.append(tag("circle", class_=f"dot {line.look}", cx=12, cy=6, r=3.5))
    return tag("svg", *pieces, viewBox="0 0 24 12", width=24, height=12, aria_hidden="true")


def table(
    caption: str, heads: Sequence[object], rows: Iterable[Sequence[Cell]], *, is_folded: bool = False, class_: str = ""
) -> Markup:
    """Return a table whose first column names the row; it scrolls sideways, and is shown on demand if folded."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads)))
    body = tag("tbody", *(tag("tr", *(_cell(cell, i) for i, cell in enumerate(row))) for row in rows))
    whole = tag("table", tag("caption", caption, class_="sr" if is_folded else None), head, body, class_=class_ or None)
    scroller = tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("details", tag("summary", caption), scroller) if is_folded else scroller


def _cell(cell: Cell, column: int) -> Markup:
    shown, value = cell if isinstance(cell, tuple) else (cell, None)
    data = None if value is None else f"{value}"
    return tag("td", shown, data_value=data) if column else tag("th", shown, scope="row", data_value=data)


def column_table(caption: str, *columns: tuple[str, Iterable[Cell]]) -> Markup:
    """Return a folded table from its columns, each a head and the cells below it."""
    heads, cells = zip(*columns, strict=True)
    return table(caption, heads, zip(*cells, strict=True), is_folded=True)


def counts(numbers: Iterable[float]) -> list[Cell]:
    """Return whole numbers as cells."""
    return [(count(number), int(number)) for number in numbers]


def ratios(values: Iterable[float]) -> list[Cell]:
    """Return ratios as cells."""
    return [(percent(value), float(value)) for value in values]


def shares_found(hits: Iterable[float], accesses: Iterable[float]) -> list[Cell]:
    """Return hit ratios as cells; a dash where there was nothing to find."""
    return [(percent(n / of), float(n / of)) if of else ("–", -1.0) for n, of in zip(hits, accesses, strict=True)]


# The hit ratio against the size of the cache.


def curve_section(evidence: Evidence, below: Markup | None = None) -> Markup:
    """Return the chart of hit ratio against size: LRU's curve, all strategies, the limits; `below` at its end."""
    lines = _lines(evidence)
    if not lines:
        return section("curve", "Hit ratio against size", tag("p", "Nothing was replayed.", class_="quiet-text"))
    title = "Hit ratio against the size of the cache"
    lede = (
        "Share of the touched blocks that lie in the longest cached prefix of their request. "
        "The size is drawn on a log scale: each step to the right multiplies it."
    )
    return chart_section(
        "curve",
        title,
        lede,
        lambda frame: _draw(evidence, lines[::-1], frame),
        _curve_table(evidence, evidence.curve) if evidence.curve is not None else None,
        below,
        title=title,
        description=f"{len(lines)} lines. A cache without a limit finds {percent(evidence.attainable)} of the blocks.",
        lines=lines,
    )


def _lines(evidence: Evidence) -> list[Series]:
    """Return the lines, LRU and the optimum first in the legend, and so on top of the others in the drawing."""
    lines = []
    if evidence.curve is not None and evidence.curve.attainable:
        # At no more sizes than a chart has pixels.
        sizes = np.unique(np.geomspace(1, max(float(evidence.curve.blocks[-1]), 2), 300).astype(np.int64))
        places = [evidence.num_bytes(size) for size in sizes.tolist()]
        lines.append(Series(LRU, "c1 curve", places, evidence.curve.at(sizes).tolist()))
    has_curve = bool(lines)
    for name, points in evidence.points.items():
        if points.blocks and not (name == LRU and has_curve):
            look = evidence.looks[name]
            lines.append(_with_tips(evidence, shown_name(name), look, points.blocks, points.ratios))
    ranks = ("c1", "ink", "c2", "c3", "c4", "quiet")
    return sorted(lines, key=lambda line: ranks.index(line.look.split()[0]))


def _with_tips(evidence: Evidence, name: str, look: str, sizes: Sequence[int], found: Sequence[float]) -> Series:
    tips = [f"{name}, {evidence.size(size)}: {percent(ratio)}" for size, ratio in zip(sizes, found, strict=True)]
    places = [evidence.num_bytes(size) for size in sizes]
    return Series(name, look, places, found, tips, is_labelled=look != "quiet")


def _draw(evidence: Evidence, lines: list[Series], frame: Frame) -> Iterator[Markup]:
    low, high = _ends(evidence, lines)
    across = frame.across(low, high, is_log=True)
    up, drawn = ratio_grid(frame, max(evidence.attainable, *(max(line.ys) for line in lines)))
    yield from drawn
    if evidence.bytes_per_block:
        ticks, write, title = byte_ticks(low, high, frame.most_ticks), format_bytes, "size of the cache"
    else:
        ticks, write, title = log_ticks(low, high, frame.most_ticks), _tick, "size of the cache, blocks"
    yield from floor(frame, across, ticks, write, title)
    yield from line(Series("", "limit", [low, high], [evidence.attainable] * 2), across, up)
    limit = f"no limit {percent(evidence.attainable)}"
    yield tag("text", limit, class_="note soft", x=frame.left + 6, y=up(evidence.attainable) - 6)
    marks = [("knee", evidence.knee), (evidence.chosen_name, evidence.chosen_blocks)]
    for row, (name, blocks) in enumerate((name, blocks) for name, blocks in marks if blocks):
        yield from upright(frame, across, evidence.num_bytes(blocks), f"{name} {evidence.sized(blocks)}", row)
    for series in lines:
        yield from line(series.clipped(low), across, up)
    if evidence.curve is not None:
        # Points on LRU's curve that tell their figures when they are pointed at.
        sizes = _steps(evidence.curve, (1, 1.5, 2, 3, 5, 7))
        at_sizes = [evidence.curve.at(size) for size in sizes]
        yield from dots(_with_tips(evidence, LRU, "c1 ghost", sizes, at_sizes), across, up)
    yield from label_ends(frame, lines, across, up)


def _ends(evidence: Evidence, lines: list[Series]) -> tuple[float, float]:
    """Return the sizes between which something happens: what is marked, and where a line leaves its first height."""
    places = [
        evidence.num_bytes(blocks) for blocks in (*evidence.capacities, evidence.chosen_blocks, evidence.knee) if blocks
    ]
    for series in lines:
        rises = [x for x, y in zip(series.xs, series.ys, strict=True) if y - series.ys[0] > 0.03 * evidence.attainable]
        places += [rises[0] / 1.5 if rises else series.xs[0], series.xs[-1]]
    low, high = min(places), max(places)
    return (low / 1.15, high * 1.15) if high > low else (low / 2, high * 2)


def _steps(curve: HitCurve, factors: Sequence[float]) -> list[int]:
    """Return round capacities over the whole curve: every power of ten times every factor, and the last."""
    last = int(curve.blocks[-1])
    sizes = {int(factor * 10**power) for power in range(len(str(last))) for factor in factors}
    return sorted(size for size in sizes | {last} if 0 < size <= last)


def _curve_table(evidence: Evidence, curve: HitCurve) -> Markup:
    sizes = _steps(curve, (1, 2, 5))
    found = [curve.at(size) for size in sizes]
    memory = [("memory", [(evidence.sized(size), size) for size in sizes])] if evidence.bytes_per_block else []
    return column_table(
        "The figures of LRU’s curve",
        ("blocks", counts(sizes)),
        *memory,
        ("hit ratio", ratios(found)),
        ("of the attainable", ratios(ratio / evidence.attainable if ratio else 0.0 for ratio in found)),
    )


def _tick(value: float) -> str:
    return short(value) if value >= 1 else digits(value)


# The hit ratio by depth in the prompt.


def depth_section(evidence: Evidence) -> Markup | None:
    """Return the chart of the hit ratio by depth in the prompt."""
    cells = evidence.detailed
    depths = [facts.per_depth(evidence.trace, cell.hits) for cell in cells]
    if not cells or not len(depths[0].accesses):
        return None
    edges = _depth_edges(len(depths[0].accesses))
    bins = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    touched = np.add.reduceat(depths[0].accesses, edges[:-1])
    found = [np.add.reduceat(depth.hit_blocks, edges[:-1]) for depth in depths]
    names = [
        f"block {count(high)}" if high == low + 1 else f"blocks {count(low + 1)} to {count(high)}" for low, high in bins
    ]
    places = [float((low + 1) * high) ** 0.5 for low, high in bins]
    lines = []
    for cell, hits in zip(cells, found, strict=True):
        name, found_there = shown_name(cell.strategy), list(hits / touched)
        tips = [f"{name}, {where}: {percent(ratio)}" for where, ratio in zip(names, found_there, strict=True)]
        lines.append(Series(name, evidence.looks[cell.strategy], places, found_there, tips))
    figures = column_table(
        "The figures by depth",
        ("depth", list(zip(names, edges[:-1].tolist(), strict=True))),
        ("blocks touched", counts(touched)),
        *((line.name, shares_found(hits, touched)) for line, hits in zip(lines, found, strict=True)),
    )
    return chart_section(
        "depth",
        "Hits by depth",
        f"How often the block at a depth was found, {evidence.where}; block 1 is the first of a prompt.",
        lambda frame: _draw_depths(evidence, frame, lines),
        figures,
        title=f"Hit ratio by depth in the prompt, {evidence.where}",
        description=f"{len(names)} depths.",
        lines=lines,
    )


def _depth_edges(deepest: int) -> Int64s:
    """Return where the bins of depths begin, and the end: single blocks first, then ever wider bins."""
    wide = np.geomspace(8, max(deepest, 9), max(2, int(12 * np.log10(max(deepest, 9) / 8)) + 1)).astype(np.int64)
    inner = np.union1d(np.arange(8), wide)
    return np.append(inner[inner < deepest], deepest).astype(np.int64)


def _draw_depths(evidence: Evidence, frame: Frame, lines: Sequence[Series]) -> Iterator[Markup]:
    unit = f"depth in the prompt, blocks of {count(evidence.trace.block_tokens)} tokens"
    deepest = max(lines[0].xs[-1], 2.0)
    across = frame.across(1.0, deepest, is_log=True)
    axis = floor(frame, across, log_ticks(1.0, deepest, frame.most_ticks), short, unit)
    return ratio_lines(frame, across, lines, *axis)


# How long a block waits for its next use.

_GAP_EDGES = np.geomspace(1, 1e7, 141)
"""20 bins a decade from 1 s to four months; the ends take what lies beyond."""


def gap_section(evidence: Evidence) -> Markup | None:
    """Return the histogram of the time until a block is used again."""
    gaps = facts.reuse_gaps(evidence.trace, _GAP_EDGES)
    if not gaps.total:
        return None
    coarse, edges = gaps.counts.reshape(-1, 4).sum(axis=1), gaps.edges[::4]
    filled = np.flatnonzero(coarse)
    first, last = int(filled[0]), int(filled[-1]) + 1
    shown, edges = coarse[first:last], edges[first : last + 1]
    half, most = gaps.quantile(0.5), gaps.quantile(0.9)
    bounds = [rough_duration(edge) for edge in edges.tolist()]
    names = [f"{low} to {high}" for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    if first == 0:
        names[0] = f"less than {bounds[1]}"
    parts = shown / gaps.total
    tips = [f"{name}: {percent(part)} of the reuses" for name, part in zip(names, parts, strict=True)]
    return chart_section(
        "gaps",
        "How long a block waits for its next use",
        f"{round_count(gaps.total)} uses of a block that was used before. "
        f"Half of them come within {rough_duration(half)}, "
        f"nine of ten within {rough_duration(most)}: so long a block has to be kept to be found.",
        lambda frame: _draw_gaps(frame, edges, parts, tips, half, most),
        column_table(
            "The figures of reuse gaps",
            ("time since the last use", list(zip(names, edges[:-1].tolist(), strict=True))),
            ("reuses", counts(shown)),
            ("share", ratios(parts)),
            ("up to here", ratios(shown.cumsum() / gaps.total)),
        ),
        title="Time until a block is used again",
        frames=(WIDE_BARE, NARROW),
    )


def _draw_gaps(
    frame: Frame, edges: Floats, parts: Floats, tips: Sequence[str], half: float, most: float
) -> Iterator[Markup]:
    low, high = float(edges[0]), float(edges[-1])
    across = frame.across(low, high, is_log=True)
    yield from histogram(frame, across, edges, parts, tips, share, "share of the reuses")
    shorter = [low] if low == _GAP_EDGES[0] else []
    times = [tick for tick in time_ticks(low, high, frame.most_ticks) if tick > low]
    yield from floor(frame, across, [*shorter, *times], _gap_tick, "time since the last use")
    yield from upright(frame, across, half, f"half within {rough_duration(half)}")
    yield from upright(frame, across, most, f"90% within {rough_duration(most)}", 1)


def _gap_tick(seconds: float) -> str:
    """Name a time; the first bin begins at 0."""
    return "0" if seconds == _GAP_EDGES[0] else duration(seconds)


# How the hit ratio is spread over sessions.


def session_section(evidence: Evidence) -> Markup | None:
    """Return the distribution of the hit ratio over sessions, or over requests where the trace names no sessions."""
    if not evidence.detailed:
        return None
    best = evidence.detailed[0]
    shares, what = facts.per_session(evidence.trace, best.hits), "session"
    if not len(shares.accesses):
        shares, what = facts.per_request(evidence.trace, best.hits), "request"
    if not len(shares.accesses):
        return None
    edges = np.linspace(0, 1, 21)
    # The last bin holds its upper edge too: everything found.
    numbers = np.histogram(shares.ratios, edges)[0]
    names = [f"{100 * low:.0f} to {100 * high:.0f}%" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    tips = [f"{count(number)} {what}s with {name}" for number, name in zip(numbers, names, strict=True)]
    total, median = len(shares.accesses), float(np.median(shares.ratios))
    missing = "" if what == "session" else "The trace names no sessions, so every request stands for itself. "
    return chart_section(
        "sessions",
        f"Hit ratio per {what}",
        f"{missing}{best.strategy} {evidence.where}: half of {count(total)} {what}s find at least "
        f"{percent(median)} of their blocks; {percent(float((shares.hit_blocks == 0).mean()))} find none.",
        lambda frame: _draw_shares(frame, edges, numbers, tips, median, what),
        column_table(
            f"The figures per {what}",
            ("hit ratio", list(zip(names, edges[:-1].tolist(), strict=True))),
            (f"{what}s", counts(numbers)),
            ("share", ratios(numbers / total)),
        ),
        title=f"Distribution of the hit ratio over {what}s",
        frames=(WIDE_BARE, NARROW),
    )


def _draw_shares(
    frame: Frame, edges: Floats, numbers: Int64s, tips: Sequence[str], median: float, what: str
) -> Iterator[Markup]:
    across = frame.across(0.0, 1.0)
    yield from histogram(frame, across, edges, numbers, tips, short, f"{what}s")
    yield from floor(frame, across, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], share, "hit ratio")
    yield from upright(frame, across, median, f"median {percent(median)}")


# The hit ratio in windows of time, and the traffic.


def time_section(evidence: Evidence) -> Markup | None:
    """Return the chart of the hit ratio in windows of time, above the traffic."""
    cells = evidence.detailed
    if not cells:
        return None
    windows = [facts.per_window(evidence.trace, cell.hits) for cell in cells]
    first = windows[0]
    starts: Floats = np.arange(len(first.accesses), dtype=np.float64) * first.seconds
    lines = [_time_line(evidence, cell, window, starts) for cell, window in zip(cells, windows, strict=True)]
    hits = (shares_found(window.hit_blocks, window.accesses) for window in windows)
    return chart_section(
        "time",
        "Hits over time",
        f"Windows of {duration(first.seconds)}, {evidence.where}. Below: the blocks touched.",
        lambda frame: _draw_time(frame, lines, first),
        column_table(
            "The figures over time",
            ("from", [(duration(start), start) for start in starts.tolist()]),
            ("requests", counts(first.requests)),
            ("blocks", counts(first.accesses)),
            *zip((line.name for line in lines), hits, strict=True),
        ),
        title=f"Hits over time, {evidence.where}",
        description=f"{len(starts)} windows.",
        lines=lines,
    )


def _time_line(evidence: Evidence, cell: ReplayResult, window: facts.Windows, starts: Floats) -> Series:
    some = window.accesses > 0
    found = list(window.hit_blocks[some] / window.accesses[some])
    name = shown_name(cell.strategy)
    tips = [
        f"{name}, from {duration(start)} on: {percent(ratio)}" for start, ratio in zip(starts[some], found, strict=True)
    ]
    look = f"{evidence.looks[cell.strategy]} fine"
    return Series(name, look, list(starts[some] + window.seconds / 2), found, tips)


def _draw_time(frame: Frame, lines: Sequence[Series], windows: facts.Windows) -> Iterator[Markup]:
    edges = [i * windows.seconds for i in range(len(windows.accesses) + 1)]
    across = frame.across(0.0, edges[-1])
    split = frame.bottom - 62
    yield from ratio_lines(replace(frame, height=split, bottom_margin=0), across, lines)
    most = int(windows.accesses.max())
    lower = replace(frame, top=split + 16)
    tips = [
        f"from {duration(start)} on: {count(blocks)} blocks of {count(requests)} requests"
        for start, blocks, requests in zip(edges[:-1], windows.accesses, windows.requests, strict=True)
    ]
    yield from bars(across, lower.up(most), edges, list(windows.accesses), tips, "muted")
    yield tag("text", short(most), class_="tick", x=frame.left - 7, y=lower.top + 9, text_anchor="end")
    yield tag("text", "blocks", class_="tick", x=0.0, y=lower.bottom)
    ticks = even_time_ticks(edges[-1], frame.most_ticks)
    yield from floor(frame, across, ticks, duration, "time since the first request")
