"""Write a trace as Mooncake JSONL, so that whatever can be read can be converted."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO, Any

import msgspec

from pagedkv.sim.trace import NO_SESSION, Trace

__all__ = ["write_trace"]

CHUNK = 4096  # requests whose numbers are taken out of the arrays at once


def write_trace(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a trace as Mooncake JSONL, packed where the name ends in ``.gz``.

    Ids are the trace's own, dense and chained; times are milliseconds since the first request, rounded to the
    nanosecond. A trace without content is written without ``hash_ids``. The file appears when it is complete: a write
    that fails leaves what was there.

    Parameters
    ----------
    trace : Trace
    path : str or path

    Raises
    ------
    OSError
        The file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as raw:
            if path.suffix == ".gz":
                # No name and no date inside: the same trace gives the same bytes.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    _write(trace, packed)
            else:
                _write(trace, raw)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write(trace: Trace, file: IO[bytes] | gzip.GzipFile) -> None:
    encode = msgspec.json.Encoder().encode
    for request in _requests(trace):
        file.write(encode(request) + b"\n")


def _requests(trace: Trace) -> Iterator[dict[str, Any]]:
    for first in range(0, trace.num_requests, CHUNK):
        part = slice(first, first + CHUNK)
        offsets = trace.offsets[first : first + CHUNK + 1].tolist()
        columns = (
            trace.times[part],
            trace.input_tokens[part],
            trace.output_tokens[part],
            trace.sessions[part],
        )
        for place, (time, inputs, outputs, session) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            request = {
                "timestamp": _milliseconds(time),
                "input_length": inputs,
                "output_length": outputs,
            }
            if trace.has_content:
                request["hash_ids"] = trace.ids[offsets[place] : offsets[place + 1]].tolist()
            if session != NO_SESSION:
                request["session_id"] = session
            request["block_size"] = trace.block_tokens
            yield request


def _milliseconds(seconds: float) -> float:
    rounded = round(seconds * 1000.0, 6)
    return int(rounded) if rounded.is_integer() else rounded
