"""`Trace`: requests in the order of their arrival, as arrays; and how a trace is written.

Request i owns ``ids[offsets[i] : offsets[i + 1]]``, one content id a block, the partly filled last block included where
the format names it. Content ids are dense (0, 1, 2, … in the order of first appearance) and chained: equal ids stand
for equal blocks *behind equal prefixes*, so every id has one parent.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.errors import bad_argument

Floats = npt.NDArray[np.float64]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

MAX_BLOCKS = 2**31 - 2
"""The largest capacity that is replayed."""

NO_PARENT = -1
NO_SESSION = -1


@dataclass(frozen=True, eq=False)
class Trace:
    """The requests of a trace; the arrays may lie in memory or be mapped from files (`load`).

    Attributes
    ----------
    name, format : str
        Where it comes from, and which reader understood it.
    block_tokens : int
        Tokens per block.
    times : float64 [num_requests]
        Seconds since the first request, ascending.
    input_tokens, output_tokens : int64 [num_requests]
    sessions : int64 [num_requests]
        Dense number of the session (chat, agent) that a request belongs to, or −1.
    offsets : int64 [num_requests + 1]
    ids : int32 [num_accesses]
    parents : int32 [num_distinct]
        Of every content id the id of the block before it, or −1.
    has_content : bool
        False for formats that carry lengths only: `ids` is empty then, and nothing can be said about hits.
    num_skipped, num_reordered : int
        Bad lines that were skipped, and requests whose timestamps went backwards, when the trace was read.
    """

    name: str
    format: str
    block_tokens: int
    times: Floats
    input_tokens: Int64s
    output_tokens: Int64s
    sessions: Int64s
    offsets: Int64s
    ids: Int32s
    parents: Int32s
    has_content: bool = True
    num_skipped: int = 0
    num_reordered: int = 0

    @property
    def num_requests(self) -> int:
        """Requests in the trace."""
        return len(self.times)

    @property
    def num_accesses(self) -> int:
        """Blocks that all requests together touch."""
        return len(self.ids)

    @property
    def num_distinct(self) -> int:
        """Different blocks: what a cache without a limit would hold in the end."""
        return len(self.parents)

    @property
    def attainable_hit_ratio(self) -> float:
        """What a cache without a limit finds: every use of a block but its first is a hit."""
        return 1 - self.num_distinct / self.num_accesses if self.num_accesses else 0.0

    @property
    def num_tokens(self) -> int:
        """Input tokens of all requests together."""
        return int(self.input_tokens.sum())

    def hit_tokens(self, hits: npt.NDArray[np.integer]) -> int:
        """Return how many input tokens were found, when request i found its first ``hits[i]`` blocks."""
        return int(np.minimum(hits.astype(np.int64) * self.block_tokens, self.input_tokens).sum())

    def slice(self, first: int, last: int) -> Trace:
        """Return the requests ``[first, last)`` with their content ids made dense again."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        seen, first_place, inverse = np.unique(self.ids[start:stop], return_index=True, return_inverse=True)
        rank = np.empty(len(seen), np.int32)
        rank[np.argsort(first_place, kind="stable")] = np.arange(len(seen), dtype=np.int32)
        old_parents = self.parents[seen]
        places = np.searchsorted(seen, old_parents)
        parents = np.full(len(seen), NO_PARENT, np.int32)
        has_parent = old_parents != NO_PARENT
        parents[rank[has_parent]] = rank[places[has_parent]]
        return Trace(
            name=f"{self.name}[{first}:{last}]",
            format=self.format,
            block_tokens=self.block_tokens,
            times=self.times[first:last] - (self.times[first] if last > first else 0.0),
            input_tokens=self.input_tokens[first:last],
            output_tokens=self.output_tokens[first:last],
            sessions=self.sessions[first:last],
            offsets=self.offsets[first : last + 1] - start,
            ids=rank[inverse.ravel()],
            parents=parents,
            has_content=self.has_content,
        )

    def save(self, folder: Path) -> None:
        """Write every array to `folder` as one ``.npy`` file, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        scalars = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                np.save(folder / f"{field.name}.npy", value)
            else:
                scalars[field.name] = value
        (folder / "trace.json").write_bytes(msgspec.json.encode(scalars))

    @classmethod
    def load(cls, folder: Path) -> Trace:
        """Map a saved trace: nothing is read before it is used, and processes share the memory.

        What is written to the arrays stays with this process; they are writable because compiled code would be
        compiled a second time for read-only ones.
        """
        values: dict[str, Any] = msgspec.json.decode((folder / "trace.json").read_bytes())
        for field in fields(cls):
            if field.name not in values:
                values[field.name] = np.load(folder / f"{field.name}.npy", mmap_mode="c")
        return cls(**values)


def require_content(trace: Trace) -> None:
    """Refuse what is no trace, and a trace of lengths only."""
    if not isinstance(trace, Trace):
        hint = "read_trace(path) or synthesize(kind) makes one"
        raise bad_argument("trace", "a Trace", type(trace).__name__, hint)
    if not trace.has_content:
        got = f"{trace.name!r}: the format {trace.format} carries lengths only, which do not tell what is found again"
        raise bad_argument("trace", "the content of its blocks", got, "take a format with hashes or token ids")


# Write a trace as Mooncake JSONL, so that whatever can be read can be converted.

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
        columns = (trace.times, trace.input_tokens, trace.output_tokens, trace.sessions)
        rows = zip(*(column[part].tolist() for column in columns), strict=True)
        for place, (time, inputs, outputs, session) in enumerate(rows):
            request = {"timestamp": _milliseconds(time), "input_length": inputs, "output_length": outputs}
            if trace.has_content:
                request["hash_ids"] = trace.ids[offsets[place] : offsets[place + 1]].tolist()
            if session != NO_SESSION:
                request["session_id"] = session
            request["block_size"] = trace.block_tokens
            yield request


def _milliseconds(seconds: float) -> float:
    rounded = round(seconds * 1000.0, 6)
    return int(rounded) if rounded.is_integer() else rounded
