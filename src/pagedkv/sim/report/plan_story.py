"""The words of a plan's report: the answer, the price of every level, the given memory, the model and the load."""

from __future__ import annotations

from pagedkv.sim.plan_types import Level, Plan, Size
from pagedkv.sim.report.evidence import Evidence, Points, shown_name
from pagedkv.sim.report.figure import section, table
from pagedkv.sim.report.html import Markup, tag
from pagedkv.sim.report.numbers import count, duration, gib, percent, rough_duration, round_count, share, short
from pagedkv.sim.trace import Trace

__all__ = ["answer", "evidence_of", "levels_section", "load_section", "memory_section", "notes", "plan_headline"]


def evidence_of(plan: Plan, trace: Trace) -> Evidence:
    """Return the plan's replays as what the charts are drawn from."""
    lines = (
        Points(line.name, tuple(line.blocks.tolist()), tuple(line.hit_ratio.tolist()))
        for line in plan.lines
        if line.name != "lru"
    )
    return Evidence(
        trace,
        plan.runs,
        plan.curve,
        lines=tuple(lines),
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
        return f"{gib(plan.memory.bytes)} find {percent(best.share)} of what can be found"
    size = plan.at_target.best
    return f"{share(plan.target)} of what can be found needs {gib(size.bytes)}"


def plan_headline(plan: Plan) -> Markup:
    """Return the few figures that matter, large."""
    tiles = [("Attainable", percent(plan.attainable), "hit ratio of a cache without a limit")]
    level = plan.at_target
    if level:
        goal = f"for {share(plan.target)} of that"
        tiles.append(("Needed", gib(level.best.bytes), f"{goal}, {level.best.strategy}"))
        if level.best.strategy != "lru":
            tiles.append(("Under LRU", gib(level.lru.bytes), goal))
        tiles.append(("Least possible", gib(level.optimum.bytes), f"{goal}, knowing the future"))
        saved = level.best.flops_saved / plan.prefill_flops if plan.prefill_flops else 0.0
        tiles.append(("Prefill saved", percent(saved), f"{rough_duration(level.best.seconds_saved)} of computing"))
    if plan.memory:
        tiles.append(("Given", gib(plan.memory.bytes), f"hit ratio {percent(plan.memory.best.hit_ratio)}"))
    items = (tag("div", tag("dt", name), tag("dd", figure, tag("small", note))) for name, figure, note in tiles)
    return tag("dl", *items, class_="tiles")


def levels_section(plan: Plan) -> Markup | None:
    """Return the table of what every share of the attainable hit ratio costs."""
    if not plan.levels:
        return None
    heads = ["of the attainable", "hit ratio", "LRU", "best strategy", "least possible", "prefill saved"]
    rows = [_level(plan, level) for level in plan.levels]
    return section(
        "levels",
        "What each level costs",
        tag("p", "The memory that finds a share of what a cache without a limit would find.", class_="lede"),
        table("Memory by share of the attainable hit ratio", heads, rows, class_="matrix"),
    )


def _level(plan: Plan, level: Level) -> list[object]:
    is_target = level is plan.at_target
    wanted = tag("span", share(level.share), tag("small", "target") if is_target else None)
    saved = level.best.flops_saved / plan.prefill_flops if plan.prefill_flops else 0.0
    return [
        (wanted, level.share),
        (percent(level.best.hit_ratio), level.best.hit_ratio),
        _memory(level.lru),
        _memory(level.best, level.best.strategy),
        _memory(level.optimum),
        (tag("span", percent(saved), tag("small", rough_duration(level.best.seconds_saved))), saved),
    ]


def _memory(size: Size, strategy: str | None = None) -> tuple[Markup, int]:
    below = strategy or f"{round_count(size.blocks)} blocks"
    return tag("span", gib(size.bytes), tag("small", below)), size.bytes


def memory_section(plan: Plan) -> Markup | None:
    """Return what the given memory gives under every strategy."""
    if plan.memory is None:
        return None
    sizes = (plan.memory.optimum, *plan.memory.all)
    rows = [
        [
            shown_name(size.strategy),
            (percent(size.hit_ratio), size.hit_ratio),
            (percent(size.token_hit_ratio), size.token_hit_ratio),
            (percent(size.share), size.share),
            (rough_duration(size.seconds_saved), size.seconds_saved),
        ]
        for size in sizes
    ]
    heads = ["strategy", "hit ratio", "by tokens", "of the attainable", "prefill saved"]
    lede = f"{count(plan.memory.blocks)} blocks fit."
    return section(
        "memory",
        f"With {gib(plan.memory.bytes)}",
        tag("p", lede, class_="lede"),
        table("The given memory", heads, rows),
    )


def load_section(plan: Plan) -> Markup:
    """Return the facts of the model, of the hardware, and of what runs at the same time."""
    model, load = plan.model, plan.load
    held = "" if load.shared else ", shared blocks counted more than once"
    held_blocks = f"{round_count(load.mean_blocks)} on average, {round_count(load.peak_blocks)}"
    rows = [
        ("Model", tag("bdi", model.name)),
        ("Layers", count(model.num_layers)),
        ("KV of a token", f"{gib(model.bytes_per_token)} in {model.kv_dtype}"),
        ("KV of a block", f"{gib(plan.bytes_per_block)} for {count(plan.block_tokens)} tokens"),
        ("Prefill of the trace", f"{short(plan.prefill_flops)}FLOP, {duration(plan.prefill_seconds)}"),
        ("At a rate of", f"{short(plan.hardware.flops_per_second)}FLOP/s"),
        ("Requests at once", f"{load.mean_requests:.1f} on average, {count(load.peak_requests)} at the peak"),
        ("Blocks they hold", f"{held_blocks} at the peak{held}"),
        ("Replicas for prefill", f"{load.prefill_load:.2f} busy without a cache"),
        ("A cache at the target saves", f"{load.prefill_load_saved:.2f} of them"),
    ]
    items = (tag("div", tag("dt", name), tag("dd", value)) for name, value in rows)
    return section("load", "The model and the load", tag("dl", *items, class_="facts"))


def notes(plan: Plan) -> Markup | None:
    """Return the assumptions of the plan."""
    if not plan.notes:
        return None
    items = tag("ul", *(tag("li", note) for note in plan.notes))
    return section("notes", "What was assumed", items)
