"""``pagedkv plan``: the KV cache that some traffic needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from pagedkv.cli.replay_options import require_strategies, split_names
from pagedkv.cli.terminal import (
    BlockTokensOption,
    DebugOption,
    Failure,
    FormatOption,
    HtmlOption,
    JobsOption,
    JsonOption,
    SkipBadOption,
    TraceArgument,
    command_line,
    facts_table,
    failures_in_one_line,
    notes,
    option,
    output,
    print_json,
    progress_bar,
    require_writable,
    write_file,
)
from pagedkv.errors import InvalidOperation
from pagedkv.format import duration, flops, format_bytes, percent, rough_duration, share, short
from pagedkv.sim.baselines import OPTIMAL
from pagedkv.typing import DtypeName
from pagedkv.validate import require_number, require_size

if TYPE_CHECKING:
    from pagedkv.sim.model_shape import ModelShape
    from pagedkv.sim.plan_types import DiskPlan, Memory, Plan, Size


def parse_size(option: str, text: str) -> int:
    """Return the bytes that ``"40GiB"`` (2³⁰) or ``"80GB"`` (10⁹) stands for; `Failure` where it is no size."""
    try:
        return require_size(option, text)
    except InvalidOperation as error:
        raise Failure(error.reason) from None


def parse_rate(option: str, text: str, measure: Callable[[Path], float]) -> float:
    """Return the bytes per second that ``"1.0GB/s"`` stands for, or at which the disk of a folder is measured."""
    size, slash, unit = text.rpartition("/")
    if slash and unit.strip().lower() == "s":
        with suppress(InvalidOperation):
            return require_size(option, size)
    if not Path(text).is_dir():
        raise Failure(f"{option}: expected a rate such as 1.0GB/s, or a folder on the disk to measure, got {text!r}")
    try:
        return measure(Path(text))
    except OSError as error:
        raise Failure(f"{option}: {text} cannot be measured: {error.strerror or error}") from None


# The options of ``pagedkv plan``. What the command needs is imported when it runs.

EXAMPLES = """Say how much KV cache a model needs for real traffic, what it saves, and what holds it back.

[bold]Examples[/bold]

  pagedkv plan trace.jsonl.gz --model llama-3.1-8b

  pagedkv plan trace.jsonl.gz --model ./my-model --target 0.95 --memory 40GiB

  pagedkv plan trace.jsonl --model qwen3-8b --kv-dtype fp8 --strategies lru,s3fifo --html plan.html

  pagedkv plan trace.jsonl --model config.json --tflops 990 --mfu 0.4 --json

  pagedkv plan trace.jsonl.gz --model ./my-model --memory 8GiB --disk-read 1.0GB/s --prefill-rate 700

The model is a config.json, a folder with one, JSON text, or the name of a known shape; no weights are read.
"""

_WHAT, _MODEL, _RATE = "What to plan", "The model", "The hardware"


def plan(
    context: typer.Context,
    trace: TraceArgument,
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
    decode_tokens_per_second: Annotated[
        float, option("--decode-rate", help="New tokens per second of a request.", panel=_RATE)
    ] = 50.0,
    prefill_rate: Annotated[
        float | None,
        option(
            "--prefill-rate",
            "--prefill",
            help="Prompt tokens per second, as measured, in place of the two above.",
            default=False,
            panel=_RATE,
        ),
    ] = None,
    disk_read: Annotated[
        str | None,
        option(
            "--disk-read",
            help="Also price a disk beneath the memory that reads at 1.0GB/s, or as a folder on it is measured to.",
            default=False,
            panel=_RATE,
        ),
    ] = None,
    format: FormatOption = None,
    block_tokens: BlockTokensOption = None,
    skip_bad: SkipBadOption = False,
    jobs: JobsOption = None,
    json: JsonOption = False,
    html: HtmlOption = None,
    debug: DebugOption = False,
) -> None:
    """Read model and trace, make the plan, show it."""
    with failures_in_one_line(debug, context):
        from pagedkv.sim import planner
        from pagedkv.sim.disk_plan import measure_read_rate
        from pagedkv.sim.model_shape import read_model
        from pagedkv.sim.plan_types import Hardware
        from pagedkv.sim.reading import read_trace

        planner.checked_share(target)  # before the trace is read, which may take minutes
        size = None if memory is None else parse_size("--memory", memory)
        names = None if strategies is None else split_names(strategies)
        if names is not None:
            require_strategies(names)
        hardware = Hardware(tflops, mfu, decode_tokens_per_second)
        require_writable("--html", html)
        read_rate = None if disk_read is None else parse_rate("--disk-read", disk_read, measure_read_rate)
        if prefill_rate is not None:
            require_number("prefill_rate", prefill_rate, 0, above=True)
        shape = read_model(model, kv_dtype=cast("DtypeName | None", kv_dtype), window_as_full=window_as_full)
        console = notes()
        with progress_bar(console) as bar:
            read = read_trace(
                trace, format=format, block_tokens=block_tokens, skip_bad=skip_bad, progress=bar("reading")
            )
            made = planner.plan(
                read,
                shape,
                target=target,
                memory=size,
                strategies=names,
                hardware=hardware,
                prefill_rate=prefill_rate,
                disk_read=read_rate,
                jobs=jobs,
                progress=bar("replaying"),
            )
        if read.num_skipped:
            console.print(f"{read.num_skipped:,} broken lines skipped", style="yellow")
        if read.num_reordered:
            console.print(f"{read.num_reordered:,} requests sorted by time", style="yellow")
        if html is not None:
            from pagedkv.sim.report import plan_report

            write_file("--html", html, plan_report(made, read, command=command_line(context)))
        if json:
            print_json(_plan_facts(made))
        else:
            _print_screen(made, output())


# What ``pagedkv plan`` shows: one screen, or one JSON object.

_COLORS = {"nothing": "yellow", "capacity": "cyan", "strategy": "magenta", "enough": "green"}


def _print_screen(plan: Plan, console: Console) -> None:
    """Show the plan."""
    console.print(facts_table(_given(plan)))
    if plan.levels:
        console.print()
        console.print(_level_table(plan))
    if plan.memory:
        console.print()
        console.print(_memory_table(plan, plan.memory))
    console.print()
    console.print(facts_table(_around(plan)))
    console.print()
    console.print(
        Panel(Text(plan.verdict.text), title="verdict", title_align="left", border_style=_COLORS[plan.verdict.kind])
    )
    if plan.disk:
        console.print()
        console.print(facts_table(_disk_facts(plan.disk)))
        console.print()
        console.print(_disk_table(plan, plan.disk))
        console.print(Panel(Text(plan.disk.advice), title="memory or disk", title_align="left", border_style="cyan"))


def _given(plan: Plan) -> Iterator[tuple[str, str]]:
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


def _figures(title: str, *headings: Column | str) -> Table:
    return Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")


def _level_table(plan: Plan) -> Table:
    names = ("share", "hit ratio", "LRU", "best strategy", "the optimum", "prefill saved")
    table = _figures("Memory for a share of that", *(Column(name, justify="right") for name in names))
    for level in plan.levels:
        is_target = level is plan.at_target
        table.add_row(
            f"{'> ' if is_target else ''}{share(level.share)}",
            percent(level.best.hit_ratio),
            format_bytes(level.lru.bytes),
            f"{format_bytes(level.best.bytes)} {level.best.strategy}",
            format_bytes(level.optimum.bytes),
            _saved(level.best),
            style="bold" if is_target else None,
        )
    return table


def _memory_table(plan: Plan, memory: Memory) -> Table:
    tokens = short(memory.blocks * plan.block_tokens, giga="B")
    title = f"With {format_bytes(memory.bytes)}: {memory.blocks:,} blocks, {tokens} tokens"
    names = ("hit ratio", "by token", "of attainable", "prefill saved")
    table = _figures(title, "strategy", *(Column(name, justify="right") for name in names))
    for size in (memory.optimum, *memory.all):
        table.add_row(
            "the optimum" if size.strategy == OPTIMAL else size.strategy,
            percent(size.hit_ratio),
            percent(size.token_hit_ratio),
            percent(size.share),
            _saved(size),
            style="dim" if size.strategy == OPTIMAL else "bold" if size is memory.best else None,
        )
    return table


def _disk_facts(disk: DiskPlan) -> Iterator[tuple[str, str]]:
    load, prefill = short(disk.load_tokens_per_second), short(disk.prefill_tokens_per_second)
    yield "disk", f"{short(disk.read_bytes_per_second)}B/s give {load} tokens/s; computed are {prefill}"
    without, memory = duration(disk.first_token_without), format_bytes(disk.memory.bytes)
    yield "first token", f"after {without} without a cache, {duration(disk.first_token)} with {memory} of memory alone"


def _disk_table(plan: Plan, disk: DiskPlan) -> Table:
    """Lay out the price of every share, in memory alone and with a disk, and when the first token comes."""
    names = ("share", "hit ratio", "disk", "found on it", "first token", "memory instead", "first token")
    table = _figures("Memory with a disk beneath", *(Column(name, justify="right") for name in names))
    for price in disk.prices:
        is_target = price.share == plan.target
        table.add_row(
            f"{'> ' if is_target else ''}{share(price.share)}",
            percent(price.hit_ratio),
            format_bytes(price.disk_bytes) if price.disk_blocks else "none",
            percent(price.disk_hit_ratio),
            duration(price.first_token),
            format_bytes(price.memory_alone.bytes),
            duration(price.first_token_memory),
            style="bold" if is_target else None,
        )
    return table


def _around(plan: Plan) -> Iterator[tuple[str, str]]:
    load, rate = plan.load, f"{plan.hardware.tflops:g} TFLOP/s × {plan.hardware.mfu:g}"
    yield "prefill", f"{flops(plan.prefill_flops)} without a cache, {duration(plan.prefill_seconds)} at {rate}"
    if plan.at_target:
        left = load.prefill_load - load.prefill_load_saved
        busy = f"{load.prefill_load:.2f} kept busy by prefill"
        yield "replicas", f"{busy}, {left:.2f} at {share(plan.target)} of the attainable"
    size = format_bytes(load.peak_blocks * plan.bytes_per_block + load.window_bytes)
    requests = f"{load.mean_requests:,.1f} requests at a time, {load.peak_requests:,} at the peak"
    blocks = f"{load.mean_blocks:,.0f} blocks, {load.peak_blocks:,} at the peak ({size})"
    counted = "" if load.shared else ", shared ones counted for each"
    yield "running", f"{requests}; they alone hold {blocks}{counted}"
    if plan.knee:
        yield "knee of LRU", f"{format_bytes(plan.knee.bytes)} for {percent(plan.knee.share)} of the attainable"
    for note in plan.notes:
        yield "note", note


_TOLD_AS_IT_IS = (
    *("hardware", "target", "attainable", "attainable_tokens", "attainable_blocks", "prefill_flops", "prefill_seconds"),
    *("levels", "at_target", "knee", "memory", "load", "verdict", "strategies", "notes"),
)


def _plan_facts(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values, for JSON."""
    model = plan.model
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
            "state_bytes_per_sequence": model.state_bytes_per_sequence,
            "bytes_per_block": plan.bytes_per_block,
            "parameters": model.parameters.total,
            "active_parameters": model.parameters.active,
        },
        **{name: _plain(getattr(plan, name)) for name in _TOLD_AS_IT_IS},
        **({"disk": _plain(plan.disk)} if plan.disk else {}),
        "curves": [
            {
                "strategy": line.name,
                "blocks": line.blocks.tolist(),
                "bytes": line.bytes.tolist(),
                "hit_ratio": line.hit_ratio.tolist(),
                "token_hit_ratio": line.token_hit_ratio.tolist(),
            }
            for line in plan.lines
        ],
    }


def _plain(value: Any) -> Any:
    """Return a part of a plan as JSON has it; a size tells its GiB, too."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if not is_dataclass(value):
        return value
    facts = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return facts | {"gib": value.gib} if hasattr(value, "gib") else facts


def _saved(size: Size) -> str:
    return f"{flops(size.flops_saved)}, {rough_duration(size.seconds_saved)}"
