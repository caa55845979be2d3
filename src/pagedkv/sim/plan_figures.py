"""Figures of a plan as text: what the terminal and the HTML report both show, formatted in this one place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pagedkv.format import count, counted, duration, flops, format_bytes, money, percent, rough_duration, share, short
from pagedkv.sim.baselines import OPTIMAL
from pagedkv.sim.fleet_plan import beneath, soon, wanted
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_types import DiskPlan, FleetOutcome, FleetPlan, FleetSize, Memory, Plan, Size

MOST_ROWS = 16
"""Configurations of a fleet that are shown; JSON has all."""


class Figure(NamedTuple):
    """One cell: what is shown, and the number behind it, to sort by."""

    text: str
    value: float | None = None


class Figures(NamedTuple):
    """A table: the rows that stand out and the one that stands back are named by their place."""

    title: str
    heads: tuple[str, ...]
    rows: list[list[Figure]]
    strong: tuple[int, ...] = ()
    faint: int | None = None


Facts = Iterator[tuple[str, str]]


# What was given, and what runs at the same time.


def given(plan: Plan) -> Facts:
    """Yield the facts of the trace and the model."""
    requests = f"{plan.requests:,} requests in {duration(plan.span_seconds)}"
    blocks = f"{plan.distinct_blocks:,} blocks of {plan.block_tokens} tokens"
    yield "trace", f"{plan.trace_name}: {requests}, {short(plan.tokens, giga='B')} prompt tokens, {blocks}"
    yield "model", _model(plan.model)
    size = f"{format_bytes(plan.model.bytes_per_token)} per token, {format_bytes(plan.bytes_per_block)} per block"
    each = (("windows", plan.model.window_bytes_per_sequence), ("states", plan.model.state_bytes_per_sequence))
    for what, num_bytes in each:
        if num_bytes:
            size += f", and {format_bytes(num_bytes)} for the {what} of a running request"
    yield "KV cache", f"{size}, in {plan.model.kv_dtype}"
    found = f"{percent(plan.attainable)} of the blocks, {percent(plan.attainable_tokens)} of the prompt tokens"
    yield "attainable", f"{found}: what a cache without a limit finds"


def _model(model: ModelShape) -> str:
    others = ("windowed", model.num_layers_of("window")), ("without attention", model.num_layers_of("none"))
    parts = [f"{model.num_layers_of('full')} full", *(f"{count} {word}" for word, count in others if count)]
    layers = f"{model.num_layers} layers" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
    weights = f"{short(model.parameters.total, giga='B')} parameters"
    if model.parameters.active != model.parameters.total:
        weights += f", {short(model.parameters.active, giga='B')} active"
    return f"{model.name}: {layers}, {weights}"


def around(plan: Plan) -> Facts:
    """Yield the facts of prefill, of what runs at the same time, and of the knee."""
    load, rate = plan.load, f"{plan.hardware.tflops:g} TFLOP/s × {plan.hardware.mfu:g}"
    yield "prefill", f"{flops(plan.prefill_flops)} without a cache, {duration(plan.prefill_seconds)} at {rate}"
    if plan.at_target:
        left = load.prefill_load - load.prefill_load_saved
        busy = f"{load.prefill_load:.2f} kept busy by prefill"
        yield "replicas", f"{busy}, {left:.2f} at {share(plan.target)} of the attainable"
    size = format_bytes(load.peak_blocks * plan.bytes_per_block + load.window_bytes)
    requests = f"{load.mean_requests:,.1f} requests at a time, {load.peak_requests:,} at the peak"
    blocks = f"{load.mean_blocks:,.0f} blocks, {load.peak_blocks:,} at the peak ({size})"
    held = "" if load.shared else ", shared ones counted for each"
    yield "running", f"{requests}; they alone hold {blocks}{held}"
    if plan.knee:
        yield "knee of LRU", f"{format_bytes(plan.knee.bytes)} for {percent(plan.knee.share)} of the attainable"


def _saved(size: Size) -> Figure:
    return Figure(f"{flops(size.flops_saved)}, {rough_duration(size.seconds_saved)}", size.seconds_saved)


def _ratio(value: float) -> Figure:
    return Figure(percent(value), value)


def _bytes(num_bytes: int, what: str = "") -> Figure:
    return Figure(f"{format_bytes(num_bytes)} {what}".rstrip(), num_bytes)


def _seconds(seconds: float) -> Figure:
    return Figure(soon(seconds), seconds)


# What each share of the attainable costs, and what a memory gives.


def levels(plan: Plan) -> Figures:
    """Return the memory for every share of what can be found."""
    heads = ("share", "hit ratio", "LRU", "best strategy", "the optimum", "prefill saved")
    rows = [
        [
            Figure(share(level.share), level.share),
            _ratio(level.best.hit_ratio),
            _bytes(level.lru.bytes),
            _bytes(level.best.bytes, level.best.strategy),
            _bytes(level.optimum.bytes),
            _saved(level.best),
        ]
        for level in plan.levels
    ]
    target = tuple(place for place, level in enumerate(plan.levels) if level is plan.at_target)
    return Figures("Memory for a share of that", heads, rows, target)


def memory(plan: Plan, memory: Memory) -> Figures:
    """Return what the given memory gives under every strategy."""
    tokens = short(memory.blocks * plan.block_tokens, giga="B")
    title = f"With {format_bytes(memory.bytes)}: {memory.blocks:,} blocks, {tokens} tokens"
    sizes = (memory.optimum, *memory.all)
    rows = [
        [
            Figure("the optimum" if size.strategy == OPTIMAL else size.strategy),
            *(_ratio(value) for value in (size.hit_ratio, size.token_hit_ratio, size.share)),
            _saved(size),
        ]
        for size in sizes
    ]
    heads = ("strategy", "hit ratio", "by token", "of attainable", "prefill saved")
    best = tuple(place for place, size in enumerate(sizes) if size is memory.best)
    return Figures(title, heads, rows, best, 0)


# Memory or disk.


def disk_facts(disk: DiskPlan) -> Facts:
    """Yield how fast a disk gives what would be computed else, and what memory alone does."""
    load, prefill = short(disk.load_tokens_per_second), short(disk.prefill_tokens_per_second)
    yield "disk", f"{short(disk.read_bytes_per_second)}B/s give {load} tokens/s; computed are {prefill}"
    without, memory = duration(disk.first_token_without), format_bytes(disk.memory.bytes)
    yield "first token", f"after {without} without a cache, {duration(disk.first_token)} with {memory} of memory alone"


def disk(plan: Plan, disk: DiskPlan) -> Figures:
    """Return the price of every share, in memory alone and with a disk, and when the first token comes."""
    heads = ("share", "hit ratio", "disk", "found on it", "first token", "memory instead", "first token")
    rows = [
        [
            Figure(share(price.share), price.share),
            _ratio(price.hit_ratio),
            _bytes(price.disk_bytes) if price.disk_blocks else Figure("none", 0),
            _ratio(price.disk_hit_ratio),
            _seconds(price.first_token),
            _bytes(price.memory_alone.bytes),
            _seconds(price.first_token_memory),
        ]
        for price in disk.prices
    ]
    target = tuple(place for place, price in enumerate(disk.prices) if price.share == plan.target)
    return Figures("Memory with a disk beneath", heads, rows, target)


# Which fleet to order.


def fleet_facts(fleet: FleetPlan) -> Facts:
    """Yield the rates of a replica and of its tiers, and what was asked for."""
    options, prices = fleet.options, fleet.options.prices
    prefill, decode = short(fleet.prefill_tokens_per_second), short(fleet.decode_tokens_per_second)
    pool = format_bytes(fleet.nearest.size.pool_bytes)
    yield "replica", f"{pool} for its pool; computes {prefill} prompt tokens/s, decodes {decode} of one request"
    media = (("RAM", options.host_memory, options.host_read), ("disk", options.disk, options.disk_read))
    tiers = (*media, ("the shared tier", options.shared, options.shared_read))
    rates = [f"{short(rate)}B/s from {name}" for name, sizes, rate in tiers if max(sizes)]
    if rates:
        yield "loads", ", ".join(rates)
    named = (("a replica", prices.replica_hour), ("a GiB of RAM", prices.gib_hour))
    costs = [f"{money(cost)} {what}" for what, cost in (*named, ("a GiB of disk", prices.disk_gib_hour)) if cost]
    if costs:
        yield "prices", f"{', '.join(costs)}, an hour"
    yield "wanted", f"{wanted(options)}; {len(fleet.outcomes)} of {counted(fleet.candidates, 'configuration')} replayed"


def fleets(fleet: FleetPlan) -> Figures:
    """Return what one pool and each fleet finds with the least tiers that were asked for."""
    options = fleet.options
    least = tuple(min(sizes) for sizes in (options.host_memory, options.disk, options.shared))
    heads = ("replicas", "one pool", *options.routings)
    rows = []
    for replicas, pool in zip(sorted(set(options.replicas)), fleet.one_pool, strict=True):
        row = [Figure(count(replicas), replicas), _ratio(pool)]
        for routing in options.routings:
            found = next(
                (each for each in fleet.outcomes if _is(each, replicas, routing, least, options.routings)), None
            )
            row.append(_ratio(found.share) if found else Figure("–", -1.0))
        rows.append(row)
    below = beneath(fleet.outcomes[0].size) if any(least) else "no tiers"
    return Figures(f"Found of the attainable, {below}", heads, rows)


def _is(outcome: FleetOutcome, replicas: int, routing: str, least: tuple[int, ...], routings: tuple[str, ...]) -> bool:
    size = outcome.size
    same = (size.host_bytes, size.disk_bytes, size.shared_bytes) == least and size.replicas == replicas
    return same and (size.routing == routing or replicas == 1 and size.routing == routings[0])


def _fleet(size: FleetSize) -> str:
    return f"{size.replicas} x {size.routing}" if size.replicas > 1 else "1 replica"


def configurations(fleet: FleetPlan) -> Figures:
    """Return the cheapest configurations that were replayed, the one to order and the nearest among them."""
    shown = list(fleet.outcomes[:MOST_ROWS])
    if fleet.nearest not in shown:
        shown[-1] = fleet.nearest
    priced, refused = fleet.options.prices.are_given, any(each.refused for each in shown)
    heads = ["fleet", "beneath the pool", "of attainable", "TTFT p50", "p99", "waits", "busy"]
    heads += ["refused"] * refused + ["an hour"] * priced
    rows = [
        [
            Figure(_fleet(each.size), each.size.replicas),
            Figure(beneath(each.size) or "nothing"),
            _ratio(each.share),
            *(_seconds(value) for value in (each.ttft_p50, each.ttft_p99, each.queueing)),
            _ratio(each.utilisation),
            *([Figure(count(each.refused), each.refused)] * refused),
            *([Figure(money(each.cost), each.cost)] * priced),
        ]
        for each in shown
    ]
    strong = (shown.index(fleet.nearest),)
    left = len(fleet.outcomes) - len(shown)
    title = "Replayed, the cheapest first" + (f"; {left} more in --json" if left > 0 else "")
    return Figures(title, tuple(heads), rows, strong)
