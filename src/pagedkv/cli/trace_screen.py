"""``pagedkv trace describe``: the figures of a trace as a screen, or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from pagedkv.cli.console import library_notices, notes, output

if TYPE_CHECKING:
    from pagedkv.sim.trace import Trace
    from pagedkv.sim.trace_stats import ContentFigures, Description, Figures

__all__ = ["print_description", "show"]

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
