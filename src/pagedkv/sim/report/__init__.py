"""HTML report of replays and plans: one self-contained file with charts."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.format import count
from pagedkv.sim.curves import HitCurve
from pagedkv.sim.measures import by_fleet
from pagedkv.sim.plan_types import Plan
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.report import text
from pagedkv.sim.report.charts import curve_section, depth_section, gap_section, session_section, time_section
from pagedkv.sim.report.evidence import Evidence
from pagedkv.sim.report.html import Markup, duration, page, tag
from pagedkv.sim.report.text import (
    every_replay,
    headline,
    measures_section,
    method_section,
    results_section,
    trace_section,
    verdict,
)
from pagedkv.sim.trace import Trace

__all__ = ["plan_report", "replay_report"]

Sections = tuple[Markup | None, ...]


def replay_report(
    trace: Trace,
    results: Sequence[ReplayResult],
    curve: HitCurve | None = None,
    optimum: Sequence[ReplayResult] | None = None,
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
    optimum : sequence of ReplayResult, optional
        More replays, for callers who have the optimum apart.
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
    shown = [*results, *(optimum or ())]
    evidence = Evidence(
        trace,
        by_fleet(shown),
        curve,
        bytes_per_block=bytes_per_token * trace.block_tokens if bytes_per_token else None,
        chosen_blocks=chosen_blocks,
    )
    sections = (
        headline(evidence),
        curve_section(evidence),
        results_section(evidence),
        measures_section(shown),
        *_details(evidence),
        trace_section(evidence),
        method_section(evidence, command),
    )
    return _document(trace, verdict(evidence), None, sections)


def plan_report(plan: Plan, trace: Trace, *, command: str | None = None) -> str:
    """Return a plan as one HTML document.

    Parameters
    ----------
    plan : Plan
    trace : Trace
        That the plan was made for.
    command : str, optional
        The command line that made the report, shown in it.

    Returns
    -------
    str
        HTML without references to anything outside. All text from the trace and the model is escaped.
    """
    evidence = text.evidence_of(plan, trace)
    replays = every_replay(evidence) if plan.runs else None
    sections = (
        text.plan_headline(plan),
        text.fleet_section(plan),
        curve_section(evidence, replays),
        text.levels_section(plan),
        text.memory_section(plan),
        text.disk_section(plan),
        *_details(evidence),
        text.load_section(plan),
        trace_section(evidence),
        text.notes(plan),
        method_section(evidence, command),
    )
    return _document(trace, text.answer(plan), plan.verdict.text, sections)


def _details(evidence: Evidence) -> Sections:
    return time_section(evidence), depth_section(evidence), session_section(evidence), gap_section(evidence)


def _document(trace: Trace, sentence: str, explanation: str | None, sections: Sections) -> str:
    span = duration(float(trace.times[-1])) if trace.num_requests else "no time"
    header = tag(
        "header",
        tag("p", "pagedkv · how much KV cache?", class_="kicker"),
        tag("h1", sentence),
        tag("p", explanation, class_="verdict") if explanation else None,
        tag("p", tag("bdi", trace.name), f" · {count(trace.num_requests)} requests in {span}", class_="sub"),
    )
    return page(f"{trace.name}: {sentence}", header, tag("main", *sections))
