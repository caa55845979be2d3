"""What ``pagedkv plan`` shows: one screen, or one JSON object."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagedkv.sim.plan_verdict import format_bytes

if TYPE_CHECKING:
    from pagedkv.sim.model_shape import ModelShape
    from pagedkv.sim.plan_types import Level, Line, Memory, Plan, Size

__all__ = ["plan_facts", "print_json", "print_screen"]

_COLORS = {"nothing": "yellow", "capacity": "cyan", "strategy": "magenta", "enough": "green"}
_OPTIMAL = "optimal"
_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_FLOP_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def print_json(plan: Plan) -> None:
    """Write the plan to stdout as one line of JSON."""
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(plan_facts(plan)) + b"\n")
    sys.stdout.buffer.flush()


def print_screen(plan: Plan, console: Console) -> None:
    """Show the plan."""
    _print_pairs(console, _given(plan))
    if plan.levels:
        console.print()
        console.print(_level_table(plan))
    if plan.memory:
        console.print()
        console.print(_memory_table(plan, plan.memory))
    console.print()
    _print_pairs(console, _around(plan))
    console.print()
    console.print(
        Panel(Text(plan.verdict.text), title="verdict", title_align="left", border_style=_COLORS[plan.verdict.kind])
    )


def _print_pairs(console: Console, pairs: Iterator[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, Text(value))
    console.print(table)


def _given(plan: Plan) -> Iterator[tuple[str, str]]:
    yield (
        "trace",
        (
            f"{plan.trace_name}: {plan.requests:,} requests in {_duration(plan.span_seconds)}, "
            f"{_count(plan.tokens)} prompt tokens, {plan.distinct_blocks:,} blocks of {plan.block_tokens} tokens"
        ),
    )
    yield "model", _model(plan.model)
    size = f"{format_bytes(plan.model.bytes_per_token)} per token, {format_bytes(plan.bytes_per_block)} per block"
    if plan.model.window_bytes_per_sequence:
        size += f", and {format_bytes(plan.model.window_bytes_per_sequence)} for the windows of a running request"
    yield "KV cache", f"{size}, in {plan.model.kv_dtype}"
    yield (
        "attainable",
        (
            f"{plan.attainable:.1%} of the blocks, {plan.attainable_tokens:.1%} of the prompt tokens: "
            "what a cache without a limit finds"
        ),
    )


def _model(model: ModelShape) -> str:
    parts = [f"{model.num_layers_of('full')} full"]
    parts += [f"{count} {word}" for word, count in _other_layers(model) if count]
    layers = f"{model.num_layers} layers" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
    weights = f"{_count(model.parameters.total)} parameters"
    if model.parameters.active != model.parameters.total:
        weights += f", {_count(model.parameters.active)} active"
    return f"{model.name}: {layers}, {weights}"


def _other_layers(model: ModelShape) -> tuple[tuple[str, int], ...]:
    return ("windowed", model.num_layers_of("window")), ("without attention", model.num_layers_of("none"))


def _level_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Memory for a share of that", title_justify="left")
    table.add_column("share", justify="right")
    for name in ("hit ratio", "LRU", "best strategy", "the optimum", "prefill saved"):
        table.add_column(name, justify="right")
    for level in plan.levels:
        is_target = level is plan.at_target
        table.add_row(
            f"{'> ' if is_target else ''}{_percent(level.share)}",
            f"{level.share * plan.attainable:.1%}",
            format_bytes(level.lru.bytes),
            f"{format_bytes(level.best.bytes)} {level.best.strategy}",
            format_bytes(level.optimum.bytes),
            _saved(level.best),
            style="bold" if is_target else None,
        )
    return table


def _memory_table(plan: Plan, memory: Memory) -> Table:
    tokens = _count(memory.blocks * plan.block_tokens)
    title = f"With {format_bytes(memory.bytes)}: {memory.blocks:,} blocks, {tokens} tokens"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("strategy")
    for name in ("hit ratio", "by token", "of attainable", "prefill saved"):
        table.add_column(name, justify="right")
    for size in (memory.optimum, *memory.all):
        table.add_row(
            "the optimum" if size.strategy == _OPTIMAL else size.strategy,
            f"{size.hit_ratio:.1%}",
            f"{size.token_hit_ratio:.1%}",
            f"{size.share:.1%}",
            _saved(size),
            style="dim" if size.strategy == _OPTIMAL else "bold" if size is memory.best else None,
        )
    return table


def _around(plan: Plan) -> Iterator[tuple[str, str]]:
    rate = plan.hardware
    yield (
        "prefill",
        (
            f"{_flops(plan.prefill_flops)} without a cache, {_duration(plan.prefill_seconds)} at "
            f"{rate.tflops:g} TFLOP/s × {rate.mfu:g}"
        ),
    )
    load = plan.load
    if plan.at_target:
        left = load.prefill_load - load.prefill_load_saved
        yield (
            "replicas",
            f"{load.prefill_load:.2f} kept busy by prefill, {left:.2f} at {_percent(plan.target)} of the attainable",
        )
    counted = "" if load.shared else ", shared ones counted for each"
    yield (
        "running",
        (
            f"{load.mean_requests:,.1f} requests at a time, {load.peak_requests:,} at the peak; they alone hold "
            f"{load.mean_blocks:,.0f} blocks, {load.peak_blocks:,} at the peak "
            f"({format_bytes(load.peak_blocks * plan.bytes_per_block + load.window_bytes)}){counted}"
        ),
    )
    if plan.knee:
        yield "knee of LRU", f"{format_bytes(plan.knee.bytes)} for {plan.knee.share:.0%} of the attainable"
    for note in plan.notes:
        yield "note", note


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values, for JSON."""
    model, load, verdict = plan.model, plan.load, plan.verdict
    return {
        "trace": {
            "name": plan.trace_name,
            "format": plan.trace_format,
            "requests": plan.requests,
            "accesses": plan.accesses,
            "distinct_blocks": plan.distinct_blocks,
            "tokens": plan.tokens,
            "span_seconds": plan.span_seconds,
            "block_tokens": plan.block_tokens,
        },
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "kv_dtype": model.kv_dtype,
            "layers": {kind: model.num_layers_of(kind) for kind in ("full", "window", "none")},
            "bytes_per_token": model.bytes_per_token,
            "bytes_per_token_all_layers": model.bytes_per_token_all_layers,
            "window_bytes_per_sequence": model.window_bytes_per_sequence,
            "bytes_per_block": plan.bytes_per_block,
            "parameters": model.parameters.total,
            "active_parameters": model.parameters.active,
        },
        "hardware": msgspec.to_builtins(plan.hardware),
        "target": plan.target,
        "attainable": plan.attainable,
        "attainable_tokens": plan.attainable_tokens,
        "attainable_blocks": plan.attainable_blocks,
        "prefill_flops": plan.prefill_flops,
        "prefill_seconds": plan.prefill_seconds,
        "levels": [_level_facts(level) for level in plan.levels],
        "at_target": _level_facts(plan.at_target) if plan.at_target else None,
        "knee": _size_facts(plan.knee) if plan.knee else None,
        "memory": _memory_facts(plan.memory) if plan.memory else None,
        "load": msgspec.to_builtins(load),
        "verdict": msgspec.to_builtins(verdict),
        "strategies": list(plan.strategies),
        "notes": list(plan.notes),
        "curves": [_line_facts(line) for line in plan.lines],
    }


def _level_facts(level: Level) -> dict[str, Any]:
    sizes = {name: _size_facts(getattr(level, name)) for name in ("lru", "best", "optimum")}
    return {"share": level.share, **sizes}


def _memory_facts(memory: Memory) -> dict[str, Any]:
    sizes = {name: _size_facts(getattr(memory, name)) for name in ("lru", "best", "optimum")}
    return {"bytes": memory.bytes, "blocks": memory.blocks, **sizes, "all": [_size_facts(size) for size in memory.all]}


def _size_facts(size: Size) -> dict[str, Any]:
    return {**msgspec.to_builtins(size), "gib": size.gib}


def _line_facts(line: Line) -> dict[str, Any]:
    arrays = {name: getattr(line, name).tolist() for name in ("blocks", "bytes", "hit_ratio", "token_hit_ratio")}
    return {"strategy": line.name, **arrays}


def _saved(size: Size) -> str:
    return f"{_flops(size.flops_saved)}, {_duration(size.seconds_saved)}"


def _percent(share: float) -> str:
    return f"{share * 100:.4g}%"


def _flops(count: float) -> str:
    return f"{_scaled(count, _FLOP_UNITS)}FLOP"


def _count(count: float) -> str:
    return _scaled(count, _COUNT_UNITS).rstrip()


def _scaled(count: float, units: tuple[tuple[float, str], ...]) -> str:
    """Return a number with three digits and the letter of its unit."""
    size, letter = next(((size, letter) for size, letter in units if count >= size), (1.0, ""))
    return f"{count / size:.3g} {letter}" if count < 1e3 * units[0][0] else f"{count:.2e} "


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
