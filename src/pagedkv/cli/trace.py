"""The options of ``pagedkv trace describe`` and ``pagedkv trace synth``. What they need is imported when they run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from pagedkv.cli.terminal import Failure, failures_in_one_line, library_notices, notes, output

if TYPE_CHECKING:
    from pagedkv.sim.trace import Trace
    from pagedkv.sim.trace_stats import ContentFigures, Description, Figures


app = typer.Typer(
    help="Look at traces of requests, or make them up.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DESCRIBE = """Say what a trace is like: lengths, attainable hits, working sets, reuse gaps.

[bold]Examples[/bold]

  pagedkv trace describe trace.jsonl.gz

  pagedkv trace describe sessions/ --format weka --json

A hit is a block of a request's longest prefix that was seen before: what a cache without a limit finds.
"""
_SYNTH = """Make up a trace from stated parameters and a seed, and write it as Mooncake JSONL.

[bold]Examples[/bold]

  pagedkv trace synth chat -o chat.jsonl.gz

  pagedkv trace synth agents -n 50000 --seed 7 -o agents.jsonl

  pagedkv trace synth rag --set documents=5000 -o rag.jsonl

[bold]Kinds[/bold]

  chat    sessions of several turns behind popular system prompts

  agents  long tool-calling sessions, sub-agents, idle gaps, compaction

  rag     an instruction, then popular documents in random order

  mixed   the three at once

The same arguments write the same file, byte for byte.
"""
_TRAFFIC, _OUTPUT = "The traffic", "What to show"

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class _WithParameters(TyperCommand):
    """A command whose help ends with what ``--set`` can change, and the values of each kind."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        pass

        super().format_help(ctx, formatter)
        print_parameters()


@app.command(help=_DESCRIBE)
def describe(
    trace: Annotated[Path, typer.Argument(help="A trace in any known format, gzipped or not.", show_default=False)],
    format: Annotated[
        str | None, typer.Option("--format", help="The format of the trace.", show_default="recognised")
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option("--block-tokens", help="Tokens per block.", show_default="what the format says")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken lines and go on without them.")] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        pass

        print_description(trace, format=format, block_tokens=block_tokens, skip_bad=skip_bad, as_json=json)


@app.command(help=_SYNTH, cls=_WithParameters)
def synth(
    kind: Annotated[str, typer.Argument(help="chat, agents, rag or mixed.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The file; packed where it ends in .gz.", show_default=False),
    ],
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", help="How many requests.", show_default="10000")
    ] = None,
    accesses: Annotated[
        int | None,
        typer.Option(
            "--accesses", help="Stop with the request that reaches so many block accesses.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests per second in the long run.", show_default="by kind")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed writes the same trace.")] = 0,
    block_tokens: Annotated[int, typer.Option("--block-tokens", help="Tokens per block.")] = 512,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: a parameter below; may be repeated.", show_default=False),
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        pass

        write_synthetic(
            kind,
            output,
            requests=requests,
            accesses=accesses,
            rate=rate,
            seed=seed,
            block_tokens=block_tokens,
            parameters=parameters or [],
            as_json=json,
        )


# ``pagedkv trace describe``: the figures of a trace as a screen, or as JSON.

_BAR = 24
_NO_HITS = "this format gives lengths only; hits, working sets and reuse need content (block ids or token ids)"


def print_description(
    path: Path, *, format: str | None, block_tokens: int | None, skip_bad: bool, as_json: bool
) -> None:
    """Read a trace, describe it, and print that to stdout.

    Raises
    ------
    PagedKvError
        When the trace cannot be read or an option is wrong.
    """
    from pagedkv.sim.trace_stats import describe

    console = notes()
    with library_notices(console):
        trace = _read(path, format, block_tokens, skip_bad, console)
        description = describe(trace)
    if as_json:
        sys.stdout.flush()
        sys.stdout.buffer.write(msgspec.json.encode(description) + b"\n")
        sys.stdout.buffer.flush()
    else:
        show(description, output())


def _read(path: Path, format: str | None, block_tokens: int | None, skip_bad: bool, console: Console) -> Trace:
    from pagedkv.sim.reading import read_trace

    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show_progress(done: int, whole: int) -> None:
            bar.update(task, completed=done, total=whole or None)

        return read_trace(path, format=format, block_tokens=block_tokens, skip_bad=skip_bad, progress=show_progress)


def show(description: Description, console: Console) -> None:
    """Print the screen."""
    title = Text(description.name, style="bold")
    title.append(f"  {description.format}, blocks of {description.block_tokens:,} tokens", style="dim")
    console.print(title, soft_wrap=True)
    console.print()
    console.print(_facts(_overview(description)))
    rows = [("input tokens", description.input_tokens), ("output tokens", description.output_tokens)]
    _section(console, "Lengths", _distributions(rows))
    if description.content is None:
        console.print()
        console.print(Text(_NO_HITS, style="yellow"))
        return
    _show_content(description.content, description, console)


def _overview(description: Description) -> Iterator[tuple[str, str]]:
    span = description.span_seconds
    pace = f", {description.requests / span:,.3g} a second" if span else ""
    yield "requests", f"{description.requests:,} in {_time(span)}{pace}"
    yield "sessions", "not named" if description.sessions is None else f"{description.sessions:,}"
    yield "tokens", f"{description.total_input_tokens:,} in, {description.total_output_tokens:,} out"
    if description.num_skipped:
        yield "bad lines", f"{description.num_skipped:,}, skipped"
    if description.num_reordered:
        yield "out of order", f"{description.num_reordered:,} of the requests, sorted by time"


def _show_content(content: ContentFigures, description: Description, console: Console) -> None:
    of_tokens = f"{content.hit_tokens:,} of {description.total_input_tokens:,} input tokens"
    facts = [
        ("hit ratio by block", f"{content.hit_ratio:.1%}  {content.hit_blocks:,} of {content.accesses:,} accesses"),
        ("hit ratio by token", f"{content.token_hit_ratio:.1%}  {of_tokens}"),
        ("different blocks", f"{content.distinct_blocks:,}, {content.used_once:.1%} of them used once"),
    ]
    _section(console, "With a cache without a limit", _facts(facts))
    _section(console, "Working set (different blocks touched)", _working_sets(content))
    gaps = [("seconds", content.gap_seconds), ("blocks accessed", content.gap_accesses)]
    _section(console, "From one use of a block to its next", _distributions(gaps))
    _section(console, "Hits by depth", _depths(content, console.encoding))
    if content.hottest:
        _section(console, "Hottest prefixes", _hottest(content))


def _section(console: Console, title: str, body: Table) -> None:
    console.print()
    console.print(Text(title, style="bold"))
    console.print(Padding(body, (0, 0, 0, 2), expand=False))


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _columns(*names: str) -> Table:
    """Return a table with a name on the left and figures on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(names[0], style="dim")
    for name in names[1:]:
        table.add_column(name, justify="right")
    return table


def _distributions(rows: list[tuple[str, Figures]]) -> Table:
    table = _columns("", "mean", "p50", "p90", "p99", "max")
    for name, figures in rows:
        values = (figures.mean, figures.p50, figures.p90, figures.p99, figures.maximum)
        table.add_row(name, *(_number(value) for value in values))
    return table


def _working_sets(content: ContentFigures) -> Table:
    table = _columns("window", "windows", "mean", "max")
    for one in content.working_sets:
        table.add_row(_time(one.seconds), f"{one.windows:,}", _number(one.mean), f"{one.maximum:,}")
    return table


def _depths(content: ContentFigures, encoding: str) -> Table:
    full = "█" if encoding.lower().startswith("utf") else "#"
    table = _columns("blocks", "hit ratio", "hits", "accesses")
    table.add_column(no_wrap=True)
    for first, last in _doublings(len(content.depth_accesses)):
        hits, accesses = sum(content.depth_hits[first:last]), sum(content.depth_accesses[first:last])
        name = f"{first + 1:,}" if last == first + 1 else f"{first + 1:,} - {last:,}"
        ratio = hits / accesses
        table.add_row(name, f"{ratio:.1%}", f"{hits:,}", f"{accesses:,}", full * round(ratio * _BAR))
    return table


def _doublings(length: int) -> Iterator[tuple[int, int]]:
    """Cut 0 … length into ranges of 1, 1, 2, 4, 8, …"""
    first, last = 0, 1
    while first < length:
        yield first, min(last, length)
        first, last = last, 2 * last


def _hottest(content: ContentFigures) -> Table:
    table = _columns("", "requests", "blocks", "tokens")
    for rank, prefix in enumerate(content.hottest, 1):
        table.add_row(f"{rank}", f"{prefix.requests:,}", f"{prefix.blocks:,}", f"{prefix.tokens:,}")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:,.3g} s"


# ``pagedkv trace synth``: make up a trace and write it.


class Written(msgspec.Struct):
    """What ``pagedkv trace synth --json`` prints.

    Attributes
    ----------
    path, kind : str
    seed, block_tokens : int
    requests, sessions, accesses, distinct_blocks : int
    span_seconds : float
    """

    path: str
    kind: str
    seed: int
    block_tokens: int
    requests: int
    sessions: int
    accesses: int
    distinct_blocks: int
    span_seconds: float


def write_synthetic(
    kind: str,
    path: Path,
    *,
    requests: int | None,
    accesses: int | None,
    rate: float | None,
    seed: int,
    block_tokens: int,
    parameters: list[str],
    as_json: bool,
) -> None:
    """Write the trace and say what it holds: on stderr, or as JSON on stdout.

    Raises
    ------
    PagedKvError
        For a wrong option, or a file that cannot be written.
    """
    from pagedkv.sim.synth import synthesize
    from pagedkv.sim.trace import write_trace
    from pagedkv.sim.traffic import Traffic

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise Failure(f"--output: expected a file in a folder that exists, got {path}")
    names = [field.name for field in fields(Traffic) if field.name != "rate"]
    changes = dict(_parameter(text, names) for text in parameters)
    console = notes()
    with library_notices(console):
        trace = synthesize(
            kind,
            requests=requests,
            accesses=accesses,
            rate=rate,
            seed=seed,
            block_tokens=block_tokens,
            **changes,
        )
    try:
        write_trace(trace, path)
    except OSError as error:
        raise Failure(f"--output {path} cannot be written: {error.strerror or error}") from error
    written = Written(
        path=str(path),
        kind=kind,
        seed=seed,
        block_tokens=block_tokens,
        requests=trace.num_requests,
        sessions=int(trace.sessions.max()) + 1,
        accesses=trace.num_accesses,
        distinct_blocks=trace.num_distinct,
        span_seconds=float(trace.times[-1]),
    )
    if as_json:
        sys.stdout.write(msgspec.json.encode(written).decode() + "\n")
        return
    console.print(
        f"{path}: {written.requests:,} requests of {written.sessions:,} sessions, {written.accesses:,} block accesses, "
        f"{written.distinct_blocks:,} different blocks of {block_tokens} tokens",
        style="dim",
        soft_wrap=True,
        markup=False,
    )


def _parameter(text: str, names: list[str]) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise Failure(f"--set: expected NAME=VALUE, got {text!r}")
    if name not in names:
        raise Failure(f"--set: expected one of {', '.join(names)}, got {name!r}")
    try:
        number = float(value)
    except ValueError:
        raise Failure(f"--set {name}: expected a number, got {value!r}") from None
    return name, int(number) if number.is_integer() else number


# The parameters of synthetic traffic, as a table under the help of ``pagedkv trace synth``.

MEANINGS = {
    "rate": "requests per second",
    "turns": "mean requests a session",
    "turns_spread": "its spread",
    "think_seconds": "median pause",
    "think_spread": "",
    "idle_share": "share of long pauses",
    "idle_seconds": "median long pause",
    "common_tokens": "before every prompt",
    "system_prompts": "different system prompts",
    "system_zipf": "their popularity",
    "system_tokens": "median that one adds",
    "system_spread": "",
    "first_tokens": "median first message",
    "first_spread": "",
    "message_tokens": "median later message",
    "message_spread": "",
    "output_tokens": "median answer",
    "output_spread": "",
    "max_tokens": "the longest input",
    "summary_tokens": "median after compaction",
    "documents": "different documents",
    "document_zipf": "their popularity",
    "document_tokens": "median of one",
    "document_spread": "",
    "documents_per_request": "in the first request",
    "subagent_share": "share that starts agents",
    "subagents": "most side by side",
    "subagent_turns": "mean requests of one",
}
"""What every field of `Traffic` means, in a few words."""
_SPREAD = "its spread"


def print_parameters() -> None:
    """Print name, meaning and the value of each kind; ``mixed`` takes those of the three."""
    from pagedkv.sim.traffic import TRAFFIC, Traffic

    table = Table(title="Parameters for --set", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("name")
    table.add_column("meaning", style="dim")
    for kind in TRAFFIC:
        table.add_column(kind, justify="right")
    for field in fields(Traffic):
        name = "(--rate)" if field.name == "rate" else field.name
        values = [getattr(traffic, field.name) for traffic in TRAFFIC.values()]
        table.add_row(name, MEANINGS[field.name] or _SPREAD, *(f"{value:,g}" for value in values))
    output().print(table)
    output().print(
        "Draws are log-normal around the median, a spread is the standard deviation of the logarithm.\n"
        "Popularity is a power law with this exponent. max_tokens ends a session, or with summary_tokens compacts it.",
        style="dim",
    )
