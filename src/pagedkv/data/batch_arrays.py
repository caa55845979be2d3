"""The arrays of a ragged batch, block tables and lengths: their kind, their shape, and where they point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, int32

from pagedkv.errors import InvalidOperation
from pagedkv.jit import compiled
from pagedkv.spec import MAX_COUNT

__all__ = ["Int32Array", "first_fault", "int32_array", "require_shape"]

Int32Array = npt.NDArray[np.int32]


def int32_array(name: str, numbers: Any, dims: int) -> Int32Array:
    """Return a C-contiguous, writable int32 array: the kernels are compiled for that kind alone."""
    if isinstance(numbers, Tensor):
        if numbers.device.type != "cpu":
            raise InvalidOperation(f"{name}: expected a NumPy array or a CPU tensor, got one on {numbers.device}")
        numbers = numbers.detach().numpy() if numbers.dtype == int32 else numbers
    if numbers.__class__ is not np.ndarray or numbers.dtype != np.int32:
        numbers = _narrowed(name, numbers)
    if numbers.ndim != dims:
        raise InvalidOperation(f"{name}: expected {dims} dimension(s), got shape {list(numbers.shape)}")
    array: Int32Array = numbers
    return array if array.flags.c_contiguous and array.flags.writeable else array.copy(order="C")


def _narrowed(name: str, numbers: Any) -> Int32Array:
    """Return integers of another kind, or lists of them, as int32; what does not fit is refused, not cut."""
    try:
        given = np.asarray(numbers)
    except (ValueError, TypeError, RuntimeError):
        given = np.empty(1, object)
    if given.dtype.kind not in "iu" and given.size:
        kind = getattr(numbers, "dtype", type(numbers).__name__)
        raise InvalidOperation(f"{name}: expected an int32 array or tensor, got {kind}")
    if given.size and (given.min() < -MAX_COUNT or given.max() > MAX_COUNT):
        raise InvalidOperation(f"{name}: expected numbers that fit int32, got {given.min()} … {given.max()}")
    return given.astype(np.int32)


def require_shape(name: str, array: Int32Array, shape: tuple[int, ...], words: str) -> None:
    """Refuse an array of another shape; `words` say what the dimensions are."""
    if array.shape != shape:
        raise InvalidOperation(f"{name}: expected shape {words} = {list(shape)}, got {list(array.shape)}")


_FAULTS = (
    "",
    "cu_seqlens_q: expected to begin with 0, got {got}",
    "cu_seqlens_q: expected never to decrease, got {got} after {bound} at index {i}",
    "cu_seqlens_q: expected to end at {bound}, the number of queries, got {got}",
    "seq_lens: expected at least the {bound} query tokens of sequence {i}, got {got}",
    "holes: expected 0 <= start <= end and start <= seq_len in sequence {i}, got start {got} and end {bound}",
    "block_tables: expected at least {bound} columns for sequence {i}, got {got}",
    "block_tables: expected block ids below {bound} in sequence {i}, got {got}",
)


def first_fault(
    block_tables: Int32Array,
    seq_lens: Int32Array,
    cu_seqlens_q: Int32Array,
    holes: Int32Array,
    block_size: int,
    num_blocks: int,
    total_tokens: int,
) -> str:
    """Return what is wrong with the arrays of a batch, C-contiguous and of the right shapes; "" if nothing."""
    fault, i, got, bound = _first_fault(
        block_tables, seq_lens, cu_seqlens_q, holes, block_size, num_blocks, total_tokens
    )
    return _FAULTS[fault].format(i=i, got=got, bound=bound)


@compiled
def _first_fault(
    block_tables: Int32Array,
    seq_lens: Int32Array,
    cu_seqlens_q: Int32Array,
    holes: Int32Array,
    block_size: int,
    num_blocks: int,
    total_tokens: int,
) -> tuple[int, int, int, int]:
    """Return (fault, sequence, what came, what was expected); fault 0 is none."""
    if cu_seqlens_q[0] != 0:
        return 1, 0, cu_seqlens_q[0], 0
    for i in range(len(seq_lens)):
        num_queries = cu_seqlens_q[i + 1] - cu_seqlens_q[i]
        if num_queries < 0:
            return 2, i + 1, cu_seqlens_q[i + 1], cu_seqlens_q[i]
        if seq_lens[i] < num_queries:
            return 4, i, seq_lens[i], num_queries
        start, end = holes[i, 0], holes[i, 1]
        if not 0 <= start <= end or start > seq_lens[i]:
            return 5, i, start, end
        num_slots = seq_lens[i] + (end - start if start < seq_lens[i] else 0)
        needed = (num_slots + block_size - 1) // block_size
        if needed > block_tables.shape[1]:
            return 6, i, block_tables.shape[1], needed
        for j in range(needed):
            if start <= j * block_size and (j + 1) * block_size <= end:
                continue  # wholly inside the hole: never read
            block = block_tables[i, j]
            if not 0 <= block < num_blocks:
                return 7, i, block, num_blocks
    if cu_seqlens_q[-1] != total_tokens:
        return 3, 0, cu_seqlens_q[-1], total_tokens
    return 0, 0, 0, 0
