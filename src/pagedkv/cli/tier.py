"""``pagedkv tier``: what the directory of a disk tier holds, whether it is right, and emptying it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pagedkv.cli.terminal import (
    DebugOption,
    JsonOption,
    facts_table,
    failures_in_one_line,
    notes,
    option,
    output,
    print_json,
    progress_bar,
)
from pagedkv.format import count, duration, format_bytes, percent

if TYPE_CHECKING:
    from pagedkv.tiers import TierCheck, TierFacts

app = typer.Typer(
    help="Look after the directories of disk tiers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

WRONG = 1
"""The exit code where something is not as it should be, or was not done."""

_INFO = """Say what the directory of a disk tier holds. Nothing is changed, a server may go on writing to it.

[bold]Examples[/bold]

  pagedkv tier info ~/chats

  pagedkv tier info ~/chats --json
"""
_CHECK = """Read every block of a disk tier and compare it with its checksum.

[bold]Examples[/bold]

  pagedkv tier check ~/chats

  pagedkv tier check ~/chats --json || echo "some blocks are lost"

Nothing is changed, a server may go on writing to it. A corrupt block is never served, it is computed again: where a
process was killed while it stored, some are no surprise. The exit code is 1 if there are any.
"""
_CLEAR = """Forget all blocks of a disk tier, and give their room back to the disk.

[bold]Examples[/bold]

  pagedkv tier clear ~/chats

  pagedkv tier clear ~/chats --yes

It is refused while a process writes there.
"""

DirectoryArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="The directory of a disk tier.", show_default=False)
]


class Info(msgspec.Struct):
    """What ``pagedkv tier info --json`` prints: bytes, times as ISO 8601, no process where none writes."""

    directory: str
    fingerprint: str
    block_size: int
    block_bytes: int
    slots: int
    blocks: int
    salts: int
    bytes: int
    last_written: str
    writer: str | None


class Check(msgspec.Struct):
    """What ``pagedkv tier check --json`` prints, in blocks."""

    good: int
    corrupt: int
    unreachable: int
    bytes_read: int
    seconds: float


@app.command(help=_INFO)
def info(directory: DirectoryArgument, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Describe a directory; the help text is `_INFO`."""
    with failures_in_one_line(debug):
        from pagedkv.tiers import inspect_tier

        with progress_bar(notes()):
            facts = inspect_tier(directory)
        if json:
            print_json(_info(facts))
        else:
            output().print(facts_table(_info_lines(facts)), soft_wrap=True)


@app.command(help=_CHECK)
def check(directory: DirectoryArgument, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Verify a directory; the help text is `_CHECK`."""
    with failures_in_one_line(debug):
        from pagedkv.tiers import check_tier

        with progress_bar(notes()) as shows:
            found = check_tier(directory, shows("blocks"))
        if json:
            print_json(Check(found.good, found.corrupt, found.unreachable, found.num_bytes, round(found.seconds, 3)))
        else:
            output().print(facts_table(_check_lines(found)), soft_wrap=True)
    if found.corrupt:
        raise typer.Exit(WRONG)


@app.command(help=_CLEAR)
def clear(
    directory: DirectoryArgument,
    yes: Annotated[bool, option("--yes", "-y", help="Do not ask.")] = False,
    debug: DebugOption = False,
) -> None:
    """Empty a directory; the help text is `_CLEAR`."""
    with failures_in_one_line(debug):
        from pagedkv.tiers import clear_tier, inspect_tier

        facts = inspect_tier(directory)
        held = f"{count(facts.num_blocks)} blocks, {format_bytes(facts.num_bytes)}"
    if facts.writer is None and not yes and not typer.confirm(f"Forget {held} in {directory}?", err=True):
        notes().print("nothing was changed")
        raise typer.Exit(WRONG)
    with failures_in_one_line(debug):
        clear_tier(directory)
        notes().print(f"forgot {held}", soft_wrap=True)


def _written(facts: TierFacts) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(facts.written_at).astimezone().replace(microsecond=0)


def _info(facts: TierFacts) -> Info:
    block, counts = facts.block, (facts.num_slots, facts.num_blocks, facts.num_salts, facts.num_bytes)
    about = (facts.directory, block.fingerprint, block.block_size, block.block_bytes)
    return Info(*about, *counts, _written(facts).isoformat(), facts.writer)


def _info_lines(facts: TierFacts) -> list[tuple[str, str]]:
    block, used = facts.block, facts.num_blocks / max(1, facts.num_slots)
    return [
        ("directory", facts.directory),
        ("blocks", f"{count(facts.num_blocks)} of {count(facts.num_slots)} ({percent(used)})"),
        ("tokens", count(facts.num_blocks * block.block_size)),
        ("a block", f"{count(block.block_size)} tokens, {format_bytes(block.block_bytes)}"),
        ("files", format_bytes(facts.num_bytes)),
        ("salts", count(facts.num_salts)),
        ("last written", _written(facts).isoformat(sep=" ")),
        ("written by", "nobody now" if facts.writer is None else f"process {facts.writer}"),
        ("fingerprint", block.fingerprint),
    ]


def _check_lines(found: TierCheck) -> list[tuple[str, str]]:
    rate = f", {format_bytes(found.num_bytes / found.seconds)} a second" if found.num_bytes else ""
    return [
        ("good", f"{count(found.good)} blocks"),
        ("corrupt", f"{count(found.corrupt)}{', never served and computed again' if found.corrupt else ''}"),
        ("unreachable", f"{count(found.unreachable)}{', to be overwritten' if found.unreachable else ''}"),
        ("read", f"{format_bytes(found.num_bytes)} in {duration(found.seconds)}{rate}"),
    ]
