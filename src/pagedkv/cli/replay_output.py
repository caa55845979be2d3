"""What ``pagedkv replay`` shows and writes: tables, one JSON object, CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.text import Text

from pagedkv.cli.replay_tables import cell_tables, curve_table
from pagedkv.cli.terminal import Failure

if TYPE_CHECKING:
    from pagedkv.sim.hit_curve import HitCurve
    from pagedkv.sim.result import ReplayResult
    from pagedkv.sim.timing import Timing
    from pagedkv.sim.trace import Trace

__all__ = [
    "CellFacts",
    "CurveFacts",
    "ReplayFacts",
    "TraceFacts",
    "print_json",
    "print_tables",
    "write_csv",
    "write_file",
]

_POINTS_PER_DOUBLING = 8


class CellFacts(msgspec.Struct):
    """One replay.

    Attributes
    ----------
    strategy : str
        As it was asked for.
    blocks : int
        Capacity.
    accesses, hit_blocks : int
        Blocks that requests touched, and those found.
    hit_ratio, token_hit_ratio : float
    reclaimed : int
        Blocks given up.
    seconds : float
    preempted, refused : int
        With ``--timed`` only.
    """

    strategy: str
    blocks: int
    accesses: int
    hit_blocks: int
    hit_ratio: float
    token_hit_ratio: float
    reclaimed: int
    seconds: float
    preempted: int | msgspec.UnsetType = msgspec.UNSET
    refused: int | msgspec.UnsetType = msgspec.UNSET


class TraceFacts(msgspec.Struct):
    """The trace that was replayed.

    Attributes
    ----------
    name, format : str
    block_tokens, requests, accesses, distinct_blocks, tokens : int
    attainable_hit_ratio : float
        Of a cache without a limit.
    skipped, reordered : int
        Broken lines left out, and requests whose time lay before the one above them.
    """

    name: str
    format: str
    block_tokens: int
    requests: int
    accesses: int
    distinct_blocks: int
    tokens: int
    attainable_hit_ratio: float
    skipped: int
    reordered: int


class CurveFacts(msgspec.Struct):
    """The exact LRU curve at some capacities, those of the cells among them.

    Attributes
    ----------
    blocks : list of int
    hit_ratio, token_hit_ratio : list of float
    """

    blocks: list[int]
    hit_ratio: list[float]
    token_hit_ratio: list[float]


class ReplayFacts(msgspec.Struct):
    """What ``pagedkv replay --json`` prints.

    Attributes
    ----------
    cells : list of CellFacts
        Strategy by strategy, capacity by capacity, in the order asked for.
    trace : TraceFacts
    timing : dict
        The rates, with ``--timed`` only.
    curve : CurveFacts
        With ``--curve`` only.
    """

    cells: list[CellFacts]
    trace: TraceFacts
    timing: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    curve: CurveFacts | msgspec.UnsetType = msgspec.UNSET


def print_json(trace: Trace, results: Sequence[ReplayResult], curve: HitCurve | None, timing: Timing | None) -> None:
    """Write one line of JSON to stdout, in UTF-8 whatever the terminal has."""
    facts = ReplayFacts(_cells(results, timing is not None), _trace(trace))
    if timing is not None:
        facts.timing = msgspec.to_builtins(timing)
    if curve is not None:
        facts.curve = _curve(curve, [result.blocks for result in results])
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(facts) + b"\n")
    sys.stdout.buffer.flush()


def print_tables(
    trace: Trace,
    results: Sequence[ReplayResult],
    curve: HitCurve | None,
    timing: Timing | None,
    console: Console,
) -> None:
    """Show the trace in a line, and the results as tables that fit the terminal."""
    facts = _trace(trace)
    console.print(
        Text(
            f"{facts.name}: {facts.requests:,} requests, {facts.accesses:,} block accesses, {facts.distinct_blocks:,} "
            f"distinct blocks of {facts.block_tokens:,} tokens; at most {facts.attainable_hit_ratio:.2%} can be found"
        ),
        soft_wrap=True,
    )
    for table in cell_tables(results, timing is not None, console.width):
        console.print(table)
    if curve is not None:
        console.print(curve_table(_curve(curve, [result.blocks for result in results], 1)))


def write_csv(results: Sequence[ReplayResult], timed: bool, file: str) -> None:
    """Write a line for every cell to a file, or to stdout for ``-``."""
    text = io.StringIO(newline="")
    rows = [msgspec.to_builtins(cell) for cell in _cells(results, timed)]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if file == "-":
        sys.stdout.write(text.getvalue())
    else:
        write_file("--csv", Path(file), text.getvalue())


def write_file(option: str, file: Path, text: str) -> None:
    """Write a whole file.

    Raises
    ------
    Failure
        It cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise Failure(f"{option} cannot write {file}: {error.strerror or error}") from error


def _cells(results: Sequence[ReplayResult], timed: bool) -> list[CellFacts]:
    return [
        CellFacts(
            strategy=result.strategy,
            blocks=result.blocks,
            accesses=result.accesses,
            hit_blocks=result.hit_blocks,
            hit_ratio=result.hit_ratio,
            token_hit_ratio=result.token_hit_ratio,
            reclaimed=result.reclaimed,
            seconds=result.seconds,
            preempted=result.preempted if timed else msgspec.UNSET,
            refused=result.refused if timed else msgspec.UNSET,
        )
        for result in results
    ]


def _trace(trace: Trace) -> TraceFacts:
    return TraceFacts(
        name=trace.name,
        format=trace.format,
        block_tokens=trace.block_tokens,
        requests=trace.num_requests,
        accesses=trace.num_accesses,
        distinct_blocks=trace.num_distinct,
        tokens=trace.num_tokens,
        attainable_hit_ratio=1 - trace.num_distinct / trace.num_accesses if trace.num_accesses else 0.0,
        skipped=trace.num_skipped,
        reordered=trace.num_reordered,
    )


def _curve(curve: HitCurve, asked: Sequence[int], per_doubling: int = _POINTS_PER_DOUBLING) -> CurveFacts:
    import numpy as np

    last = max(1, int(curve.blocks[-1]))
    doublings = np.arange(0, int(np.log2(last) * per_doubling) + 1) / per_doubling
    blocks = np.unique(np.concatenate([np.round(2**doublings), [last], asked]).astype(np.int64))
    return CurveFacts(
        blocks=blocks.tolist(),
        hit_ratio=curve.at(blocks).tolist(),
        token_hit_ratio=curve.at(blocks, tokens=True).tolist(),
    )
