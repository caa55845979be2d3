"""Trace files and pipes, gzip or not, read piece by piece with a bound on every piece."""

from __future__ import annotations

import gzip
import io
import logging
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from pagedkv.errors import TraceError

logger = logging.getLogger("pagedkv")

MAX_LINE_BYTES = 32 * 2**20
SKIP_BYTES = BUFFER_BYTES = 2**20
REPORT_BYTES = 4 * 2**20
BOM = b"\xef\xbb\xbf"
PATIENCE = 1.0  # seconds

Progress = Callable[[int, int], None]


class BadRecord(ValueError):
    """What is wrong with one line; the source adds file and number."""


# Everything that decoding one hostile line may raise.
BAD_RECORD = (BadRecord, msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError)
_UNREADABLE = (OSError, EOFError, zlib.error)


def reason_of(error: BaseException) -> str:
    """Return one line that says what was wrong."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    return " ".join(str(error).split())[:500] or type(error).__name__


@contextmanager
def seekable(path: Path) -> Iterator[Path]:
    """Yield a file that can be read more than once: the path itself, or a copy of what comes through a pipe."""
    if not path.is_fifo():
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="pagedkv-trace-") as copy:
        try:
            with _opened_pipe(path) as pipe:
                shutil.copyfileobj(pipe, copy)
            copy.flush()
        except OSError as error:
            raise TraceError(str(path), None, f"cannot be read: {reason_of(error)} (is the path right?)") from error
        yield Path(copy.name)


def _opened_pipe(path: Path) -> BinaryIO:
    """Open a pipe, which waits for a writer, and say so if that takes long."""
    notice = threading.Timer(PATIENCE, logger.warning, ("%s: waiting for a writer, this is a pipe", path))
    notice.daemon = True
    notice.start()
    try:
        return path.open("rb")
    finally:
        notice.cancel()


class Source:
    """One file of a trace, which errors call `name`; with `skip_bad` broken records are counted instead of raised."""

    def __init__(
        self, path: Path, name: str | None = None, *, skip_bad: bool = False, progress: Progress | None = None
    ) -> None:
        self.path = path
        self.name = str(path) if name is None else name
        self.num_skipped = 0
        self._skip_bad = skip_bad
        self._progress = progress

    def bad(self, number: int | None, reason: str, place: str = "line") -> None:
        """Raise the error of a record, or count it."""
        if not self._skip_bad:
            raise TraceError(self.name, number, reason, place)
        self.num_skipped += 1

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Open the file; yields (what to read, the file on disk beneath it).

        Whatever goes wrong with the file, while it is opened or while it is read, is a `TraceError`.
        """
        try:
            with self.path.open("rb", buffering=BUFFER_BYTES) as raw:
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                if packed:
                    # Without the buffer every line would pass through Python code of the gzip module.
                    with io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER_BYTES) as unpacked:
                        yield unpacked, raw
                else:
                    yield raw, raw
        except _UNREADABLE as error:
            raise TraceError(self.name, None, f"cannot be read: {reason_of(error)} (is the path right?)") from error

    def lines(self, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, line) of every line that is not blank; never holds more than `limit` bytes of one."""
        with self.open() as (file, raw):
            report = self._reporter(raw)
            number = 0
            while line := file.readline(limit + 1):
                number += 1
                report(len(line))
                if len(line) > limit:
                    self.bad(number, f"longer than {limit} bytes")
                    _skip_line(file, line)
                elif not line.isspace():
                    yield number, line.removeprefix(BOM) if number == 1 else line

    def whole(self, limit: int) -> Iterator[tuple[None, bytes]]:
        """Yield the whole file, if it is not beyond `limit` bytes."""
        with self.open() as (file, raw):
            content = file.read(limit + 1)
            self._reporter(raw)(len(content))
            if len(content) > limit:
                self.bad(None, f"longer than {limit} bytes")
            else:
                yield None, content.removeprefix(BOM)

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the file piece by piece."""
        with self.open() as (file, raw):
            report = self._reporter(raw)
            while piece := file.read(size):
                report(len(piece))
                yield piece

    def head(self, size: int) -> bytes:
        """Return the first bytes, unpacked, without a byte order mark."""
        with self.open() as (file, _):
            return file.read(size).removeprefix(BOM)

    def _reporter(self, raw: BinaryIO) -> Callable[[int], None]:
        """Return what is told of every read; it passes some of it on."""
        progress = self._progress
        if progress is None:
            return lambda size: None
        total = self.path.stat().st_size
        since = 0

        def report(size: int) -> None:
            nonlocal since
            since += size
            if since >= REPORT_BYTES:
                since = 0
                progress(raw.tell(), total)

        return report


def _skip_line(file: BinaryIO, piece: bytes) -> None:
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(SKIP_BYTES)
