"""Arrays that grow chunk by chunk, and move to disk when all together pass a size."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["Columns"]


class _Column:
    """One growing array: chunks in memory, or a file."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.chunks: list[npt.NDArray[Any]] = []
        self.file: BinaryIO | None = None

    def extend(self, chunk: npt.NDArray[Any]) -> None:
        if self.file is None:
            self.chunks.append(chunk)
        else:
            chunk.tofile(self.file)

    def move_to(self, path: Path) -> None:
        self.file = path.open("wb")
        for chunk in self.chunks:
            chunk.tofile(self.file)
        self.chunks.clear()

    def finish(self) -> npt.NDArray[Any]:
        if self.file is None:
            chunks, self.chunks = self.chunks, []
            return np.concatenate([np.zeros(0, self.dtype), *chunks])
        self.file.close()
        if Path(self.file.name).stat().st_size == 0:  # cannot be mapped
            return np.zeros(0, self.dtype)
        return np.memmap(self.file.name, self.dtype, mode="r+")


class Columns:
    """Several growing arrays that stay in memory up to a size and go to a temporary folder beyond it.

    Parameters
    ----------
    dtypes : dict
        Name and type of every column.
    memory_bytes : int
        What all columns together may take before they move to disk.

    Attributes
    ----------
    folder : Path or None
        Where they lie, once they have moved. Whoever takes the arrays removes it: `close`.
    """

    def __init__(self, dtypes: dict[str, type[np.generic]], memory_bytes: int) -> None:
        self.folder: Path | None = None
        self._columns = {name: _Column(dtype) for name, dtype in dtypes.items()}
        self._memory_bytes = memory_bytes
        self._held = 0

    def extend(self, **chunks: npt.NDArray[Any]) -> None:
        """Append to columns; the arrays are kept, not copied."""
        for name, chunk in chunks.items():
            self._columns[name].extend(chunk)
            self._held += chunk.nbytes
        if self.folder is None and self._held > self._memory_bytes:
            self.folder = Path(tempfile.mkdtemp(prefix="pagedkv-trace-"))
            for name, column in self._columns.items():
                column.move_to(self.folder / f"{name}.bin")

    def finish(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays, in memory or mapped; nothing can be appended afterwards."""
        return {name: column.finish() for name, column in self._columns.items()}

    def empty(self, name: str, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return an array of the same size and kind: in memory, or mapped from a new file."""
        if self.folder is None or len(like) == 0:
            return np.empty_like(like)
        return np.memmap(self.folder / f"{name}.bin", like.dtype, mode="w+", shape=like.shape)

    def close(self) -> None:
        """Remove the temporary folder; arrays that are still mapped stay readable where the system allows it."""
        for column in self._columns.values():
            if column.file is not None:
                column.file.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
