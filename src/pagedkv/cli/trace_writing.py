"""``pagedkv trace synth``: make up a trace and write it."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.cli.console import library_notices, notes
from pagedkv.cli.terminal import Failure

__all__ = ["Written", "write_synthetic"]


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
    from pagedkv.sim.traffic import Traffic
    from pagedkv.sim.writing import write_trace

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise Failure(f"--output expects a file in a folder that exists, got {path}")
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
        raise Failure(f"--set expects NAME=VALUE, got {text!r}")
    if name not in names:
        raise Failure(f"--set expects one of {', '.join(names)}, got {name!r}")
    try:
        number = float(value)
    except ValueError:
        raise Failure(f"--set {name} expects a number, got {value!r}") from None
    return name, int(number) if number.is_integer() else number
