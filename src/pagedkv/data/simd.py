"""SIMD vectors: sixteen float32 numbers as one Numba value, so that a kernel says itself what runs side by side.

LLVM's own vectoriser gives up where several rows are written at once, or makes a reduction of every dot product. Here
one value is one AVX-512 register (two of AVX2, four of NEON), and the few functions below are all that the kernels do
with it. bfloat16, float16 and float8_e4m3fn have no NumPy type that Numba knows: they come as their bit patterns,
**uint16 for bfloat16, int16 for float16 and uint8 for float8_e4m3fn**, and are widened as they are loaded, as int8 is.

Indices are trusted: nothing checks them and nothing wraps around. What stands here is plain Python over NumPy arrays,
for ``NUMBA_DISABLE_JIT=1``: slow, and the same. Else each function is the intrinsic of its name in
:mod:`pagedkv.data.simd_llvm`, where it is documented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from pagedkv.data import simd_llvm

# ruff: noqa: D103 - each function is documented in simd_llvm

Lanes = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

LANES: int = simd_llvm.LANES
ROWS: int = simd_llvm.ROWS
"""Query rows that are worked on together; lane ``i`` belongs to row ``i % ROWS`` where lanes hold scores."""


def _intrinsic(twin: Function) -> Function:
    """Return the intrinsic of the same name, or where nothing is compiled the function itself."""
    found: Function = twin if numba.config.DISABLE_JIT else getattr(simd_llvm, twin.__name__)  # type: ignore[attr-defined]
    return found


def _widened(bits: Array) -> Lanes:
    if bits.dtype == np.uint16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if bits.dtype == np.int16:
        return bits.view(np.float16).astype(np.float32)
    if bits.dtype == np.int8:
        return bits.astype(np.float32)
    if bits.dtype == np.uint8:
        places = bits.view(np.int8).astype(np.int16) << 7 & ~0x4000
        return places.view(np.float16).astype(np.float32) * np.float32(256)
    return bits.copy()


@_intrinsic
def load(array: Array, index: int) -> Lanes:
    return _widened(array[index : index + LANES])


@_intrinsic
def load_part(array: Array, index: int, count: int) -> Lanes:
    result = np.zeros(LANES, np.float32)
    result[:count] = _widened(array[index : index + count])
    return result


@_intrinsic
def spread(array: Array, index: int) -> Lanes:
    return np.repeat(array[index : index + LANES // ROWS], ROWS)


@_intrinsic
def store(array: Array, index: int, value: Lanes) -> None:
    array[index : index + LANES] = value


@_intrinsic
def store_half(array: Array, index: int, value: Lanes) -> None:
    array[index : index + 8] = value[:8]


@_intrinsic
def prefetch(array: Array, index: int) -> None:
    return


@_intrinsic
def zeros() -> Lanes:
    return np.zeros(LANES, np.float32)


@_intrinsic
def splat(number: float | np.floating[Any]) -> Lanes:
    return np.full(LANES, number, np.float32)


@_intrinsic
def fma(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    return (x.astype(np.float64) * y + z).astype(np.float32)


@_intrinsic
def add(x: Lanes, y: Lanes) -> Lanes:
    return x + y


@_intrinsic
def sub(x: Lanes, y: Lanes) -> Lanes:
    return x - y


@_intrinsic
def mul(x: Lanes, y: Lanes) -> Lanes:
    return x * y


@_intrinsic
def maximum(x: Lanes, y: Lanes) -> Lanes:
    return np.where(x > y, x, y)


@_intrinsic
def finite_or_zero(x: Lanes) -> Lanes:
    return np.where(x == -np.inf, np.float32(0), x)


@_intrinsic
def any_greater(x: Lanes, y: Lanes) -> bool:
    return bool((x > y).any())


@_intrinsic
def sums(*values: Lanes) -> Lanes:
    return np.resize(np.array([value.sum() for value in values], np.float32), LANES)


@_intrinsic
def maximum_by_row(x: Lanes) -> Lanes:
    return np.tile(np.fmax.reduce(x.reshape(-1, ROWS)), LANES // ROWS)


@_intrinsic
def sum_by_row(x: Lanes) -> Lanes:
    return np.tile(x.reshape(-1, ROWS).sum(axis=0), LANES // ROWS)


@_intrinsic
def exp2(x: Lanes) -> Lanes:
    return np.where(x < -126, np.float32(0), np.exp2(x))


@_intrinsic
def tanh(x: Lanes) -> Lanes:
    return np.tanh(x)


@_intrinsic
def narrowed(number: float | np.floating[Any], array: Array) -> Any:
    if array.dtype == np.int16:
        return np.float32(number).astype(np.float16).view(np.int16)
    if array.dtype == np.uint16:
        if np.isnan(number):
            return np.uint16(0x7FC0)
        bits = int(np.float32(number).view(np.uint32))
        return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return np.float32(number)


@_intrinsic
def fetch_add(counters: Array, index: int, amount: int) -> int:
    counters[index] += amount
    return int(counters[index]) - amount
