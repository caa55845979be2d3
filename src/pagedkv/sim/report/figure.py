"""A chart with all that belongs to it: heading, two drawings (desktop, phone), legend, the figures as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pagedkv.sim.report.charts import NARROW, WIDE, Frame, Series
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import percent

__all__ = ["figure", "legend", "ratio_cell", "section", "table"]

Cell = object


def section(key: str, heading: str, *content: object) -> Markup:
    """Return one card of the page."""
    return tag("section", tag("h2", heading, id=f"{key}-heading"), *content, id=key, aria_labelledby=f"{key}-heading")


def figure(
    key: str,
    title: str,
    description: str,
    draw: Callable[[Frame], Iterable[Markup]],
    *below: object,
    frames: Sequence[Frame] = (WIDE, NARROW),
) -> Markup:
    """Return the drawings of a chart, one a frame; the style sheet shows the one that fits the screen."""
    drawings = [_drawing(f"{key}-{frame.name}", title, description, frame, draw) for frame in frames]
    return tag("figure", *drawings, *below)


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
    caption: str, heads: Sequence[object], rows: Sequence[Sequence[Cell]], *, is_folded: bool = False, class_: str = ""
) -> Markup:
    """Return a table that scrolls sideways when it is wider than the screen.

    Parameters
    ----------
    caption : str
    heads : sequence
        One per column; the first column names the row.
    rows : sequence of sequences
        A cell is text, markup, or (text, number to sort by).
    is_folded : bool
        Show it on demand.
    class_ : str
    """
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in heads)))
    body = tag("tbody", *(tag("tr", *(_cell(cell, i) for i, cell in enumerate(row))) for row in rows))
    whole = tag("table", tag("caption", caption, class_="sr" if is_folded else None), head, body, class_=class_ or None)
    scroller = tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("details", tag("summary", caption), scroller) if is_folded else scroller


def _cell(cell: Cell, column: int) -> Markup:
    shown, value = cell if isinstance(cell, tuple) else (cell, None)
    data = f"{value!r}" if isinstance(value, int | float) else None
    if column == 0:
        return tag("th", shown, scope="row", data_value=data)
    return tag("td", shown, data_value=data)


def ratio_cell(hits: float, accesses: float) -> tuple[str, float]:
    """Return a share as a cell; a dash where there was nothing to find."""
    return (percent(hits / accesses), float(hits / accesses)) if accesses else ("–", -1.0)
