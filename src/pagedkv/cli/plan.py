"""``pagedkv plan``: the KV cache that some traffic needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from pagedkv.cli.replay_options import fleets_of, require_strategies, split_names
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
from pagedkv.typing import DtypeName
from pagedkv.validate import require_number, require_size

if TYPE_CHECKING:
    from pagedkv.sim.plan_figures import Figures
    from pagedkv.sim.plan_types import Plan


def parse_size(option: str, text: str) -> int:
    """Return the bytes that ``"40GiB"`` (2³⁰) or ``"80GB"`` (10⁹) stands for; `Failure` where it is no size."""
    try:
        return require_size(option, text)
    except InvalidOperation as error:
        raise Failure(error.reason) from None


def parse_rate(option: str, text: str, measure: Callable[[Path], float] | None = None) -> float:
    """Return the bytes per second that ``"1.0GB/s"`` stands for, or at which the disk of a folder is measured."""
    size, slash, unit = text.rpartition("/")
    if slash and unit.strip().lower() == "s":
        with suppress(InvalidOperation):
            return require_size(option, size)
    if measure is None:
        raise Failure(f"{option}: expected a rate such as 1.0GB/s, got {text!r}")
    if not Path(text).is_dir():
        raise Failure(f"{option}: expected a rate such as 1.0GB/s, or a folder on the disk to measure, got {text!r}")
    try:
        return measure(Path(text))
    except OSError as error:
        raise Failure(f"{option}: {text} cannot be measured: {error.strerror or error}") from None


def parse_sizes(option: str, text: str) -> tuple[int, ...]:
    """Return the bytes that ``"0,60GiB,1TB"`` stands for."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise Failure(f"{option}: expected sizes such as 0,60GiB, got {text!r}")
    return tuple(dict.fromkeys(0 if part == "0" else parse_size(option, part) for part in parts))


_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_seconds(option: str, text: str) -> float:
    """Return the seconds that ``"2s"`` or ``"500ms"`` stands for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min)", text.strip())
    if match is None or not float(match[1]):
        raise Failure(f"{option}: expected a time such as 2s or 500ms, got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


# The options of ``pagedkv plan``. What the command needs is imported when it runs.

EXAMPLES = """Say how much KV cache a model needs for real traffic, what it saves, and what holds it back.

[bold]Examples[/bold]

  pagedkv plan trace.jsonl.gz --model llama-3.1-8b

  pagedkv plan trace.jsonl.gz --model ./my-model --target 0.95 --memory 40GiB

  pagedkv plan trace.jsonl --model qwen3-8b --kv-dtype fp8 --strategies lru,s3fifo --html plan.html

  pagedkv plan trace.jsonl --model config.json --tflops 990 --mfu 0.4 --json

  pagedkv plan trace.jsonl.gz --model ./my-model --memory 8GiB --disk-read 1.0GB/s --prefill-rate 700

  pagedkv plan trace.jsonl.gz --model qwen3-32b --gpu h200 --replicas 1,2,4,8 --disk 0,1TB --ttft-p99 2s

The model is a config.json, a folder with one, JSON text, a model of the local hub cache, or the name of a known shape;
no weights are read.
"""

_WHAT, _MODEL, _RATE, _FLEET = "What to plan", "The model", "The hardware", "Several replicas"


def plan(
    context: typer.Context,
    trace: TraceArgument,
    model: Annotated[
        str,
        option(
            "--model", "-m", help="A config.json, its folder, JSON text, or a known name.", panel=_MODEL, default=False
        ),
    ],
    target: Annotated[
        float | None,
        option(
            "--target",
            "-t",
            help="Share wanted of the hits that a cache without a limit has.",
            default="0.9",
            panel=_WHAT,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        option(
            "--memory",
            help="Also say what this much gives: 40GiB, 80GB; of one replica.",
            default="that of --gpu",
            panel=_WHAT,
        ),
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
    gpu: Annotated[
        str | None,
        option(
            "--gpu", help="Of which a replica is made, h100 say: memory and rates follow.", default=False, panel=_RATE
        ),
    ] = None,
    gpus_per_replica: Annotated[int, option("--gpus-per-replica", help="How many share the weights.", panel=_RATE)] = 1,
    weight_bits: Annotated[int, option("--weight-bits", help="Of a weight: 8 for fp8, 4 for int4.", panel=_RATE)] = 16,
    gpu_memory_share: Annotated[
        float, option("--gpu-memory-share", help="Of a GPU's memory, for weights and pool.", panel=_RATE)
    ] = 0.9,
    tflops: Annotated[
        float | None,
        option("--tflops", help="Peak rate of a replica, 10¹² FLOP/s.", default="400, or that of --gpu", panel=_RATE),
    ] = None,
    mfu: Annotated[float, option("--mfu", help="Share of the peak that prefill reaches.", panel=_RATE)] = 0.5,
    decode_tokens_per_second: Annotated[
        float | None,
        option(
            "--decode-rate", help="New tokens per second of a request.", default="50, or that of --gpu", panel=_RATE
        ),
    ] = None,
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
    replicas: Annotated[
        str | None,
        option("--replicas", help="Also plan a fleet, of so many: 1,2,4,8.", default=False, panel=_FLEET),
    ] = None,
    routing: Annotated[
        str, option("--routing", help="Policies, as for replay; names or module:Class.", panel=_FLEET)
    ] = "round_robin,sticky,prefix",
    host_memory: Annotated[
        str, option("--host-memory", help="RAM beneath the pool of each replica: 0,60GiB,120GiB.", panel=_FLEET)
    ] = "0",
    disk: Annotated[str, option("--disk", help="Disk beneath that of each replica: 0,1TB.", panel=_FLEET)] = "0",
    shared: Annotated[str, option("--shared", help="One tier for all replicas: 0,500GiB.", panel=_FLEET)] = "0",
    host_read: Annotated[
        str | None,
        option("--host-read", help="Rate at which RAM is loaded.", default="25GB/s, or that of --gpu", panel=_FLEET),
    ] = None,
    shared_read: Annotated[
        str, option("--shared-read", help="Rate at which the shared tier is loaded.", panel=_FLEET)
    ] = "2.5GB/s",
    ttft_p99: Annotated[
        str | None,
        option(
            "--ttft-p99",
            help="Time in which 99 of 100 must have their first token: 2s, 500ms; with --target both are wanted.",
            default=False,
            panel=_FLEET,
        ),
    ] = None,
    price_replica_hour: Annotated[
        float, option("--price-replica-hour", help="Of one replica with its GPUs.", panel=_FLEET)
    ] = 0.0,
    price_gib_hour: Annotated[
        float, option("--price-gib-hour", help="Of a GiB of RAM, or of the shared tier.", panel=_FLEET)
    ] = 0.0,
    price_disk_gib_hour: Annotated[
        float, option("--price-disk-gib-hour", help="Of a GiB of disk.", panel=_FLEET)
    ] = 0.0,
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
        from pagedkv.sim.gpus import read_gpu, replica_on
        from pagedkv.sim.model_shape import read_model
        from pagedkv.sim.plan_types import DISK_READ, HOST_READ, FleetOptions, Hardware, Prices
        from pagedkv.sim.reading import read_trace

        goal = planner.checked_share(0.9 if target is None else target)  # before the trace is read, which takes minutes
        size = None if memory is None else parse_size("--memory", memory)
        names = None if strategies is None else split_names(strategies)
        if names is not None:
            require_strategies(names)
        require_writable("--html", html)
        read_rate = None if disk_read is None else parse_rate("--disk-read", disk_read, measure_read_rate)
        if prefill_rate is not None:
            require_number("prefill_rate", prefill_rate, 0, above=True)
        shape = read_model(model, kv_dtype=cast("DtypeName | None", kv_dtype), window_as_full=window_as_full)
        own = {"tflops": tflops, "decode_tokens_per_second": decode_tokens_per_second}
        stated = {name: value for name, value in own.items() if value is not None}
        hardware, on_gpus = Hardware(mfu=mfu, **stated), None
        if gpu is not None:
            bits, share, count = weight_bits, gpu_memory_share, gpus_per_replica
            on_gpus = replica_on(read_gpu(gpu), shape, count=count, weight_bits=bits, memory_share=share, mfu=mfu)
            hardware = replace(on_gpus.hardware, **stated)
            size = on_gpus.pool_bytes if size is None else size
        fleet = None
        if replicas is not None:
            if size is None:
                raise Failure("--replicas: expected the memory of a replica: --memory 40GiB, or --gpu h100")
            asked = fleets_of(replicas, routing)
            own_link = on_gpus.host_bytes_per_second if on_gpus else HOST_READ
            fleet = FleetOptions(
                replicas=tuple(dict.fromkeys(each.replicas for each in asked)),
                routings=tuple(dict.fromkeys(each.name for each in asked)),
                host_memory=parse_sizes("--host-memory", host_memory),
                disk=parse_sizes("--disk", disk),
                shared=parse_sizes("--shared", shared),
                share=None if target is None and ttft_p99 is not None else goal,
                ttft_p99=None if ttft_p99 is None else parse_seconds("--ttft-p99", ttft_p99),
                prices=Prices(price_replica_hour, price_gib_hour, price_disk_gib_hour),
                host_read=own_link if host_read is None else parse_rate("--host-read", host_read),
                disk_read=DISK_READ if read_rate is None else read_rate,
                shared_read=parse_rate("--shared-read", shared_read),
            )
        console = notes()
        with progress_bar(console) as bar:
            read = read_trace(
                trace, format=format, block_tokens=block_tokens, skip_bad=skip_bad, progress=bar("reading")
            )
            made = planner.plan(
                read,
                shape,
                target=goal,
                memory=size,
                strategies=names,
                hardware=hardware,
                prefill_rate=prefill_rate,
                disk_read=read_rate,
                fleet=fleet,
                jobs=jobs,
                progress=bar("replaying"),
            )
        if on_gpus is not None:
            made = replace(made, notes=(str(on_gpus), *made.notes))
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
    from pagedkv.sim import plan_figures as figures

    console.print(facts_table(figures.given(plan)))
    if plan.levels:
        _print_table(console, figures.levels(plan), marked=True)
    if plan.memory:
        _print_table(console, figures.memory(plan, plan.memory))
    console.print()
    console.print(facts_table([*figures.around(plan), *(("note", note) for note in plan.notes)]))
    console.print()
    console.print(_boxed("verdict", plan.verdict.text, _COLORS[plan.verdict.kind]))
    if plan.disk:
        console.print()
        console.print(facts_table(figures.disk_facts(plan.disk)))
        _print_table(console, figures.disk(plan, plan.disk), marked=True)
        console.print(_boxed("memory or disk", plan.disk.advice))
    if plan.fleet:
        console.print()
        console.print(facts_table(figures.fleet_facts(plan.fleet)))
        _print_table(console, figures.fleets(plan.fleet))
        _print_table(console, figures.configurations(plan.fleet), left=(1,))
        console.print(_boxed("what to order", plan.fleet.verdict, "green" if plan.fleet.best else "magenta"))


def _boxed(title: str, text: str, color: str = "cyan") -> Panel:
    return Panel(Text(text), title=title, title_align="left", border_style=color)


def _print_table(console: Console, figures: Figures, *, marked: bool = False, left: tuple[int, ...] = ()) -> None:
    """Print a table; where `marked`, a sign is set before what stands out."""
    columns = [
        Column(head, justify="left" if place in left or (not place and not marked) else "right")
        for place, head in enumerate(figures.heads)
    ]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, title=figures.title, title_justify="left")
    for place, row in enumerate(figures.rows):
        is_strong = place in figures.strong
        shown = [figure.text for figure in row]
        shown[0] = f"> {shown[0]}" if is_strong and marked else shown[0]
        table.add_row(*shown, style="bold" if is_strong else "dim" if place == figures.faint else None)
    console.print()
    console.print(table)


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
        **({"fleet": _plain(plan.fleet)} if plan.fleet else {}),
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
