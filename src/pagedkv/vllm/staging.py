"""Staging memory: rows for blocks on their way, shared by the scheduler's process and the workers'."""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedkv.errors import TierError
from pagedkv.format import format_bytes
from pagedkv.tiers.tier import Rows

_MEMORY = Path("/dev/shm")
_TICKET_BYTES = 8


class Staging:
    """Rows of shared memory, each with a ticket that says what it is in use for.

    Attributes
    ----------
    path : str
        The file, by which the other process finds it.
    rows : uint8 [num_rows, row_bytes]
    tickets : int64 [num_rows]
    """

    def __init__(self, path: str, num_rows: int, row_bytes: int, *, is_new: bool = False) -> None:
        size = num_rows * (row_bytes + _TICKET_BYTES)
        self.path, self._is_named = path, is_new
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o600)
        except OSError as error:
            raise TierError(path, f"the staging memory cannot be opened: {error.strerror}") from error
        try:
            if is_new:
                os.posix_fallocate(file, 0, size)  # or a write, later, could end the process
            self._memory = mmap.mmap(file, size)
        except (OSError, ValueError) as error:
            if is_new:
                self.unlink()
            reason = f"expected {format_bytes(size)} of shared memory, got: {error}; give less as `staging`"
            raise TierError(str(Path(path).parent), reason) from error
        finally:
            os.close(file)
        data = np.frombuffer(self._memory, np.uint8)
        self.tickets: npt.NDArray[np.int64] = data[: num_rows * _TICKET_BYTES].view(np.int64)
        self.rows: Rows = data[num_rows * _TICKET_BYTES :].reshape(num_rows, row_bytes)

    @classmethod
    def create(cls, size: int, row_bytes: int, folder: Path | None = None) -> Staging:
        """Make one of at most so many bytes, of two rows at least.

        Raises
        ------
        TierError
            If so much memory cannot be had, or two blocks do not fit.
        """
        folder = folder or (_MEMORY if _MEMORY.is_dir() else Path("/tmp"))
        num_rows = size // (row_bytes + _TICKET_BYTES)
        if num_rows < 2:
            reason = f"expected `staging` of at least two blocks of {format_bytes(row_bytes)}, got {format_bytes(size)}"
            raise TierError(str(folder), reason)
        return cls(str(folder / f"pagedkv-{secrets.token_hex(8)}"), num_rows, row_bytes, is_new=True)

    def unlink(self) -> None:
        """Take its name away; who has it open keeps it."""
        if self._is_named:
            self._is_named = False
            with suppress(OSError):
                os.unlink(self.path)


class Runs:
    """Which rows of a range are free; they are taken as runs of neighbours.

    Parameters
    ----------
    start, stop : int
    """

    def __init__(self, start: int, stop: int) -> None:
        self._start = start
        self._is_free = np.ones(stop - start, np.bool_)

    @property
    def num_free(self) -> int:
        """How many rows are free."""
        return int(self._is_free.sum())

    def take(self, count: int) -> tuple[int, int]:
        """Take the first run of so many rows, or the longest one where there is none: its first row, and its length."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self._is_free, [False]])))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if not len(starts) or count < 1:
            return self._start, 0
        wide = np.flatnonzero(lengths >= count)
        best = int(wide[0]) if len(wide) else int(lengths.argmax())
        first, length = int(starts[best]), min(count, int(lengths[best]))
        self._is_free[first : first + length] = False
        return self._start + first, length

    def give_back(self, first: int, length: int) -> None:
        """Count a run as free."""
        self._is_free[first - self._start : first - self._start + length] = True
