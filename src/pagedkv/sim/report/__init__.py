"""The report: one self-contained HTML file, with charts, that opens offline and on a phone."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.sim.hit_curve import HitCurve
from pagedkv.sim.report.curve_chart import curve_section
from pagedkv.sim.report.depth_chart import depth_section
from pagedkv.sim.report.evidence import Evidence
from pagedkv.sim.report.gap_chart import gap_section
from pagedkv.sim.report.markup import tag
from pagedkv.sim.report.numbers import count, duration
from pagedkv.sim.report.page import page
from pagedkv.sim.report.session_chart import session_section
from pagedkv.sim.report.story import headline, method_section, results_section, trace_section, verdict
from pagedkv.sim.report.time_chart import time_section
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.trace import Trace

__all__ = ["replay_report"]


def replay_report(
    trace: Trace,
    results: Sequence[ReplayResult],
    curve: HitCurve | None = None,
    optimum: Sequence[ReplayResult] = (),
    *,
    bytes_per_token: float | None = None,
    chosen_blocks: int | None = None,
    command: str | None = None,
) -> str:
    """Return what replays of a trace found, as one HTML document.

    Parameters
    ----------
    trace : Trace
    results : sequence of ReplayResult
        Of any strategies and capacities; the optimum may be among them.
    curve : HitCurve, optional
        Of LRU over every capacity.
    optimum : sequence of ReplayResult
        More replays; kept apart for callers who have them apart.
    bytes_per_token : float, optional
        Of a model's keys and values: sizes are then told in GiB.
    chosen_blocks : int, optional
        A capacity to mark; the detailed charts show the replay nearest to it.
    command : str, optional
        The command line that made the report, shown in it.

    Returns
    -------
    str
        HTML without references to anything outside. All text from the trace is escaped.
    """
    evidence = Evidence(
        trace,
        [*results, *optimum],
        curve,
        None,
        bytes_per_token * trace.block_tokens if bytes_per_token else None,
        0.0,
        chosen_blocks,
    )
    return _document(evidence, verdict(evidence), headline(evidence), command=command)


def _document(evidence: Evidence, sentence: str, *opening: object, command: str | None) -> str:
    trace = evidence.trace
    span = duration(float(trace.times[-1])) if trace.num_requests else "no time"
    subject = (tag("bdi", trace.name), f" · {count(trace.num_requests)} requests in {span}")
    sections = (
        curve_section(evidence),
        results_section(evidence),
        time_section(evidence),
        depth_section(evidence),
        session_section(evidence),
        gap_section(evidence),
        trace_section(evidence),
        method_section(evidence, command, _version()),
    )
    header = tag(
        "header",
        tag("p", "pagedkv · how much KV cache?", class_="kicker"),
        tag("h1", sentence),
        tag("p", *subject, class_="sub"),
    )
    return page(f"{trace.name}: {sentence}", header, tag("main", *opening, *sections))


def _version() -> str:
    from pagedkv import __version__

    return __version__
