"""How long a block waits for its next use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pagedkv.sim.report import facts
from pagedkv.sim.report.charts import NARROW, WIDE_BARE, Frame, bars, floor, grid, upright
from pagedkv.sim.report.evidence import Evidence
from pagedkv.sim.report.figure import figure, section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, duration, percent, rough_duration, round_count
from pagedkv.sim.report.scale import linear_ticks, time_ticks

__all__ = ["gap_section"]


_GAP_EDGES = np.geomspace(1, 1e7, 141)
"""20 bins a decade from 1 s to four months; the ends take what lies beyond."""


def gap_section(evidence: Evidence) -> Markup | None:
    """Return the histogram of the time until a block is used again."""
    gaps = facts.reuse_gaps(evidence.trace, _GAP_EDGES)
    if not gaps.total:
        return None
    coarse = facts.Gaps(gaps.edges[::4], gaps.counts.reshape(-1, 4).sum(axis=1))
    filled = np.flatnonzero(coarse.counts)
    first, last = int(filled[0]), int(filled[-1]) + 1
    shown = facts.Gaps(coarse.edges[first : last + 1], coarse.counts[first:last])
    half, most = gaps.quantile(0.5), gaps.quantile(0.9)
    lede = (
        f"{round_count(gaps.total)} uses of a block that was used before. "
        f"Half of them come within {rough_duration(half)}, "
        f"nine of ten within {rough_duration(most)}: so long a block has to be kept to be found."
    )
    names = [
        f"{rough_duration(float(low))} to {rough_duration(float(high))}"
        for low, high in zip(shown.edges[:-1], shown.edges[1:], strict=True)
    ]
    if first == 0:
        names[0] = f"less than {rough_duration(float(shown.edges[1]))}"
    tips = [
        f"{name}: {percent(number / gaps.total)} of the reuses"
        for name, number in zip(names, shown.counts, strict=True)
    ]
    running = shown.counts.cumsum() / gaps.total
    rows = [
        [
            (name, float(low)),
            (count(n), int(n)),
            (percent(n / gaps.total), n / gaps.total),
            (percent(upto), float(upto)),
        ]
        for name, low, n, upto in zip(names, shown.edges[:-1], shown.counts, running, strict=True)
    ]
    return section(
        "gaps",
        "How long a block waits for its next use",
        tag("p", lede, class_="lede"),
        figure(
            "gap-chart",
            "Time until a block is used again",
            lede,
            lambda frame: _draw_gaps(frame, shown, tips, half, most),
            frames=(WIDE_BARE, NARROW),
        ),
        table(
            "The figures of reuse gaps",
            ["time since the last use", "reuses", "share", "up to here"],
            rows,
            is_folded=True,
        ),
    )


def _draw_gaps(frame: Frame, gaps: facts.Gaps, tips: Sequence[str], half: float, most: float) -> Iterator[Markup]:
    low, high = float(gaps.edges[0]), float(gaps.edges[-1])
    across = frame.across(low, high, is_log=True)
    ticks = linear_ticks(float(gaps.counts.max()) / gaps.total)
    up = frame.up(ticks[-1])
    yield from grid(frame, up, ticks, lambda tick: f"{100 * tick:g}%", "share of the reuses")
    yield from bars(across, up, list(gaps.edges), list(gaps.counts / gaps.total), tips, "b1")
    shorter = [low] if low == _GAP_EDGES[0] else []
    times = [tick for tick in time_ticks(low, high, frame.most_ticks) if tick > low]
    yield from floor(frame, across, [*shorter, *times], _tick, "time since the last use")
    yield from upright(frame, across, half, f"half within {rough_duration(half)}")
    yield from upright(frame, across, most, f"90% within {rough_duration(most)}", 1)


def _tick(seconds: float) -> str:
    """Name a time; the first bin begins at 0."""
    return "0" if seconds == _GAP_EDGES[0] else duration(seconds)
