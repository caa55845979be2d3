"""HostTier: blocks in the memory of the host, for pools on a device that is smaller."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.protocol import Strategy
from pagedkv.control.strategies import as_strategy
from pagedkv.errors import OutOfMemory, bad_argument
from pagedkv.format import format_bytes
from pagedkv.machine import cuda_devices
from pagedkv.tiers.book_tier import BookTier, Entries, Kept
from pagedkv.tiers.tier import BlockFormat, Rows
from pagedkv.tiers.transfers import Ints
from pagedkv.validate import require_flag, require_size


class HostTier(BookTier):
    """Blocks in the memory of the host: gone when the process ends.

    Parameters
    ----------
    size : int or str
        Bytes, as an int or as text: ``"8GiB"``. The system commits them as they are used, but for page-locked memory,
        which is what a machine with a CUDA device gives.
    strategy : str or EvictionStrategy
        What is given up first when it is full.
    pinned : bool
        Whether that memory is page-locked; not in a process that leaves the device to another.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(self, size: int | str, *, strategy: Strategy = "lru", pinned: bool = True) -> None:
        slots = _Memory(require_size("size", size), require_flag("pinned", pinned))
        super().__init__(slots, strategy=as_strategy(strategy))


class _Memory:
    """Slots in one array."""

    medium = "CPU"
    is_read_only = False

    def __init__(self, size: int, is_pinned: bool) -> None:
        self._size, self._is_pinned = size, is_pinned
        self._slots = np.zeros((0, 1), np.uint8)

    def open(self, block: BlockFormat) -> Kept:
        num_slots = self._size // block.block_bytes
        if num_slots < 1:
            hint = "one block has to fit"
            raise bad_argument("size", f"at least {block.block_bytes} bytes", f"{self._size}", hint)
        try:
            self._slots = _host_memory(num_slots, block.block_bytes, self._is_pinned)
        except (RuntimeError, MemoryError) as error:
            hint = f"{format_bytes(num_slots * block.block_bytes)} of memory cannot be had"
            raise OutOfMemory(num_slots, 0, hint) from error
        return Kept(num_slots, None, (), np.zeros(num_slots, np.uint64))

    def name_of_salt(self, cache_salt: str) -> str:
        return cache_salt

    def read(self, slots: Ints, rows: Rows, places: Ints) -> None:
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            rows[place] = self._slots[slot]

    def write(self, slots: Ints, rows: Rows, places: Ints) -> None:
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            self._slots[slot] = rows[place]

    def prepared(self, entries: Entries) -> None:
        return None

    def forget(self) -> None:
        pass

    def close(self, blocks: npt.NDArray[Any] | None) -> None:
        self._slots = np.zeros((0, 1), np.uint8)


def _host_memory(num_slots: int, block_bytes: int, is_pinned: bool) -> Rows:
    """Return uninitialised memory, page-locked where a device could copy from it."""
    if not is_pinned or not cuda_devices():
        return np.empty((num_slots, block_bytes), np.uint8)
    import torch

    rows: Rows = torch.empty((num_slots, block_bytes), dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    return rows
