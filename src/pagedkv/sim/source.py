"""Where a trace comes from: files, gzip or not, read piece by piece, with a bound on every piece."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import msgspec

from pagedkv.errors import TraceError

__all__ = ["BAD_RECORD", "MAX_LINE_BYTES", "BadRecord", "Progress", "Source", "reason_of"]

MAX_LINE_BYTES = 32 * 2**20
SKIP_BYTES = 2**20
REPORT_BYTES = 4 * 2**20

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


class Source:
    """One file of a trace.

    Parameters
    ----------
    path : Path
    skip_bad : bool
        Whether broken records are counted instead of raised.
    progress : callable, optional
        Called now and then with (bytes read, bytes in all) of the file as it lies on disk.

    Attributes
    ----------
    num_skipped : int
    """

    def __init__(self, path: Path, *, skip_bad: bool = False, progress: Progress | None = None) -> None:
        self.path = path
        self.num_skipped = 0
        self._skip_bad = skip_bad
        self._progress = progress

    def bad(self, number: int | None, reason: str, place: str = "line") -> None:
        """Raise the error of a record, or count it."""
        if not self._skip_bad:
            raise TraceError(str(self.path), number, reason, place)
        self.num_skipped += 1

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], BinaryIO]]:
        """Open the file; yields (what to read, the file on disk beneath it).

        Raises
        ------
        TraceError
            Whatever goes wrong with the file, while it is opened or while it is read.
        """
        try:
            with self.path.open("rb") as raw:
                packed = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                if packed:
                    with gzip.open(raw) as unpacked:
                        yield unpacked, raw  # type: ignore[misc]
                else:
                    yield raw, raw
        except _UNREADABLE as error:
            raise TraceError(str(self.path), None, f"cannot be read: {reason_of(error)}") from error

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, line) of every line that is not blank; never holds more than one line."""
        with self.open() as (file, raw):
            total = self.path.stat().st_size
            read = reported = number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                read += len(line)
                if self._progress and read - reported >= REPORT_BYTES:
                    reported = read
                    self._progress(raw.tell(), total)
                if len(line) > MAX_LINE_BYTES:
                    self.bad(number, f"longer than {MAX_LINE_BYTES} bytes")
                    _skip_line(file)
                elif not line.isspace():
                    yield number, line
            if self._progress:
                self._progress(total, total)

    def head(self, size: int) -> bytes:
        """Return the first bytes, unpacked."""
        with self.open() as (file, _):
            return file.read(size)


def _skip_line(file: IO[bytes]) -> None:
    while (piece := file.readline(SKIP_BYTES)) and not piece.endswith(b"\n"):
        pass
