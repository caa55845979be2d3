"""The words of a report: verdict, headline figures, the table of all replays, the trace, and how it was computed."""

from __future__ import annotations

import numpy as np

from pagedkv.sim.report.evidence import OPTIMAL, Evidence, shown_name
from pagedkv.sim.report.figure import section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, duration, percent, points, round_count

_NEARLY_ALL = 0.95
_DEFINITIONS = (
    ("hit", "a block of the longest cached prefix of its request, counted from the first block of the prompt"),
    (
        "hit ratio",
        "hits over all blocks that requests touch; by tokens, input tokens in hit blocks over all input tokens",
    ),
    ("no limit", "what a cache that never gives up a block would find: every use of a block but its first"),
    ("best possible", "Belady’s optimum that respects prefixes: it knows the future and gives up what is needed last"),
    (
        "knee",
        "where LRU’s curve, over the logarithm of the size, lies farthest above the line between its ends",
    ),
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
    where = evidence.size(best.blocks)
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
        lru, optimum = evidence.cell("lru", best.blocks), evidence.cell(OPTIMAL, best.blocks)
        if lru and lru is not best:
            tiles.append(("LRU", percent(lru.hit_ratio), f"{points(lru.hit_ratio - best.hit_ratio)} points, same size"))
        if optimum:
            gain = points(optimum.hit_ratio - best.hit_ratio)
            tiles.append(("Best possible", percent(optimum.hit_ratio), f"{gain} points, same size"))
    if evidence.knee:
        size = evidence.sized(evidence.knee) if evidence.bytes_per_block else count(evidence.knee)
        note = f"{count(evidence.knee)} blocks" if evidence.bytes_per_block else "blocks, under LRU"
        tiles.append(("Knee", size, note))
    items = (tag("div", tag("dt", name), tag("dd", figure, tag("small", note))) for name, figure, note in tiles)
    return tag("dl", *items, class_="tiles")


def results_section(evidence: Evidence) -> Markup | None:
    """Return the table strategies × capacities: the hit ratio, and under it the difference to LRU in points."""
    if not evidence.results:
        return None
    heads: list[object] = ["strategy", *(_size_head(evidence, blocks) for blocks in evidence.capacities)]
    names = [*evidence.strategies, *([OPTIMAL] if OPTIMAL in evidence.points else [])]
    rows = [
        [_name(evidence, name), *(_cell(evidence, name, blocks) for blocks in evidence.capacities)] for name in names
    ]
    has_lru = "lru" in evidence.points
    note = "Hit ratio by blocks" + (", under it the difference to LRU in percentage points" if has_lru else "")
    return section(
        "results",
        "Strategies and sizes",
        tag("p", f"{note}. The best strategy of each size is marked.", class_="lede"),
        table("Hit ratio by strategy and size", heads, rows, class_="matrix"),
        every_replay(evidence),
    )


def _size_head(evidence: Evidence, blocks: int) -> Markup | str:
    if evidence.bytes_per_block is None:
        return count(blocks)
    return tag("span", evidence.sized(blocks), tag("small", f"{count(blocks)} blocks"))


def _name(evidence: Evidence, name: str) -> Markup:
    return tag("span", tag("i", class_=f"chip {evidence.looks[name]}"), shown_name(name))


def _cell(evidence: Evidence, name: str, blocks: int) -> object:
    cell, lru = evidence.cell(name, blocks), evidence.cell("lru", blocks)
    if cell is None:
        return ("–", -1.0)
    rivals = [rival.hit_blocks for other in evidence.strategies if (rival := evidence.cell(other, blocks))]
    is_best = name != OPTIMAL and len(rivals) > 1 and cell.hit_blocks == max(rivals)
    gain = points(cell.hit_ratio - lru.hit_ratio) if lru and lru is not cell else None
    ratio = tag("b", percent(cell.hit_ratio), class_="best") if is_best else percent(cell.hit_ratio)
    return (tag("span", ratio, tag("small", gain) if gain else None), cell.hit_ratio)


def every_replay(evidence: Evidence) -> Markup:
    """Return all figures of all replays, shown on demand."""
    is_timed = any(result.preempted or result.refused for result in evidence.results)
    heads = ["strategy", "blocks", "hit blocks", "accesses", "hit ratio", "by tokens", "given up", "seconds"]
    heads += ["preempted", "refused"] if is_timed else []
    rows = [
        [
            result.strategy,
            (count(result.blocks), result.blocks),
            (count(result.hit_blocks), result.hit_blocks),
            (count(result.accesses), result.accesses),
            (f"{result.hit_ratio:.6f}", result.hit_ratio),
            (f"{result.token_hit_ratio:.6f}", result.token_hit_ratio),
            (count(result.reclaimed), result.reclaimed),
            (f"{result.seconds:.3f}", result.seconds),
            *([(count(n), n) for n in (result.preempted, result.refused)] if is_timed else []),
        ]
        for result in sorted(evidence.results, key=lambda result: (result.blocks, -result.hit_blocks, result.strategy))
    ]
    return table("Every replay in full", heads, rows, is_folded=True)


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
    items = (tag("div", tag("dt", name), tag("dd", value)) for name, value in rows)
    return section("trace", "The traffic", tag("dl", *items, class_="facts"))


def method_section(evidence: Evidence, command: str | None, version: str) -> Markup:
    """Return how the figures came about, and what the words mean."""
    seconds = sum(result.seconds for result in evidence.results)
    terms = (tag("div", tag("dt", name), tag("dd", meaning)) for name, meaning in _DEFINITIONS)
    return section(
        "method",
        "How this was computed",
        tag(
            "p",
            f"By pagedkv {version}: {len(evidence.results)} replays of {count(evidence.trace.num_requests)} requests, ",
            f"{duration(seconds)} on one core, all but the optimum through the block manager that serves models. ",
            "After a request all its blocks are cached, the partly filled last one too. ",
            "Counts are exact: the same trace gives the same figures.",
        ),
        tag("pre", tag("code", command), class_="scroll", tabindex="0") if command else None,
        tag("dl", *terms, class_="terms"),
    )
