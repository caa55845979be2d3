"""Text and tables of a report: verdict, headline figures, all replays, the trace, the method, the plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from pagedkv.format import count, percent, points, share
from pagedkv.sim import plan_figures as figures
from pagedkv.sim.baselines import LRU, OPTIMAL
from pagedkv.sim.measures import Measures
from pagedkv.sim.plan_figures import Figures
from pagedkv.sim.plan_types import Plan
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.report.charts import counts, ratios, section, table
from pagedkv.sim.report.evidence import Evidence, Points, shown_name
from pagedkv.sim.report.html import Markup, duration, flops, format_bytes, rough_duration, round_count, tag
from pagedkv.sim.trace import Trace

_NEARLY_ALL = 0.95
_NOTHING = ("–", -1.0)
_DEFINITIONS = (
    ("hit", "a block of the longest cached prefix of its request, counted from the first block of the prompt"),
    (
        "hit ratio",
        "hits over all blocks that requests touch; by tokens, input tokens in hit blocks over all input tokens",
    ),
    ("no limit", "what a cache that never evicts a block would find: every use of a block but its first"),
    ("best possible", "Belady’s optimum that respects prefixes: it knows the future and evicts what is needed last"),
    ("knee", "where LRU’s curve, over the logarithm of the size, lies farthest above the line between its ends"),
    ("reuse gap", "the time between two requests in a row that touch one block"),
)


def verdict(evidence: Evidence) -> str:
    """Return in one sentence what limits the hits of this traffic."""
    if not evidence.trace.has_content:
        return "This trace carries lengths only: nothing can be said about hits"
    if not evidence.attainable:
        return "Nothing to reuse: no block of this traffic comes twice"
    best = evidence.best
    if best is None:
        return f"At most {percent(evidence.attainable)} of the blocks can be found again"
    where = evidence.size(best.blocks) + evidence.beneath
    share = best.hit_ratio / evidence.attainable
    if share >= _NEARLY_ALL:
        return f"Large enough: {best.strategy} in {where} finds {percent(share)} of all that can be found"
    optimum = evidence.cell(OPTIMAL, best.blocks)
    if optimum and optimum.hit_ratio - best.hit_ratio > evidence.attainable - optimum.hit_ratio:
        return (
            f"Limited by the strategy: in {where} {best.strategy} finds {percent(best.hit_ratio)}, "
            f"the best possible {percent(optimum.hit_ratio)}"
        )
    return f"Limited by capacity: {best.strategy} in {where} finds {percent(share)} of what can be found"


def headline(evidence: Evidence) -> Markup:
    """Return the few figures that matter, large."""
    tiles = [("Attainable", percent(evidence.attainable), "hit ratio of a cache without a limit")]
    best = evidence.best
    if best:
        where = f"at {evidence.size(best.blocks)}"
        tiles.append(("Best strategy", percent(best.hit_ratio), f"{best.strategy} {where}"))
        lru, optimum = evidence.cell(LRU, best.blocks), evidence.cell(OPTIMAL, best.blocks)
        if lru and lru is not best:
            tiles.append(("LRU", percent(lru.hit_ratio), f"{points(lru.hit_ratio - best.hit_ratio)} points, same size"))
        if optimum:
            gain = points(optimum.hit_ratio - best.hit_ratio)
            tiles.append(("Best possible", percent(optimum.hit_ratio), f"{gain} points, same size"))
    if evidence.knee:
        size = evidence.sized(evidence.knee) if evidence.bytes_per_block else count(evidence.knee)
        note = f"{count(evidence.knee)} blocks" if evidence.bytes_per_block else "blocks, under LRU"
        tiles.append(("Knee", size, note))
    return _tiles(tiles)


def _tiles(tiles: Iterable[tuple[str, str, str]]) -> Markup:
    items = (tag("div", tag("dt", name), tag("dd", figure, tag("small", note))) for name, figure, note in tiles)
    return tag("dl", *items, class_="tiles")


def _pairs(pairs: Iterable[tuple[str, object]], look: str) -> Markup:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_=look)


def results_section(evidence: Evidence) -> Markup | None:
    """Return the table strategies × capacities: the hit ratio, and under it the difference to LRU in points."""
    if not evidence.results:
        return None
    heads: list[object] = ["strategy", *(_size_head(evidence, blocks) for blocks in evidence.capacities)]
    names = [*evidence.strategies, *([OPTIMAL] if OPTIMAL in evidence.points else [])]
    rows = [
        [_name(evidence, name), *(_cell(evidence, name, blocks) for blocks in evidence.capacities)] for name in names
    ]
    has_lru = LRU in evidence.points
    note = "Hit ratio by blocks" + (", under it the difference to LRU in percentage points" if has_lru else "")
    return section(
        "results",
        "Strategies and sizes",
        tag("p", f"{note}. The best strategy of each size is marked.", _counted(evidence), class_="lede"),
        table("Hit ratio by strategy and size", heads, rows, class_="matrix"),
        every_replay(evidence),
    )


def _counted(evidence: Evidence) -> str | None:
    if not evidence.beneath:
        return None
    return f" Sizes are those of the pool; counted is what it{evidence.beneath} found together."


def _size_head(evidence: Evidence, blocks: int) -> Markup | str:
    if evidence.bytes_per_block is None:
        return count(blocks)
    return tag("span", evidence.sized(blocks), tag("small", f"{count(blocks)} blocks"))


def _name(evidence: Evidence, name: str) -> Markup:
    return tag("span", tag("i", class_=f"chip {evidence.looks[name]}"), shown_name(name))


def _cell(evidence: Evidence, name: str, blocks: int) -> object:
    cell, lru = evidence.cell(name, blocks), evidence.cell(LRU, blocks)
    if cell is None:
        return _NOTHING
    rivals = [rival.hit_blocks for other in evidence.strategies if (rival := evidence.cell(other, blocks))]
    is_best = name != OPTIMAL and len(rivals) > 1 and cell.hit_blocks == max(rivals)
    gain = points(cell.hit_ratio - lru.hit_ratio) if lru and lru is not cell else None
    ratio = tag("b", percent(cell.hit_ratio), class_="best") if is_best else percent(cell.hit_ratio)
    return (tag("span", ratio, tag("small", gain) if gain else None), cell.hit_ratio)


def every_replay(evidence: Evidence) -> Markup:
    """Return all figures of all replays, shown on demand."""
    is_timed = any(result.preempted or result.refused for result in evidence.results)
    heads = ["strategy", "blocks", "hit blocks", "accesses", "hit ratio", "by tokens", "reclaimed", "seconds"]
    heads += ["preempted", "refused"] if is_timed else []
    media = next(([tier.medium for tier in result.tiers] for result in evidence.results if result.tiers), [])
    heads += [f"{what} {medium}" for medium in media for what in ("hits in", "written to")]
    restarts = any(result.restart for result in evidence.results)
    heads += ["after the restart"] if restarts else []
    rows = [
        [
            result.strategy,
            *counts((result.blocks, result.hit_blocks, result.accesses)),
            (f"{result.hit_ratio:.6f}", result.hit_ratio),
            (f"{result.token_hit_ratio:.6f}", result.token_hit_ratio),
            *counts([result.reclaimed]),
            (f"{result.seconds:.3f}", result.seconds),
            *counts((result.preempted, result.refused) if is_timed else ()),
            *(
                counts(number for tier in result.tiers for number in (tier.hit_blocks, tier.written))
                or [_NOTHING] * 2 * len(media)
            ),
            *(ratios([result.restart.hit_ratio] if result.restart else ()) or [_NOTHING] * restarts),
        ]
        for result in sorted(evidence.results, key=lambda result: (result.blocks, -result.hit_blocks, result.strategy))
    ]
    return table("Every replay in full", heads, rows, is_folded=True)


def measures_section(results: Sequence[ReplayResult]) -> Markup | None:
    """Return what replicas, tiers and time bring, in the digits of the terminal; None for one pool without either."""
    if not any(result.fleet or result.tiers or len(result.ttft) for result in results):
        return None
    shown = Measures(results)
    heads: list[object] = ["measure", "strategy", *(f"{count(blocks)} blocks" for blocks in shown.capacities)]
    rows: list[list[object]] = []
    title = ""
    for measure in shown.measures:
        title = f"{title}, {measure.title.strip()}" if measure.title.startswith(" ") else measure.title
        for name, values in shown.rows(measure, shown.capacities):
            rows.append([title, name, *((measure.written(value), _order(value)) for value in values)])
    return section("measures", "Replicas, tiers and time", table("Every measure, by strategy and size", heads, rows))


def _order(value: float | None) -> float:
    """Return what a column is sorted by; what is not known comes first."""
    return -1.0 if value is None or value != value else value


def trace_section(evidence: Evidence) -> Markup:
    """Return the facts of the trace."""
    trace = evidence.trace
    span = float(trace.times[-1]) if trace.num_requests else 0.0
    sessions = len(np.unique(trace.sessions[trace.sessions >= 0]))
    rows = [
        ("Trace", tag("bdi", trace.name)),
        ("Format", trace.format),
        ("Requests", count(trace.num_requests)),
        ("Sessions", count(sessions) if sessions else "not named"),
        ("Span", duration(span)),
        ("Input tokens", f"{round_count(trace.num_tokens)}"),
        ("Output tokens", f"{round_count(int(trace.output_tokens.sum()))}"),
        ("Tokens per block", count(trace.block_tokens)),
        ("Blocks touched", count(trace.num_accesses)),
        ("Different blocks", count(trace.num_distinct)),
        ("Attainable hit ratio", percent(evidence.attainable)),
    ]
    if evidence.bytes_per_block:
        rows.append(("All blocks together", evidence.sized(trace.num_distinct)))
    if trace.num_skipped:
        rows.append(("Bad lines skipped", count(trace.num_skipped)))
    if trace.num_reordered:
        rows.append(("Requests put in order of time", count(trace.num_reordered)))
    return section("trace", "The traffic", _pairs(rows, "facts"))


def method_section(evidence: Evidence, command: str | None) -> Markup:
    """Return how the figures came about, and what the words mean."""
    from pagedkv import __version__

    seconds, requests = sum(result.seconds for result in evidence.results), count(evidence.trace.num_requests)
    return section(
        "method",
        "How this was computed",
        tag(
            "p",
            f"By pagedkv {__version__}: {len(evidence.results)} replays of {requests} requests, ",
            f"{duration(seconds)} on one core, all but the optimum through the block manager that serves models. ",
            "After a request all its blocks are cached, the partly filled last one too. ",
            "Counts are exact: the same trace gives the same figures.",
        ),
        tag("pre", tag("code", command), class_="scroll", tabindex="0") if command else None,
        _pairs(_DEFINITIONS, "terms"),
    )


# The words of a plan's report: the answer, the price of every level, the given memory, the model and the load.


def evidence_of(plan: Plan, trace: Trace) -> Evidence:
    """Return the plan's replays as what the charts are drawn from."""
    lines = (line for line in plan.lines if line.name != LRU)
    return Evidence(
        trace,
        plan.runs,
        plan.curve,
        lines=tuple(Points(line.name, tuple(line.blocks.tolist()), tuple(line.hit_ratio.tolist())) for line in lines),
        bytes_per_block=plan.bytes_per_block,
        extra_bytes=plan.load.window_bytes,
        chosen_blocks=plan.shown_blocks,
        chosen_name="given" if plan.memory else "needed",
        knee_blocks=plan.knee.blocks if plan.knee else None,
    )


def answer(plan: Plan) -> str:
    """Return in one line what the plan says."""
    if plan.at_target is None:
        return "Nothing to reuse: a cache would not help this traffic"
    if plan.memory is not None:
        best = plan.memory.best
        return f"{format_bytes(plan.memory.bytes)} find {percent(best.share)} of what can be found"
    size = plan.at_target.best
    return f"{share(plan.target)} of what can be found needs {format_bytes(size.bytes)}"


def plan_headline(plan: Plan) -> Markup:
    """Return the few figures that matter, large."""
    tiles = [("Attainable", percent(plan.attainable), "hit ratio of a cache without a limit")]
    level = plan.at_target
    if level:
        goal = f"for {share(plan.target)} of that"
        tiles.append(("Needed", format_bytes(level.best.bytes), f"{goal}, {level.best.strategy}"))
        if level.best.strategy != LRU:
            tiles.append(("Under LRU", format_bytes(level.lru.bytes), goal))
        tiles.append(("Least possible", format_bytes(level.optimum.bytes), f"{goal}, knowing the future"))
        tiles.append(("Prefill saved", rough_duration(level.best.seconds_saved), flops(level.best.flops_saved)))
    if plan.memory:
        tiles.append(("Given", format_bytes(plan.memory.bytes), f"hit ratio {percent(plan.memory.best.hit_ratio)}"))
    return _tiles(tiles)


def levels_section(plan: Plan) -> Markup | None:
    """Return the table of what every share of the attainable hit ratio costs."""
    if not plan.levels:
        return None
    return section(
        "levels",
        "What each level costs",
        tag("p", "The memory that finds a share of what a cache without a limit would find.", class_="lede"),
        _figures("Memory by share of the attainable hit ratio", figures.levels(plan), "target"),
    )


def memory_section(plan: Plan) -> Markup | None:
    """Return what the given memory gives under every strategy."""
    if plan.memory is None:
        return None
    given = figures.memory(plan, plan.memory)
    return section("memory", given.title, _figures("The given memory", given))


def disk_section(plan: Plan) -> Markup | None:
    """Return the price of every share in memory and on a disk, and what to buy."""
    disk = plan.disk
    if disk is None:
        return None
    return section(
        "disk",
        f"A disk beneath {format_bytes(disk.memory.bytes)} of memory",
        tag("p", disk.advice, class_="lede"),
        _figures("Memory or disk", figures.disk(plan, disk), "target"),
        _pairs(figures.disk_facts(disk), "facts"),
    )


def fleet_section(plan: Plan) -> Markup | None:
    """Return which fleet to order, and what each configuration does."""
    fleet = plan.fleet
    if fleet is None:
        return None
    found, tried = figures.fleets(fleet), figures.configurations(fleet)
    return section(
        "fleet",
        "What to order",
        tag("p", fleet.verdict, class_="lede"),
        _figures(tried.title, tried, "to order" if fleet.best else "nearest"),
        _figures(found.title, found),
        _pairs(figures.fleet_facts(fleet), "facts"),
    )


def _figures(caption: str, shown: Figures, marked: str | None = None) -> Markup:
    """Return a table of figures, each on one line; what stands out is bold, and `marked` says why."""
    rows: list[list[object]] = []
    for place, row in enumerate(shown.rows):
        texts = [re.sub(r"(?<=\d) (?=\S)", "\u00a0", figure.text) for figure in row]
        name = "b" if place in shown.strong else "span"
        small = tag("small", marked) if place in shown.strong and marked else None
        cells = [tag("span", texts[0], small), *(tag(name, text) for text in texts[1:])]
        rows.append([(cell, figure.value) for cell, figure in zip(cells, row, strict=True)])
    return table(caption, shown.heads, rows, class_="matrix")


def load_section(plan: Plan) -> Markup:
    """Return the facts of the model, of the hardware, and of what runs at the same time."""
    facts = [*figures.given(plan), *figures.around(plan)]
    return section(
        "load", "The model and the load", _pairs(((name, tag("bdi", fact)) for name, fact in facts), "facts")
    )


def notes(plan: Plan) -> Markup | None:
    """Return the assumptions of the plan."""
    if not plan.notes:
        return None
    items = tag("ul", *(tag("li", note) for note in plan.notes))
    return section("notes", "What was assumed", items)
