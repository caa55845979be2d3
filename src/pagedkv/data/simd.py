"""What the CPU kernels do with a vector of sixteen numbers: load, compute, reduce, store; and atomic counters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from pagedkv.data import simd_llvm as llvm
from pagedkv.data.simd_llvm import (
    FLOAT,
    LANES,
    ROWS,
    SHORTS,
    VECTOR,
    Array,
    Build,
    Function,
    Lanes,
    lanes,
)


@llvm.at_index(
    lambda builder, dtype, at: llvm.widened_bits(builder, llvm.read(builder, dtype, at, LANES), dtype), lanes
)
def load(array: Array, index: int) -> Lanes:
    """Return ``array[index : index + LANES]`` as float32."""
    return llvm.widened(array[index : index + LANES])


@llvm.at_index(
    lambda builder, dtype, at, count: llvm.widened_bits(builder, llvm.read_part(builder, dtype, at, count), dtype),
    lanes,
    types.int64,
)
def load_part(array: Array, index: int, count: int) -> Lanes:
    """Return ``array[index : index + count]`` as float32 and zeros behind; nothing else is read."""
    result = np.zeros(LANES, np.float32)
    result[:count] = llvm.widened(array[index : index + count])
    return result


def _bits_of_pairs(builder: Any, halves: list[Any]) -> Any:
    """Return the numbers of two vectors of as many bfloat16 as there are lanes, one of each after the other."""
    order = [place for lane in range(LANES) for place in (lane, LANES + lane)]
    return builder.bitcast(llvm.shuffled(builder, halves[0], halves[1], order), VECTOR)


def _of_two(build: Build, *others: Any) -> Callable[[Function], Function]:
    """Compile a function of an array, two places in it and more to the pairs of ``build(builder, dtype, address, …)``.

    Arrays of other kinds than uint16 have no pairs: what is compiled for them is never run.
    """

    def typing(array: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if array.dtype != types.uint16:
                return llvm.every(0.0)
            data = context.make_array(array)(context, builder, args[0]).data
            places = [builder.gep(data, [place]) for place in args[1:3]]
            return _bits_of_pairs(builder, [build(builder, array.dtype, place, *args[3:]) for place in places])

        return lanes(array, types.int64, types.int64, *others), generate

    return llvm.typed(typing)


def _pairs(first: Array, second: Array) -> Lanes:
    return np.stack((first, second), axis=1).reshape(-1).view(np.float32)


@_of_two(lambda builder, dtype, at: llvm.read(builder, dtype, at, LANES))
def load_pairs(array: Array, first: int, second: int) -> Lanes:
    """Return pairs of ``array[first : first + LANES]`` and as many from ``second`` on, uint16."""
    return _pairs(array[first : first + LANES], array[second : second + LANES])


@_of_two(lambda builder, dtype, at, count: llvm.read_part(builder, dtype, at, count), types.int64)
def load_pairs_part(array: Array, first: int, second: int, count: int) -> Lanes:
    """Return pairs of ``count`` numbers each and zeros behind; nothing else is read."""
    parts = np.zeros((2, LANES), np.uint16)
    parts[:, :count] = array[first : first + count], array[second : second + count]
    return _pairs(*parts)


def _read_spread(builder: Any, dtype: Any, address: Any) -> Any:
    some = llvm.read(builder, dtype, address, LANES // ROWS)
    return llvm.shuffled(builder, some, some, [lane // ROWS for lane in range(LANES)])


@llvm.at_index(_read_spread, lanes)
def spread(array: Array, index: int) -> Lanes:
    """Return ``array[index : index + LANES / ROWS]``, float32, each number in the lanes of all rows."""
    return np.repeat(array[index : index + LANES // ROWS], ROWS)


@llvm.at_index(lambda builder, dtype, at, value: llvm.write(builder, at, value), types.void, lanes)
def store(array: Array, index: int, value: Lanes) -> None:
    """Write all lanes to ``array[index:]``, float32."""
    array[index : index + LANES] = value


@llvm.at_index(llvm.prefetch, types.void)
def prefetch(array: Array, index: int) -> None:
    """Ask for the cache line of ``array[index]``, which may lie anywhere."""
    return


@llvm.at_index(lambda builder, dtype, at: llvm.prefetch(builder, dtype, at, to_write=True), types.void)
def prefetch_to_write(array: Array, index: int) -> None:
    """Ask for the cache line of ``array[index]`` to write to it, which may lie anywhere."""
    return


@llvm.at_index(lambda builder, dtype, at: llvm.spread(builder, builder.load(at), VECTOR), lanes)
def splat_at(array: Array, index: int) -> Lanes:
    """Return ``array[index]``, float32, in every lane."""
    return np.full(LANES, array[index], np.float32)


@llvm.of_lanes(lambda builder: llvm.every(0.0))
def zeros() -> Lanes:
    """Return zeros."""
    return np.zeros(LANES, np.float32)


@llvm.typed(lambda _: (lanes(types.float32), lambda context, builder, sig, args: llvm.spread(builder, args[0], VECTOR)))
def splat(number: float | np.floating[Any]) -> Lanes:
    """Return one float32 in every lane."""
    return np.full(LANES, number, np.float32)


@llvm.of_lanes(lambda builder, x, y, z: llvm.call(builder, "fma", x, y, z))
def fma(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    """Return ``x * y + z``, rounded once."""
    return (x.astype(np.float64) * y + z).astype(np.float32)


@llvm.of_lanes(lambda builder, x, y: builder.fadd(x, y))
def add(x: Lanes, y: Lanes) -> Lanes:
    """Return ``x + y``."""
    return x + y


@llvm.of_lanes(lambda builder, x, y: builder.fsub(x, y))
def sub(x: Lanes, y: Lanes) -> Lanes:
    """Return ``x - y``."""
    return x - y


@llvm.of_lanes(lambda builder, x, y: builder.fmul(x, y))
def mul(x: Lanes, y: Lanes) -> Lanes:
    """Return ``x * y``."""
    return x * y


@llvm.of_lanes(llvm.greater_of)
def maximum(x: Lanes, y: Lanes) -> Lanes:
    """Return the greater of each; ``y`` where ``x`` is NaN."""
    return np.where(x > y, x, y)


@llvm.of_lanes(
    lambda builder, x: builder.select(builder.fcmp_ordered("==", x, llvm.every(-math.inf)), llvm.every(0.0), x)
)
def finite_or_zero(x: Lanes) -> Lanes:
    """Return x, with 0 in place of -inf."""
    return np.where(x == -np.inf, np.float32(0), x)


@llvm.of_lanes(llvm.any_greater, types.boolean)
def any_greater(x: Lanes, y: Lanes) -> bool:
    """Tell whether any lane of x is greater than that of y."""
    return bool((x > y).any())


@llvm.of_lanes(
    lambda builder, x, y, gap: builder.select(builder.fcmp_ordered(">", x, builder.fadd(y, gap)), x, y),
)
def raised(x: Lanes, y: Lanes, gap: Lanes) -> Lanes:
    """Return x where it is greater than ``y + gap``, else y."""
    return np.where(x > y + gap, x, y)


def _seen(builder: Any, x: Any, first: Any, low: Any, high: Any) -> Any:
    token = builder.fadd(first, ir.Constant(VECTOR, [float(lane // ROWS) for lane in range(LANES)]))
    inside = builder.and_(builder.fcmp_ordered(">=", token, low), builder.fcmp_ordered("<", token, high))
    return builder.select(inside, x, llvm.every(-math.inf))


@llvm.of_lanes(_seen)
def seen(x: Lanes, first: Lanes, low: Lanes, high: Lanes) -> Lanes:
    """Return the scores of tokens from ``first`` on that lie in ``low`` … ``high``, and -inf for others."""
    token = first + np.arange(LANES, dtype=np.float32) // ROWS
    return np.where((low <= token) & (token < high), x, np.float32(-np.inf))


@llvm.of_lanes(lambda builder, x: llvm.by_row(builder, x, lambda a, b: llvm.greater_of(builder, a, b)))
def maximum_by_row(x: Lanes) -> Lanes:
    """Return the maximum of each row in all of the row's lanes."""
    return np.tile(np.fmax.reduce(x.reshape(-1, ROWS)), LANES // ROWS)


@llvm.of_lanes(lambda builder, x: llvm.by_row(builder, x, builder.fadd))
def sum_by_row(x: Lanes) -> Lanes:
    """Return the sum of each row in all of the row's lanes."""
    return np.tile(x.reshape(-1, ROWS).sum(axis=0), LANES // ROWS)


@llvm.of_lanes(llvm.exp2)
def exp2(x: Lanes) -> Lanes:
    """Return 2 ** x for x below 127, to float32's precision; below 2 ** -126 it may be 0."""
    return np.exp2(x)


@llvm.of_lanes(llvm.exp2_to_bfloat16)
def exp2_to_bfloat16(x: Lanes) -> Lanes:
    """Return 2 ** x for x below 127, to be rounded to bfloat16; exact for whole numbers."""
    return np.exp2(x)


@llvm.of_lanes(llvm.tanh)
def tanh(x: Lanes) -> Lanes:
    """Return tanh(x), to float32's precision."""
    return np.tanh(x)


@llvm.typed(
    lambda number, array: (
        array.dtype(types.float32, array),
        lambda context, builder, signature, args: llvm.narrowed_to(builder, array.dtype, args[0]),
    )
)
def narrowed(number: float | np.floating[Any], array: Array) -> Any:
    """Return a float32 as an element of ``array``: itself, or the bits of the nearest bfloat16 or float16."""
    if array.dtype == np.int16:
        return np.float32(number).astype(np.float16).view(np.int16)
    if array.dtype == np.uint16:
        if np.isnan(number):
            return np.uint16(0x7FC0)
        bits = int(np.float32(number).view(np.uint32))
        return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return np.float32(number)


@llvm.at_index(
    lambda builder, dtype, at, amount: builder.atomic_rmw("add", at, amount, "acq_rel"), types.int64, types.int64
)
def fetch_add(counters: Array, index: int, amount: int) -> int:
    """Add to ``counters[index]`` as one step for all threads and return what it was.

    What a thread wrote before is seen by every thread that adds later.
    """
    counters[index] += amount
    return int(counters[index]) - amount


def _sigmoid(builder: Any, x: Any) -> Any:
    size = llvm.call(builder, "fabs", x)
    power = llvm.exp2(builder, builder.fmul(size, llvm.every(-1 / math.log(2))))
    share = builder.fdiv(llvm.every(1.0), builder.fadd(llvm.every(1.0), power))
    return builder.select(builder.fcmp_unordered("<", x, llvm.every(0.0)), builder.fmul(power, share), share)


@llvm.of_lanes(_sigmoid)
def sigmoid(x: Lanes) -> Lanes:
    """Return 1 / (1 + e ** -x), to float32's precision."""
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)


def write_narrowed(builder: Any, dtype: Any, address: Any, value: Any) -> None:
    """Write all lanes to an address, as `store_narrowed` does."""
    if dtype == types.uint16 and llvm.has_bfloat16_products():
        value = builder.bitcast(builder.fptrunc(value, ir.VectorType(llvm.Bfloat(), LANES)), SHORTS)
    else:  # elsewhere LLVM would narrow to bfloat16 by a function of a library that is not there
        value = llvm.narrowed_to(builder, dtype, value)
    llvm.write(builder, address, value, dtype.bitwidth // 8)


@llvm.at_index(write_narrowed, types.void, lanes)
def store_narrowed(array: Array, index: int, value: Lanes) -> None:
    """Write all lanes to ``array[index:]``: as they are, or the bits of the nearest bfloat16 or float16."""
    array[index : index + LANES] = [narrowed(number, array) for number in value]


@llvm.at_index(llvm.load_count, types.int64)
def load_count(counters: Array, index: int) -> int:
    """Return ``counters[index]``, int64, read anew each time, and see what was written before it was added to."""
    return int(counters[index])


@llvm.nothing_but(llvm.pause)
def pause() -> None:
    """Tell the processor that this loop waits for another thread: 20 to 50 ns."""
    return


@llvm.nothing_but(llvm.give_way)
def give_way() -> None:
    """Let another thread that is ready have this processor; return at once, within 1 µs, where there is none."""
    time.sleep(0)


@llvm.at_index(lambda builder, dtype, address: builder.load(address), types.float32)
def take(array: Array, index: int) -> Any:
    """Return ``array[index]``, float32; the index may be negative, and is no wrap."""
    return array[index]


def _read_number(builder: Any, dtype: Any, address: Any) -> Any:
    number = builder.load(address)
    bits = llvm.spread(builder, number, ir.VectorType(number.type, LANES))
    return builder.extract_element(llvm.widened_bits(builder, bits, dtype), llvm.INT(0))


@llvm.at_index(_read_number, types.float32)
def take_widened(array: Array, index: int) -> Any:
    """Return ``array[index]`` as float32, as `load` widens it; the index may be negative, and is no wrap."""
    return llvm.widened(array[index : index + 1])[0]


def _write_scalar(builder: Any, dtype: Any, address: Any, number: Any) -> None:
    builder.store(llvm.narrowed_to(builder, dtype, number), address)


@llvm.at_index(_write_scalar, types.void, types.float32)
def put(array: Array, index: int, number: float | np.floating[Any]) -> None:
    """Write one float32 to ``array[index]``, narrowed as by `narrowed`; the index may be negative, and is no wrap."""
    array[index] = narrowed(number, array)


_FOUR = ir.VectorType(FLOAT, LANES // 4)


def _read_fours(array: Any, places: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, parts = context.make_array(array)(context, builder, args[0]).data, []
        for place in cgutils.unpack_tuple(builder, args[1]):
            part = builder.load(builder.bitcast(builder.gep(data, [place]), _FOUR.as_pointer()))
            part.align = 4
            parts.append(part)
        while len(parts) > 1:
            size = 2 * parts[0].type.count
            parts = [llvm.shuffled(builder, x, y, range(size)) for x, y in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return lanes(array, places), generate


@llvm.typed(_read_fours)
def load_fours(array: Array, places: tuple[int, int, int, int]) -> Lanes:
    """Return four numbers, float32, from each of four places."""
    return np.concatenate([array[place : place + 4] for place in places])


def _if_of(dtype: Any) -> Callable[[Function], Function]:
    """Compile a question about an array's dtype to its answer."""

    def typing(array: Any) -> Any:
        return types.boolean(array), lambda *_: ir.Constant(ir.IntType(1), int(array.dtype == dtype))

    return llvm.typed(typing)


@_if_of(types.uint16)
def is_bfloat16(array: Array) -> bool:
    """Tell, as the code is compiled, whether an array is of bfloat16."""
    return bool(array.dtype == np.uint16)


@_if_of(types.int8)
def is_int8(array: Array) -> bool:
    """Tell, as the code is compiled, whether an array is of int8."""
    return bool(array.dtype == np.int8)
