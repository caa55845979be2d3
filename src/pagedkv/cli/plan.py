"""``pagedkv plan``: how much KV cache does this traffic need?"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagedkv.cli.terminal import Failure, failures_in_one_line, library_notices, notes, option, output
from pagedkv.format import format_bytes

if TYPE_CHECKING:
    from pagedkv.sim.model_shape import ModelShape
    from pagedkv.sim.plan_types import Hardware, Level, Line, Memory, Plan, Size
    from pagedkv.sim.trace import Trace


_UNITS = {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgtp", start=1)}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgtp", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]i?b)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class PlanRequest:
    """What was asked for, as it was typed; the options tell what each means."""

    trace: Path
    model: str
    target: float = 0.9
    memory: str | None = None
    strategies: str | None = None
    kv_dtype: str | None = None
    window_as_full: bool = False
    tflops: float = 400.0
    mfu: float = 0.5
    decode_rate: float = 50.0
    format: str | None = None
    block_tokens: int | None = None
    skip_bad: bool = False
    jobs: int | None = None
    json: bool = False
    html: Path | None = None


def run(request: PlanRequest) -> None:
    """Read model and trace, make the plan, show it.

    Raises
    ------
    PagedKvError
        Whatever is wrong with the options, the model, the trace, or a strategy.
    """
    pass
    from pagedkv.sim.model_shape import read_model
    from pagedkv.sim.planner import plan
    from pagedkv.sim.reading import read_trace

    if not 0 < request.target <= 1:
        raise Failure(
            f"--target: expected a share of the attainable hits above 0 and at most 1, 0.9 is 90%; "
            f"got {request.target:g}"
        )
    memory = None if request.memory is None else parse_size("--memory", request.memory)
    strategies, hardware = _strategies(request.strategies), _hardware(request)
    if request.html is not None and (request.html.is_dir() or not request.html.absolute().parent.is_dir()):
        raise Failure(f"--html: expected a file in a folder that exists, got {request.html}")
    model = read_model(request.model, kv_dtype=request.kv_dtype, window_as_full=request.window_as_full)
    console = notes()
    with library_notices(console), console.status("reading the trace") as status:
        trace = read_trace(
            request.trace, format=request.format, block_tokens=request.block_tokens, skip_bad=request.skip_bad
        )
        made = plan(
            trace,
            model,
            target=request.target,
            memory=memory,
            strategies=strategies,
            hardware=hardware,
            jobs=request.jobs,
            progress=lambda done, asked: status.update(f"replaying {done:,} of {asked:,}"),
        )
    for count, what in ((trace.num_skipped, "broken lines skipped"), (trace.num_reordered, "requests sorted by time")):
        if count:
            console.print(f"{count:,} {what}", style="yellow")
    if request.html is not None:
        _write_report(request, made, trace)
    if request.json:
        print_json(made)
    else:
        print_screen(made, output())


def parse_size(option: str, text: str) -> int:
    """Return the bytes that ``"40GiB"`` (2³⁰) or ``"80GB"`` (10⁹) stands for.

    Raises
    ------
    Failure
        It is no size.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match and len(match[1]) < 20 else 0
    if not 0 < size < 2**62:
        raise Failure(f"{option}: expected a size such as 40GiB or 80GB, got {text[:40]!r}")
    return size


def _strategies(text: str | None) -> list[str] | None:
    from pagedkv.cli.replay import search_folder_at_hand, split_names
    from pagedkv.sim.sweeps import named_strategy

    if text is None:
        return None
    names = split_names(text)
    if not names:
        raise Failure(f"--strategies: expected names such as lru,s3fifo, got {text!r}")
    search_folder_at_hand(names)
    for name in names:
        named_strategy(name)
    return names


def _hardware(request: PlanRequest) -> Hardware:
    from pagedkv.sim.plan_types import Hardware

    for flag, value, high in (
        ("--tflops", request.tflops, 1e12),
        ("--mfu", request.mfu, 1.0),
        ("--decode-rate", request.decode_rate, 1e9),
    ):
        if not 0 < value <= high:
            raise Failure(f"{flag}: expected a number above 0 and at most {high:g}, got {value:g}")
    return Hardware(request.tflops, request.mfu, request.decode_rate)


def _write_report(request: PlanRequest, plan: Plan, trace: Trace) -> None:
    from pagedkv.cli.replay import write_file
    from pagedkv.sim.report import plan_report

    words = ["pagedkv", "plan", request.trace.name, "--model", request.model]
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name in ("trace", "model", "jobs", "json", "html") or value == field.default:
            continue
        words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = shlex.join([*words, "--html", str(request.html)])
    write_file("--html", Path(str(request.html)), plan_report(plan, trace, command=command))


# The options of ``pagedkv plan``. What the command needs is imported when it runs.

EXAMPLES = """Say how much KV cache a model needs for real traffic, what it saves, and what holds it back.

[bold]Examples[/bold]

  pagedkv plan trace.jsonl.gz --model llama-3.1-8b

  pagedkv plan trace.jsonl.gz --model ./my-model --target 0.95 --memory 40GiB

  pagedkv plan trace.jsonl --model qwen3-8b --kv-dtype fp8 --strategies lru,s3fifo --html plan.html

  pagedkv plan trace.jsonl --model config.json --tflops 990 --mfu 0.4 --json

The model is a config.json, a folder with one, JSON text, or the name of a known shape; no weights are read.
"""

_WHAT, _MODEL, _TRACE, _RATE, _OUTPUT = "What to plan", "The model", "The trace", "The hardware", "What to show"


def plan(
    trace: Annotated[Path, typer.Argument(help="A trace in any known format, gzipped or not.", show_default=False)],
    model: Annotated[
        str,
        option(
            "--model", "-m", help="A config.json, its folder, JSON text, or a known shape.", panel=_MODEL, default=False
        ),
    ],
    target: Annotated[
        float,
        option("--target", "-t", help="Share wanted of the hits that a cache without a limit has.", panel=_WHAT),
    ] = 0.9,
    memory: Annotated[
        str | None,
        option("--memory", help="Also say what this much gives: 40GiB, 80GB.", default=False, panel=_WHAT),
    ] = None,
    strategies: Annotated[
        str | None,
        option(
            "--strategies",
            "-s",
            help="To compare with LRU and the optimum; names or module:Class.",
            default="all that need no arguments",
            panel=_WHAT,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        option(
            "--kv-dtype",
            help="Element type of the cache: float16, bfloat16, float32, int8, fp8.",
            default="that of the config",
            panel=_MODEL,
        ),
    ] = None,
    window_as_full: Annotated[
        bool,
        option("--window-as-full", help="Count windowed layers as if they kept every token.", panel=_MODEL),
    ] = False,
    tflops: Annotated[float, option("--tflops", help="Peak rate of a replica, 10¹² FLOP/s.", panel=_RATE)] = 400.0,
    mfu: Annotated[float, option("--mfu", help="Share of the peak that prefill reaches.", panel=_RATE)] = 0.5,
    decode_rate: Annotated[
        float, option("--decode-rate", help="New tokens per second of a request.", panel=_RATE)
    ] = 50.0,
    format: Annotated[
        str | None, option("--format", help="The format of the trace.", default="recognised", panel=_TRACE)
    ] = None,
    block_tokens: Annotated[
        int | None,
        option("--block-tokens", help="Tokens per block.", default="what the format says", panel=_TRACE),
    ] = None,
    skip_bad: Annotated[
        bool, option("--skip-bad", help="Count broken lines and go on without them.", panel=_TRACE)
    ] = False,
    jobs: Annotated[
        int | None, option("--jobs", "-j", help="Processes.", default="one a core, if it is worth it", panel=_WHAT)
    ] = None,
    json: Annotated[bool, option("--json", help="Print one JSON object instead.", panel=_OUTPUT)] = False,
    html: Annotated[
        Path | None, option("--html", help="Write a report to this file.", default=False, panel=_OUTPUT)
    ] = None,
    debug: Annotated[bool, option("--debug", help="Show the traceback of an error.", panel=_OUTPUT)] = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        pass

        run(
            PlanRequest(
                trace=trace,
                model=model,
                target=target,
                memory=memory,
                strategies=strategies,
                kv_dtype=kv_dtype,
                window_as_full=window_as_full,
                tflops=tflops,
                mfu=mfu,
                decode_rate=decode_rate,
                format=format,
                block_tokens=block_tokens,
                skip_bad=skip_bad,
                jobs=jobs,
                json=json,
                html=html,
            )
        )


# What ``pagedkv plan`` shows: one screen, or one JSON object.

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
