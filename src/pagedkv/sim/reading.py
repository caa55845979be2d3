"""The door to traces: any known format in, one `Trace` out."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from pagedkv.errors import TraceError
from pagedkv.sim.collecting import Collector
from pagedkv.sim.readers.mooncake import MooncakeReader
from pagedkv.sim.source import BAD_RECORD, Progress, Source, reason_of
from pagedkv.sim.trace import Trace

__all__ = ["read_trace"]


def read_trace(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    block_tokens: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Read a trace."""
    source = Source(Path(path), skip_bad=skip_bad, progress=progress)
    collector = Collector()
    reader = MooncakeReader(collector, block_tokens)
    for number, line in source.lines():
        try:
            reader.add(line)
        except BAD_RECORD as error:
            source.bad(number, reason_of(error))
    try:
        return collector.finish(
            name=source.path.name,
            format="mooncake",
            block_tokens=block_tokens or 512,
            has_content=True,
            num_skipped=source.num_skipped,
        )
    except ValueError as error:
        raise TraceError(str(path), None, str(error)) from None
