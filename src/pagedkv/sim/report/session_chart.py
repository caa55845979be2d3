"""How the hit ratio is spread over sessions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pagedkv.sim.report import facts
from pagedkv.sim.report.charts import NARROW, WIDE_BARE, Frame, bars, floor, grid, upright
from pagedkv.sim.report.evidence import Evidence
from pagedkv.sim.report.figure import figure, section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, percent, short
from pagedkv.sim.report.scale import linear_ticks

__all__ = ["session_section"]


def session_section(evidence: Evidence) -> Markup | None:
    """Return the distribution of the hit ratio over sessions, or over requests where the trace names no sessions."""
    cells = evidence.detailed[:1]
    if not cells:
        return None
    shares, what = facts.per_session(evidence.trace, cells[0].hits), "session"
    if not len(shares.accesses):
        shares, what = facts.per_request(evidence.trace, cells[0].hits), "request"
    if not len(shares.accesses):
        return None
    edges = np.linspace(0, 1, 21)
    # The last bin holds its upper edge too: everything found.
    numbers = np.histogram(shares.ratios, edges)[0]
    names = [f"{100 * low:.0f} to {100 * high:.0f}%" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    tips = [f"{count(number)} {what}s with {name}" for number, name in zip(numbers, names, strict=True)]
    total = len(shares.accesses)
    median = float(np.median(shares.ratios))
    missing = "" if what == "session" else "The trace names no sessions, so every request stands for itself. "
    lede = (
        f"{missing}{cells[0].strategy} {evidence.where}: half of {count(total)} {what}s find at least "
        f"{percent(median)} of their blocks; {percent(float((shares.hit_blocks == 0).mean()))} find none."
    )
    rows = [
        [(name, float(low)), (count(number), int(number)), (percent(number / total), number / total)]
        for name, low, number in zip(names, edges[:-1], numbers, strict=True)
    ]
    return section(
        "sessions",
        f"Hit ratio per {what}",
        tag("p", lede, class_="lede"),
        figure(
            "session-chart",
            f"Distribution of the hit ratio over {what}s",
            lede,
            lambda frame: _draw_shares(frame, numbers, tips, median, what),
            frames=(WIDE_BARE, NARROW),
        ),
        table(f"The figures per {what}", ["hit ratio", f"{what}s", "share"], rows, is_folded=True),
    )


def _draw_shares(frame: Frame, numbers: facts.Ints, tips: Sequence[str], median: float, what: str) -> Iterator[Markup]:
    across = frame.across(0.0, 1.0)
    ticks = linear_ticks(float(numbers.max()))
    up = frame.up(ticks[-1])
    yield from grid(frame, up, ticks, short, f"{what}s")
    yield from bars(across, up, list(np.linspace(0, 1, 21)), list(numbers), tips, "b1")
    yield from floor(frame, across, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], lambda tick: f"{100 * tick:g}%", "hit ratio")
    yield from upright(frame, across, median, f"median {percent(median)}")
