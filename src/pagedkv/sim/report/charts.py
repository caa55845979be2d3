"""The plotting area of one chart: grid, axes, lines, dots, bars, labels, in SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.scale import Scale

Format = Callable[[float], str]
_LINE_HEIGHT = 15.0


@dataclass(frozen=True)
class Frame:
    """The size of a drawing and of the margins around its plotting area, in pixels."""

    name: str
    width: float
    height: float
    right_margin: float
    left_margin: float = 46.0
    top_margin: float = 46.0
    bottom_margin: float = 44.0

    @property
    def left(self) -> float:
        """Where the plotting area begins."""
        return self.left_margin

    @property
    def right(self) -> float:
        """Where the plotting area ends."""
        return self.width - self.right_margin

    @property
    def top(self) -> float:
        """The upper end of the plotting area."""
        return self.top_margin

    @property
    def bottom(self) -> float:
        """The lower end of the plotting area."""
        return self.height - self.bottom_margin

    @property
    def has_end_labels(self) -> bool:
        """Whether there is room for names to the right of the lines."""
        return self.right_margin > 60

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
NARROW = Frame("narrow", 360, 290, right_margin=22, left_margin=46)


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a chart.

    Attributes
    ----------
    name : str
    look : str
        The CSS class that gives colour and dashes.
    xs, ys : sequence of float
    tips : sequence of str
        What hovering over a point says; a line without tips has no dots.
    is_labelled : bool
        Whether the name stands at the end of the line.
    """

    name: str
    look: str
    xs: Sequence[float]
    ys: Sequence[float]
    tips: Sequence[str] = ()
    is_labelled: bool = True

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
            x, y = across(left), up(height)
            width = max(across(right) - x - 1.0, 0.5)
            tall = max(up(0) - y, 1.0)
            yield tag(
                "rect", tag("title", tip), class_=f"bar {look}", x=x + 0.5, y=up(0) - tall, width=width, height=tall
            )


def upright(frame: Frame, across: Scale, value: float, name: str, row: int = 0) -> Iterator[Markup]:
    """Mark a value of the horizontal axis by a line with its name above the plotting area."""
    x = across(value)
    y = frame.top - 19 + 14 * row
    is_late = x > (frame.left + frame.right) / 2
    yield tag("line", class_="mark", x1=x, x2=x, y1=y - 8, y2=frame.bottom)
    yield tag(
        "text", name, class_="note", x=x - 5 if is_late else x + 5, y=y, text_anchor="end" if is_late else "start"
    )


def label_ends(frame: Frame, lines: Sequence[Series], across: Scale, up: Scale) -> Iterator[Markup]:
    """Write the names of lines beside their last points, moved apart where they would cover each other."""
    if not frame.has_end_labels:
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
