"""``pagedkv trace``: describe a trace, or write a synthetic one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

from pagedkv.cli.terminal import (
    BlockTokensOption,
    DebugOption,
    Failure,
    FormatOption,
    JsonOption,
    SkipBadOption,
    TraceArgument,
    facts_table,
    failures_in_one_line,
    library_notices,
    notes,
    option,
    output,
    print_json,
    progress_bar,
    require_writable,
)
from pagedkv.format import digits, duration

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


class _WithParameters(TyperCommand):
    """A command whose help ends with what ``--set`` can change, and the values of each kind."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_parameters()


@app.command(help=_DESCRIBE)
def describe(
    context: typer.Context,
    trace: TraceArgument,
    format: FormatOption = None,
    block_tokens: BlockTokensOption = None,
    skip_bad: SkipBadOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read a trace, describe it, and print that to stdout."""
    with failures_in_one_line(debug, context):
        from pagedkv.sim import trace_stats
        from pagedkv.sim.reading import read_trace

        with progress_bar(notes()) as bar:
            read = read_trace(
                trace, format=format, block_tokens=block_tokens, skip_bad=skip_bad, progress=bar("reading")
            )
            description = trace_stats.describe(read)
        if json:
            print_json(description)
        else:
            show(description, output())


@app.command(help=_SYNTH, cls=_WithParameters)
def synth(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="chat, agents, rag or mixed.", show_default=False)],
    path: Annotated[
        Path, option("--output", "-o", help="The file; packed where it ends in .gz.", default=False, panel=_OUTPUT)
    ],
    requests: Annotated[
        int | None, option("--requests", "-n", help="How many requests.", default="10000", panel=_TRAFFIC)
    ] = None,
    accesses: Annotated[
        int | None,
        option(
            "--accesses",
            help="Stop with the request that reaches so many block accesses.",
            default=False,
            panel=_TRAFFIC,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        option("--rate", help="Requests per second in the long run.", default="by kind", panel=_TRAFFIC),
    ] = None,
    seed: Annotated[int, option("--seed", help="The same seed writes the same trace.", panel=_TRAFFIC)] = 0,
    block_tokens: Annotated[int, option("--block-tokens", help="Tokens per block.", panel=_TRAFFIC)] = 512,
    parameters: Annotated[
        list[str] | None,
        option("--set", help="NAME=VALUE: a parameter below; may be repeated.", default=False, panel=_TRAFFIC),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make up the trace, write it, and say what it holds: on stderr, or as JSON on stdout."""
    with failures_in_one_line(debug, context):
        from pagedkv.sim.synth import synthesize
        from pagedkv.sim.trace import write_trace

        require_writable("--output", path)
        changes = dict(map(_parameter, parameters or ()))
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
        written = _written(trace, path, kind, seed)
        if json:
            print_json(written)
        else:
            console.print(_WRITTEN.format(**written), style="dim", soft_wrap=True, markup=False)


# ``pagedkv trace describe``: the figures of a trace as a screen, or as JSON.

_BAR = 24
_NO_HITS = "this format gives lengths only; hits, working sets and reuse need content (block ids or token ids)"


def show(description: Description, console: Console) -> None:
    """Print the screen."""
    title = Text(description.name, style="bold")
    title.append(f"  {description.format}, blocks of {description.block_tokens:,} tokens", style="dim")
    console.print(title, soft_wrap=True)
    console.print()
    console.print(facts_table(_overview(description)))
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
    yield "requests", f"{description.requests:,} in {duration(span)}{pace}"
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
    _section(console, "With a cache without a limit", facts_table(facts))
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


def _columns(*names: str) -> Table:
    """Return a table with a name on the left and figures on the right."""
    first, *figures = names
    headings = [Column(first, style="dim"), *(Column(name, justify="right") for name in figures)]
    return Table(*headings, box=None, padding=(0, 2, 0, 0), header_style="dim")


def _distributions(rows: list[tuple[str, Figures]]) -> Table:
    table = _columns("", "mean", "p50", "p90", "p99", "max")
    for name, figures in rows:
        values = (figures.mean, figures.p50, figures.p90, figures.p99, figures.maximum)
        table.add_row(name, *(digits(value) for value in values))
    return table


def _working_sets(content: ContentFigures) -> Table:
    table = _columns("window", "windows", "mean", "max")
    for one in content.working_sets:
        table.add_row(duration(one.seconds), f"{one.windows:,}", digits(one.mean), f"{one.maximum:,}")
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


# ``pagedkv trace synth``: what was written, and the parameters of ``--set``.

_WRITTEN = (
    "{path}: {requests:,} requests of {sessions:,} sessions, {accesses:,} block accesses, "
    "{distinct_blocks:,} different blocks of {block_tokens} tokens"
)


def _written(trace: Trace, path: Path, kind: str, seed: int) -> dict[str, Any]:
    return {
        "path": str(path),
        "kind": kind,
        "seed": seed,
        "block_tokens": trace.block_tokens,
        "requests": trace.num_requests,
        "sessions": int(trace.sessions.max()) + 1,
        "accesses": trace.num_accesses,
        "distinct_blocks": trace.num_distinct,
        "span_seconds": float(trace.times[-1]),
    }


def _parameter(text: str) -> tuple[str, Any]:
    """Return name and value of one ``--set``."""
    from pagedkv.sim.traffic import Traffic

    names = [field.name for field in fields(Traffic) if field.name != "rate"]
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


def _print_parameters() -> None:
    """Print name, meaning and the value of each kind; ``mixed`` takes those of the three."""
    from pagedkv.sim.traffic import TRAFFIC, Traffic

    headings = [Column("name"), Column("meaning", style="dim"), *(Column(kind, justify="right") for kind in TRAFFIC)]
    table = Table(*headings, title="Parameters for --set", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
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
