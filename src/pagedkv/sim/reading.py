"""`read_trace`: formats recognised, one `Trace` out."""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path

import numpy as np

from pagedkv.errors import TraceError
from pagedkv.sim.collect import Collector, TooManyBlocks
from pagedkv.sim.readers.base import Reader
from pagedkv.sim.readers.csv_lengths import AzureReader, BurstGptReader
from pagedkv.sim.readers.kv_events import KvEventsReader
from pagedkv.sim.readers.mooncake import MooncakeReader
from pagedkv.sim.readers.qwen import QwenReader
from pagedkv.sim.readers.tokens import TokensReader
from pagedkv.sim.readers.weka import WekaReader
from pagedkv.sim.source import BadRecord, Progress, Source, seekable
from pagedkv.sim.trace import Trace
from pagedkv.validate import require_choice, require_int

# Recognise the format of a trace by its beginning.

HEAD_BYTES = 2**18
MAX_LINES = 20
# What no other format has, the most telling first.
_JSON_KEYS = (
    (b'"token_ids"', "tokens"),
    (b'"parent_chat_id"', "qwen"),
    (b'"chat_id"', "qwen"),
    (b'"hash_ids"', "mooncake"),
    (b'"input_length"', "mooncake"),
    (b'"input_tokens"', "mooncake"),
)
_WEKA_KEYS = (b'"requests"', b'"hash_id_scope"')
_CSV_COLUMNS = ((b"contexttokens", "azure"), (b"request tokens", "burstgpt"))


def detect(head: bytes) -> str | None:
    """Return the name of the format by the first `HEAD_BYTES` of the file, unpacked, or None."""
    # An array, a map or a frame of events: no text begins so.
    if head and (0x80 <= head[0] <= 0x9F or head[0] in (0x00, 0xC4, 0xC5, 0xC6, 0xDC, 0xDD, 0xDE, 0xDF)):
        return "kv-events"
    text = head.lstrip()
    if text.startswith(b"{") and any(key in text for key in _WEKA_KEYS):
        return "weka"
    # A broken line at the beginning must not hide the rest.
    for line in text.split(b"\n")[:MAX_LINES]:
        is_json = line.lstrip().startswith(b"{")
        words, line = (_JSON_KEYS, line) if is_json else (_CSV_COLUMNS, line.lower())
        found = next((name for word, name in words if word in line), None)
        if found is not None:
            return found
    return None


logger = logging.getLogger("pagedkv")

FORMATS: dict[str, type[Reader]] = {
    reader.name: reader
    for reader in (MooncakeReader, QwenReader, WekaReader, BurstGptReader, AzureReader, KvEventsReader, TokensReader)
}
"""Every format that can be read, by the name that `read_trace` takes."""

_SESSION_FILES = ("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz")


def read_trace(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    block_tokens: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Trace:
    """Read a trace.

    The file is read piece by piece, gzip or not. What it holds is collected in compact arrays that move to a temporary
    folder when they pass 512 MiB; only the table of different blocks stays in memory, about 24 bytes for a block. The
    folder goes when the trace does.

    Requests whose timestamps go backwards are sorted, equal times in the order of the file, and the logger ``pagedkv``
    warns of them.

    Parameters
    ----------
    path : str or path
        A file, a pipe, or a folder with a session a file (weka). A pipe is copied to a temporary file first.
    format : str, optional
        One of `FORMATS`; recognised if it is not given.
    block_tokens : int, optional
        Tokens per block. Default: what the file says, or else what its format uses: 512 for mooncake, 64 for weka, 16
        for the others.
    skip_bad : bool
        Skip broken lines and count them in ``trace.num_skipped``, instead of raising.
    progress : callable, optional
        Called now and then with (bytes read, bytes in all) of the file as it lies on disk.

    Returns
    -------
    Trace
        With ``has_content=False`` where the file gives lengths only (azure, burstgpt, mooncake without ids).

    Raises
    ------
    TraceError
        The file cannot be read, is not of a known format, holds no request, or a line of it is broken.
    InvalidOperation
        No such format, or a block without tokens.
    """
    if format is not None:
        require_choice("format", format, FORMATS)
    if block_tokens is not None:
        block_tokens = require_int("block_tokens", block_tokens, 1, 2**31 - 1)
    path = Path(path)
    with seekable(path) as file:
        kind = FORMATS[format or detect_format(file, str(path))]
        collector = Collector(in_order=kind.in_order, ticks_per_second=kind.ticks_per_second)
        sources = [
            Source(part, str(path) if part == file else None, skip_bad=skip_bad, progress=progress)
            for part in _files(file)
        ]
        reader = kind(collector, block_tokens)
        try:
            for source in sources:
                reader.read(source)
            trace = collector.finish(
                name=path.name,
                format=reader.name,
                block_tokens=reader.block_tokens,
                has_content=reader.has_content,
                num_skipped=sum(source.num_skipped for source in sources),
            )
        except BaseException as error:
            collector.close()
            if isinstance(error, (BadRecord, TooManyBlocks, OSError)):  # no request, no more numbers, no room on disk
                raise TraceError(str(path), None, str(error)) from error
            raise
    _doubt_block_tokens(trace)
    return trace


def detect_format(path: Path, name: str | None = None) -> str:
    """Return the name of the format of a trace, a file or a folder; errors call it `name`."""
    if path.is_dir():
        return WekaReader.name
    found = detect(Source(path, name).head(HEAD_BYTES))
    if found is None:
        raise TraceError(name or str(path), None, f"the format is not recognised; name it: {', '.join(FORMATS)}")
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted({file for pattern in _SESSION_FILES for file in path.glob(pattern)})
    if not files:
        raise TraceError(str(path), None, f"the folder holds none of {', '.join(_SESSION_FILES)}")
    return files


def _doubt_block_tokens(trace: Trace) -> None:
    """Warn when most requests list another number of blocks than their input fills: the block size may be wrong."""
    if not trace.has_content:
        return
    listed = np.diff(trace.offsets)
    wrong = np.abs(listed - trace.input_tokens / trace.block_tokens) > 1
    count = int(np.count_nonzero(wrong))
    if 2 * count > trace.num_requests:
        logger.warning(
            "%s: %d of %d requests list another number of blocks than their input fills at %d tokens a block",
            trace.name, count, trace.num_requests, trace.block_tokens,
        )  # fmt: skip
