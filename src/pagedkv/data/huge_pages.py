"""Huge pages: weights at whole cache lines, in memory that is mapped 2 MiB at a time.

A decode step of one sequence takes as long as its weights take to read. Loading maps a file of safetensors: there they
lie in pages of 4 KiB and, as the file's header has any length, across cache lines. Both slow reading down.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.simd_llvm import CACHE_LINE
from pagedkv.machine import drop_pages, free_memory

HUGE_PAGE = 2 << 20
CHUNK = 256 << 20
"""Bytes that are reserved at once; what is never written takes up no memory."""
MIN_BYTES = 32 << 20
"""Weights of fewer bytes stay in a processor's caches, and where they are."""

Range = tuple[int, int]


def huge_pages(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return memory that begins at a huge page, uint8 [num_bytes]: NumPy asks for such pages, Linux gives them."""
    memory = np.empty(num_bytes + HUGE_PAGE, np.uint8)
    begin = -memory.ctypes.data % HUGE_PAGE
    return memory[begin : begin + num_bytes]


class HugePages:
    """Room for tensors one after the other."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that is not written yet, with a storage of its own."""
        size = math.prod(shape) * dtype.itemsize
        apart = -(-size // CACHE_LINE) * CACHE_LINE
        if apart > len(self._room):
            self._room = huge_pages(max(CHUNK, apart))
        memory, self._room = self._room[:size], self._room[apart:]
        return torch.from_numpy(memory).view(dtype).view(shape)


def move_weights(model: torch.nn.Module) -> None:
    """Move a model's weights on the CPU into huge pages, one by one; what they leave is given back.

    They stay where they are if they take up little, if less than twice as much memory is free, or if they share some.
    """
    kept = [each for each in model.parameters() if _is_plain(each)]
    ranges = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in kept)
    total = sum(end - begin for begin, end in ranges)
    share = any(end > begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False))
    if total < MIN_BYTES or share or free_memory() < 2 * total:
        return
    room, files = HugePages(), MappedFiles()
    for parameter in kept:
        old = parameter.data
        parameter.data = room.empty(tuple(old.shape), old.dtype).copy_(old)
        files.give_back(old)


def _is_plain(parameter: torch.nn.Parameter) -> bool:
    is_here = parameter.device.type == "cpu" and parameter.layout == torch.strided
    return is_here and type(parameter) is torch.nn.Parameter and parameter.is_contiguous() and parameter.numel() > 0


class MappedFiles:
    """Where files are mapped that this process alone would change; nowhere where the system does not say."""

    def __init__(self, maps: Path = Path("/proc/self/maps")) -> None:
        try:
            lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
        except OSError:
            lines = []
        found = [line[0].split("-") for line in lines if line[1].endswith("p") and line[4] != "0"]
        self._ranges: list[Range] = [(int(begin, 16), int(end, 16)) for begin, end in found]

    def give_back(self, tensor: Tensor) -> None:
        """Let go of the whole pages of a mapped file that a contiguous tensor, which nobody will read, lies in."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not any(first <= begin and end <= last for first, last in self._ranges):
            return
        size = mmap.PAGESIZE
        first, last = -(-begin // size) * size, end // size * size
        if first < last:
            drop_pages(first, last - first)
