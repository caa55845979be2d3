"""What a run of ``pagedkv generate`` tells: the JSON object and the table."""

from __future__ import annotations

import sys

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["BlockUse", "GenerateReport", "MemoryUse", "print_json", "print_table"]


class BlockUse(msgspec.Struct):
    """The pool when the last token was written.

    Attributes
    ----------
    used : int
        Blocks that sequences hold.
    shared : int
        Used blocks that two or more sequences hold.
    copied : int
        Blocks copied because a shared one was written to, over the whole run.
    cached : int
        Findable blocks that nobody holds.
    peak : int
        Most blocks used at a time.
    total : int
        Size of the pool.
    block_size : int
        Tokens per block.
    """

    used: int
    shared: int
    copied: int
    cached: int
    peak: int
    total: int
    block_size: int


class MemoryUse(msgspec.Struct):
    """K and V in bytes.

    Attributes
    ----------
    paged : int
        The blocks at the peak.
    contiguous : int
        One contiguous cache per sequence, with room for prompt and longest continuation.
    """

    paged: int
    contiguous: int


class GenerateReport(msgspec.Struct):
    """What ``pagedkv generate --json`` prints.

    Attributes
    ----------
    model, prompt : str
    seed : int
    texts : list of str
        The continuations, without the prompt.
    token_ids : list of list of int
        Their new tokens, the end-of-text token included.
    prompt_tokens, cached_tokens, new_tokens : int
        Tokens of the prompt; those of them whose K and V were found in the cache; new tokens of all samples.
    dropped_tokens : int
        Tokens that ``--stream`` gave back.
    blocks : BlockUse
    memory : MemoryUse
    seconds, tokens_per_second : float
        Of generation, reading the prompt included and loading the model left out.
    """

    model: str
    prompt: str
    seed: int
    texts: list[str]
    token_ids: list[list[int]]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    dropped_tokens: int
    blocks: BlockUse
    memory: MemoryUse
    seconds: float
    tokens_per_second: float


def print_json(report: GenerateReport) -> None:
    """Write the report to stdout as one line of JSON, in UTF-8 whatever the terminal has."""
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def print_table(report: GenerateReport, console: Console) -> None:
    """Show the figures of a run."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    console.print(table)


def _lines(report: GenerateReport) -> list[tuple[str, str]]:
    blocks, memory = report.blocks, report.memory
    lines = [
        ("prompt tokens", f"{report.prompt_tokens:,}"),
        ("cached tokens", f"{report.cached_tokens:,}"),
        ("new tokens", f"{report.new_tokens:,}"),
        (
            "blocks used",
            f"{blocks.used:,} of {blocks.total:,} ({blocks.block_size} tokens each), {blocks.peak:,} at peak",
        ),
        ("blocks shared", f"{blocks.shared:,}"),
        ("blocks copied", f"{blocks.copied:,}"),
        ("memory", _comparison(memory)),
        ("tokens/s", f"{report.tokens_per_second:,.1f}"),
    ]
    if report.dropped_tokens:
        lines.insert(3, ("dropped tokens", f"{report.dropped_tokens:,}"))
    return lines


def _comparison(memory: MemoryUse) -> str:
    text = f"{_bytes(memory.paged)}; a contiguous cache: {_bytes(memory.contiguous)}"
    return f"{text} ({memory.contiguous / memory.paged:.1f}×)" if memory.paged else text


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
