"""Lanes as NumPy arrays, for ``NUMBA_DISABLE_JIT=1``: slow, and the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# ruff: noqa: D103 - each function is documented in simd_llvm or lanes_math


Lanes = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

LANES = 16
ROWS = 4
"""Query rows that are worked on together; lane ``i`` belongs to row ``i % ROWS`` where lanes hold scores."""


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


def load(array: Array, index: int) -> Lanes:
    return _widened(array[index : index + LANES])


def load_part(array: Array, index: int, count: int) -> Lanes:
    result = np.zeros(LANES, np.float32)
    result[:count] = _widened(array[index : index + count])
    return result


def spread(array: Array, index: int) -> Lanes:
    return np.repeat(array[index : index + LANES // ROWS], ROWS)


def store(array: Array, index: int, value: Lanes) -> None:
    array[index : index + LANES] = value


def store_half(array: Array, index: int, value: Lanes) -> None:
    array[index : index + 8] = value[:8]


def prefetch(array: Array, index: int) -> None:
    return


def zeros() -> Lanes:
    return np.zeros(LANES, np.float32)


def splat(number: float | np.floating[Any]) -> Lanes:
    return np.full(LANES, number, np.float32)


def fma(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    return (x.astype(np.float64) * y + z).astype(np.float32)


def add(x: Lanes, y: Lanes) -> Lanes:
    return x + y


def sub(x: Lanes, y: Lanes) -> Lanes:
    return x - y


def mul(x: Lanes, y: Lanes) -> Lanes:
    return x * y


def maximum(x: Lanes, y: Lanes) -> Lanes:
    return np.where(x > y, x, y)


def finite_or_zero(x: Lanes) -> Lanes:
    return np.where(x == -np.inf, np.float32(0), x)


def any_greater(x: Lanes, y: Lanes) -> bool:
    return bool((x > y).any())


def sums(*values: Lanes) -> Lanes:
    return np.resize(np.array([value.sum() for value in values], np.float32), LANES)


def maximum_by_row(x: Lanes) -> Lanes:
    return np.tile(np.fmax.reduce(x.reshape(-1, ROWS)), LANES // ROWS)


def sum_by_row(x: Lanes) -> Lanes:
    return np.tile(x.reshape(-1, ROWS).sum(axis=0), LANES // ROWS)


def exp2(x: Lanes) -> Lanes:
    return np.where(x < -126, np.float32(0), np.exp2(x))


def tanh(x: Lanes) -> Lanes:
    return np.tanh(x)


def narrowed(number: float | np.floating[Any], array: Array) -> Any:
    if array.dtype == np.int16:
        return np.float32(number).astype(np.float16).view(np.int16)
    if array.dtype == np.uint16:
        if np.isnan(number):
            return np.uint16(0x7FC0)
        bits = int(np.float32(number).view(np.uint32))
        return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return np.float32(number)


def fetch_add(counters: Array, index: int, amount: int) -> int:
    counters[index] += amount
    return int(counters[index]) - amount
