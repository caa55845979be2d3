"""Products that keep their sums in registers: dot products of rows and columns, and small products of matrices.

Left to itself LLVM would keep the sums in memory. What is multiplied is float32, or pairs of bfloat16 where the
processor multiplies those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from pagedkv.data import simd_llvm as llvm
from pagedkv.data.simd import fma, load, narrowed, splat_at, store, write_narrowed
from pagedkv.data.simd_llvm import (
    FLOAT,
    INT,
    LANES,
    ROWS,
    SHORT,
    VECTOR,
    Array,
    Build,
    Function,
    Lanes,
    has_bfloat16_products,
    lanes,
)

# Dot products.


def _paired(builder: Any, bits: Any, dtype: Any) -> Any:
    """Return twice as many numbers as there are lanes as bfloat16, without rounding."""
    if dtype == types.uint16:
        return builder.bitcast(bits, llvm.BFLOATS)
    numbers = builder.sitofp(builder.sext(bits, ir.VectorType(INT, 2 * LANES)), ir.VectorType(FLOAT, 2 * LANES))
    halves = [llvm.shuffled(builder, numbers, numbers, range(first, first + LANES)) for first in (LANES, 0)]
    # One instruction for both halves: LLVM makes two of a truncation, and a third that joins them.
    kind = ir.FunctionType(llvm.BFLOATS, [VECTOR, VECTOR])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), halves)


def _has_byte_tables() -> bool:
    """Tell whether a vector of bytes can be looked up in a table of two vectors, and what comes out be multiplied."""
    return has_bfloat16_products() and llvm.has("avx512vbmi")


def _table(high: int) -> list[Any]:
    """Return the lower or the higher bytes of 0 … 127 as bfloat16, half of them in a vector."""
    bits = np.arange(128).astype(np.float32).view(np.uint32) >> (16 + 8 * high)
    return [ir.Constant(_BYTES, [int(byte) & 0xFF for byte in half]) for half in bits.reshape(2, -1)]


_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)


def _looked_up(builder: Any, bits: Any) -> list[Any]:
    """Return 64 numbers of int8, none of them -128, as two vectors of bfloat16: in three quarters of the time."""
    kind = ir.FunctionType(_BYTES, [_BYTES, ir.IntType(1)])
    absolute = cgutils.get_or_insert_function(builder.module, kind, f"llvm.abs.v{_BYTES.count}i8")
    size = builder.call(absolute, [bits, ir.IntType(1)(0)])
    kind = ir.FunctionType(_BYTES, [_BYTES] * 3)
    look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")
    low, high = (builder.call(look_up, [table[0], size, table[1]]) for table in (_table(0), _table(1)))
    high = builder.or_(high, builder.and_(bits, llvm.every_int(0x80, _BYTES)))
    order = [place for i in range(_BYTES.count) for place in (i, _BYTES.count + i)]
    halves = order[: _BYTES.count], order[_BYTES.count :]
    return [builder.bitcast(llvm.shuffled(builder, low, high, half), llvm.BFLOATS) for half in halves]


def _multiplied(builder: Any, x: Any, y: Any, total: Any) -> Any:
    """Add the products of two vectors of float32, or of pairs of bfloat16, to a sum of each lane."""
    if x.type == VECTOR:
        return llvm.call(builder, "fma", x, y, total)
    kind = ir.FunctionType(VECTOR, [VECTOR, llvm.BFLOATS, llvm.BFLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [total, x, y])


class _Runs:
    """Some runs of one array, read side by side, as what is multiplied."""

    def __init__(self, builder: Any, dtype: Any, starts: list[Any], width: int) -> None:
        self._builder, self._dtype, self._starts, self._width = builder, dtype, starts, width

    def two_at(self, offset: Any) -> list[list[Any]]:
        """Return two vectors of each run, of int8."""
        builder, count = self._builder, 2 * self._width
        places = [builder.gep(start, [offset]) for start in self._starts]
        return [_looked_up(builder, llvm.read(builder, self._dtype, place, count)) for place in places]

    def at(self, offset: Any, count: Any = None) -> list[Any]:
        """Return a vector of each run, behind `count` numbers of zeros if that is given."""
        builder, found = self._builder, []
        for start in self._starts:
            address = builder.gep(start, [offset])
            if count is None:
                bits = llvm.read(builder, self._dtype, address, self._width)
            else:
                bits = llvm.read_part(builder, self._dtype, address, count, self._width)
            widen = llvm.widened_bits if self._width == LANES else _paired
            found.append(widen(builder, bits, self._dtype))
        return found


def _dot_tile(context: Any, builder: Any, signature: Any, args: Any, is_stream: bool = False) -> Any:
    """Build the sums of lanes, and their totals."""
    sums = _along_runs(context, builder, signature, args, is_stream=is_stream or signature.args[1].count == 1)
    data = context.make_array(signature.args[5])(context, builder, args[5]).data
    for first in range(0, len(sums), LANES):
        place = builder.gep(data, [args[4].type(first)])
        llvm.write(builder, place, _totals(builder, sums[first : first + LANES]))
    return context.get_dummy_value()


def _places_of(context: Any, builder: Any, array: Any, args: Any, count: int) -> list[Any]:
    """Return where so many vectors of an array are, from an index on."""
    data = builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
    return [builder.gep(data, [args[1].type(i * LANES)]) for i in range(count)]


def _add_dots(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build the same with sums that begin and end in memory, lanes and all."""
    count = signature.args[1].count * signature.args[3].count
    places = _places_of(context, builder, signature.args[5], args[5:], count)
    sums = [llvm.read(builder, types.float32, place, LANES) for place in places]
    for place, total in zip(places, _along_runs(context, builder, signature, args, sums), strict=True):
        llvm.write(builder, place, total)
    return context.get_dummy_value()


def _along_runs(
    context: Any, builder: Any, signature: Any, args: Any, sums: list[Any] | None = None, is_stream: bool = False
) -> list[Any]:
    """Build the loop along the runs, and what is left of them behind whole vectors, from zeros or from some sums on.

    Columns come all at once or, as a stream, one after the other: of several runs side by side, each so short, many
    processors see no stream, and the memory rests.
    """
    x, rows, y, columns = signature.args[:4]
    width, count = _run_of(x), args[4]
    whole = builder.and_(count, count.type(-width))
    rest = builder.sub(count, whole)  # at most once
    left = _Runs(builder, x.dtype, _starts_of(context, builder, x, args[0], args[1]), width)

    def summed(starts: list[Any], sums: list[Any]) -> list[Any]:
        right = _Runs(builder, y.dtype, starts, width)

        def multiplied(totals: list[Any], numbers: list[Any], weights: list[Any]) -> list[Any]:
            result = []
            for i, number in enumerate(numbers):
                some = totals[i * len(weights) : (i + 1) * len(weights)]
                result += [_multiplied(builder, number, y, total) for y, total in zip(weights, some, strict=True)]
            return result

        def add(totals: list[Any], offset: Any, rest: Any = None) -> list[Any]:
            return multiplied(totals, left.at(offset, rest), right.at(offset, rest))

        def add_two(totals: list[Any], offset: Any) -> list[Any]:
            for i, weights in enumerate(zip(*right.two_at(offset), strict=True)):
                totals = multiplied(totals, left.at(builder.add(offset, count.type(i * width))), list(weights))
            return totals

        done = count.type(0)
        if y.dtype == types.int8 and width > LANES and _has_byte_tables():
            done = builder.and_(count, count.type(-2 * width))
            sums = _counted(builder, done, 2 * width, sums, lambda i, sums: add_two(sums, i))
        left_over = builder.sub(whole, done)
        sums = _counted(builder, left_over, width, sums, lambda i, sums: add(sums, builder.add(done, i)))
        return _counted(builder, rest, width, sums, lambda i, sums: add(sums, whole, rest))  # type: ignore[no-any-return]

    starts = _starts_of(context, builder, y, args[2], args[3])
    sums = sums or [llvm.every(0.0)] * (rows.count * columns.count)
    if not is_stream:
        return summed(starts, sums)
    some = [summed([start], sums[i :: columns.count]) for i, start in enumerate(starts)]
    return [total for row in zip(*some, strict=True) for total in row]


def _starts_of(context: Any, builder: Any, array: Any, value: Any, indices: Any) -> list[Any]:
    data = context.make_array(array)(context, builder, value).data
    return [builder.gep(data, [place]) for place in cgutils.unpack_tuple(builder, indices)]


def _totals(builder: Any, parts: list[Any]) -> Any:
    """Return the sum over all lanes of each part, in the lane of its number; neighbours are added first."""
    apart = 1
    while apart < LANES:
        pairs = zip(parts[::2], parts[1::2], strict=True) if len(parts) > 1 else [(parts[0], parts[0])]
        parts = [_added_across(builder, *pair, apart) for pair in pairs]
        apart *= 2
    return parts[0]


def _added_across(builder: Any, x: Any, y: Any, apart: int) -> Any:
    """Add lanes that are so far apart: of x where the lower one of both is, of y where the other one is.

    Two blends and a swap: a permutation of two vectors takes a processor of Zen 4 as long as four blends.
    """
    is_low = [not lane & apart for lane in range(LANES)]
    swapped = [lane ^ apart for lane in range(LANES)]
    kept = x if x is y else _blended(builder, x, y, is_low)
    moved = x if x is y else _blended(builder, y, x, is_low)
    return builder.fadd(kept, llvm.shuffled(builder, moved, moved, swapped))


def _blended(builder: Any, x: Any, y: Any, is_first: list[bool]) -> Any:
    return llvm.shuffled(builder, x, y, [lane if first else LANES + lane for lane, first in enumerate(is_first)])


@llvm.typed(lambda x, rows, y, columns, count, out: (types.void(x, rows, y, columns, types.int64, out), _dot_tile))
def dot_tile(x: Array, rows: tuple[int, ...], y: Array, columns: tuple[int, ...], count: int, out: Array) -> None:
    """Write the dot products of runs of `count` numbers of x, which begin at `rows`, and of y, at `columns`, to `out`.

    Rows and columns are tuples; ``out[row * len(columns) + column]``, float32, has room for a multiple of `LANES`. A
    product's order of additions depends on `count` alone. x is float32, and y any kind that `load` takes; or x is
    uint16, bfloat16, and y is uint16 or int8 without -128, where the processor `has_bfloat16_products`.
    """
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            total = np.zeros(LANES, np.float32)
            _add_run(x[row : row + count], y[column : column + count], total)
            out[i * len(columns) + j] = _total(total)


def _dot_stream(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return _dot_tile(context, builder, signature, args, is_stream=True)


@llvm.typed(lambda x, rows, y, columns, count, out: (types.void(x, rows, y, columns, types.int64, out), _dot_stream))
def dot_stream(x: Array, rows: tuple[int, ...], y: Array, columns: tuple[int, ...], count: int, out: Array) -> None:
    """Do as `dot_tile`, column by column: faster where y comes from memory, slower where it is in the caches."""
    dot_tile(x, rows, y, columns, count, out)


WIDENED = 4 * LANES
"""Numbers that `widen` copies."""


def _widen(context: Any, builder: Any, signature: Any, args: Any) -> None:
    numbers, _, target, _ = signature.args
    places = _places_of(context, builder, numbers, args, WIDENED // LANES)
    targets = _places_of(context, builder, target, args[2:], WIDENED // LANES)
    if (numbers.dtype, target.dtype) == (types.int8, types.uint16) and _has_byte_tables():
        halves = _looked_up(builder, llvm.read(builder, numbers.dtype, places[0], WIDENED))
        for to, half in zip(targets[::2], halves, strict=True):
            llvm.write(builder, to, half, target.dtype.bitwidth // 8)
        return
    for place, to in zip(places, targets, strict=True):
        some = llvm.read(builder, numbers.dtype, place, LANES)
        write_narrowed(builder, target.dtype, to, llvm.widened_bits(builder, some, numbers.dtype))


@llvm.typed(lambda numbers, index, target, to: (types.void(numbers, types.int64, target, types.int64), _widen))
def widen(numbers: Array, index: int, target: Array, to: int) -> None:
    """Copy 64 numbers that `load` takes, of int8 none of them -128, to ``target[to:]`` as `store_narrowed` does."""
    for i in range(WIDENED):
        target[to + i] = narrowed(np.float32(numbers[index + i]), target)


@llvm.typed(
    lambda x, rows, y, columns, count, sums, at: (
        types.void(x, rows, y, columns, types.int64, sums, types.int64),
        _add_dots,
    )
)
def add_dots(
    x: Array, rows: tuple[int, ...], y: Array, columns: tuple[int, ...], count: int, sums: Array, at: int
) -> None:
    """Add the products of parts of runs, each lane by itself, to `LANES` sums for each row and column from `at` on.

    Parts are of whole vectors but for the last of a run. All parts of runs one after the other, from zeros on, and the
    `totals` of that are bit by bit what `dot_tile` writes.
    """
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            place = at + (i * len(columns) + j) * LANES
            _add_run(x[row : row + count], y[column : column + count], sums[place : place + LANES])


def _add_run(x: Array, y: Array, sums: Array) -> None:
    width = 2 * LANES if x.dtype == np.uint16 else LANES
    products = np.zeros(-(-len(x) // width) * width, np.float32)
    products[: len(x)] = llvm.widened(x) * llvm.widened(y)
    for some in products.reshape(-1, LANES, width // LANES):
        sums += some.sum(axis=1)


def _sums_to_totals(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    places = _places_of(context, builder, signature.args[0], args, LANES)
    sums = [llvm.read(builder, types.float32, place, LANES) for place in places]
    llvm.write(builder, context.make_array(signature.args[2])(context, builder, args[2]).data, _totals(builder, sums))
    return context.get_dummy_value()


@llvm.typed(lambda sums, at, out: (types.void(sums, types.int64, out), _sums_to_totals))
def totals(sums: Array, at: int, out: Array) -> None:
    """Write the totals of `LANES` times as many sums, from `at` on, to `out`, as `dot_tile` adds them."""
    for i in range(LANES):
        out[i] = _total(sums[at + i * LANES : at + (i + 1) * LANES])


def _total(sums: Array) -> Any:
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    return sums[0]


# Products of four rows and some keys, and of weights and values.


def _counted(builder: Any, end: Any, step: int, sums: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> Any:
    """Build ``for i in range(0, end, step): sums = body(i, sums)``, with the sums in registers; return them."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", end.type(0), end), loop, after)
    builder.position_at_end(loop)
    index, phis = builder.phi(end.type), [builder.phi(VECTOR) for _ in sums]
    new = body(index, phis)
    following, last = builder.add(index, end.type(step)), builder.block
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)
    index.add_incoming(end.type(0), before)
    index.add_incoming(following, last)
    results = []
    for start, phi, value in zip(sums, phis, new, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, last)
        result = builder.phi(VECTOR)
        result.add_incoming(start, before)
        result.add_incoming(value, last)
        results.append(result)
    return results


def _summed(builder: Any, parts: list[Any]) -> Any:
    """Return a vector of the sums over the lanes of sixteen vectors, in their order: halves are added to halves."""
    size = LANES // 2
    while len(parts) > 1:
        kept = [lane if not lane & size else LANES + lane for lane in range(LANES)]
        moved = [lane ^ size if not lane & size else LANES + (lane ^ size) for lane in range(LANES)]
        pairs = list(zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True))
        parts = [
            builder.fadd(llvm.shuffled(builder, *pair, kept), llvm.shuffled(builder, *pair, moved)) for pair in pairs
        ]
        size //= 2
    return parts[0]


def _dots_of(rows: Any, at: Any, width: Any, keys: Any, *_: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if rows.dtype != types.float32:  # never run
            return llvm.every(0.0)
        row_data, key_data = (
            context.make_array(kind)(context, builder, args[i]).data for i, kind in ((0, rows), (3, keys))
        )
        begin, apart, dim = args[1], args[2], args[8]
        row_at = [builder.gep(row_data, [builder.add(begin, builder.mul(apart, dim.type(i)))]) for i in range(ROWS)]
        key_at = [builder.gep(key_data, [place]) for place in args[4:8]]

        def multiply(index: Any, sums: list[Any], read: Callable[[Any], Any]) -> list[Any]:
            some = [llvm.widened_bits(builder, read(builder.gep(place, [index])), keys.dtype) for place in key_at]
            each = [llvm.read(builder, types.float32, builder.gep(place, [index]), LANES) for place in row_at]
            return [_multiplied(builder, each[i % ROWS], some[i // ROWS], total) for i, total in enumerate(sums)]

        whole = builder.and_(dim, dim.type(-LANES))
        sums = [llvm.every(0.0)] * LANES
        sums = _counted(
            builder,
            whole,
            LANES,
            sums,
            lambda i, sums: multiply(i, sums, lambda at: llvm.read(builder, keys.dtype, at, LANES)),
        )
        # What is left of a row, at most once.
        rest = builder.sub(dim, whole)
        sums = _counted(
            builder,
            rest,
            LANES,
            sums,
            lambda i, sums: multiply(whole, sums, lambda at: llvm.read_part(builder, keys.dtype, at, rest)),
        )
        return _summed(builder, sums)

    return lanes(rows, types.int64, types.int64, keys, *[types.int64] * 5), generate


@llvm.typed(_dots_of)
def dots(rows: Array, at: int, width: int, keys: Array, a: int, b: int, c: int, d: int, dim: int) -> Lanes:
    """Return the products of four rows, ``width`` apart from ``at`` on, and the keys at a, b, c and d.

    Lane ``4 * key + row``. A lane's sum is over every sixteenth number, in their order; then halves are added to
    halves. Rows are float32, as long as whole vectors; where they are uint16 nothing is compiled.
    """
    result, step = np.empty(LANES, np.float32), LANES
    for lane in range(LANES):
        sums = np.zeros(LANES, np.float32)
        for i in range(0, dim, step):
            key, row, count = (a, b, c, d)[lane // ROWS] + i, at + lane % ROWS * width + i, min(step, dim - i)
            products = np.zeros(step, np.float32)
            products[:count] = llvm.widened(rows[row : row + count]) * llvm.widened(keys[key : key + count])
            sums = sums + products.reshape(LANES, -1).sum(axis=1)
        while len(sums) > 1:
            sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
        result[lane] = sums[0]
    return result


_BLOCKS = range(0, LANES, 4)
_SINGLES = [[i + j + k for i in _BLOCKS for j in half for k in (0, LANES)] for half in ((0, 1), (2, 3))]
_DOUBLES = [[i + j + k for i in _BLOCKS for k in (0, LANES) for j in half] for half in ((0, 1), (2, 3))]
_HALVES = [[k + i for k in (0, LANES) for i in half] for half in (range(8), range(8, LANES))]
_QUARTERS = [[k + i + j for k in (0, LANES) for i in (0, 8) for j in half] for half in (range(4), range(4, 8))]
"""Which lanes of two vectors go into two others: single numbers or pairs from within blocks of four, or whole blocks.
Processors have one fast instruction for each."""


def _turned(builder: Any, parts: list[Any]) -> list[Any]:
    """Return sixteen vectors of what stands in the same lane of sixteen vectors."""

    def both(orders: list[list[int]], x: Any, y: Any) -> list[Any]:
        return [llvm.shuffled(builder, x, y, order) for order in orders]

    turned: list[list[Any]] = []  # by four vectors: block b of the j-th has their lanes 4 b + j
    for i in _BLOCKS:
        first, second = both(_SINGLES, parts[i], parts[i + 1]), both(_SINGLES, parts[i + 2], parts[i + 3])
        turned.append([some for pair in zip(first, second, strict=True) for some in both(_DOUBLES, *pair)])
    columns: list[Any] = [None] * LANES
    for j in range(4):
        first, second = both(_HALVES, turned[0][j], turned[1][j]), both(_HALVES, turned[2][j], turned[3][j])
        blocks = [some for pair in zip(first, second, strict=True) for some in both(_QUARTERS, *pair)]
        columns[j::4] = blocks
    return columns


def _turn_of(rows: Any, keys: Any, places: Any, first: Any, offset: Any, count: Any, tile: Any, to: Any) -> Any:
    width = 2 * LANES

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if rows.dtype != types.uint16 or keys.dtype != rows.dtype:  # never run
            return context.get_dummy_value()
        data, key_at, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (1, 2, 6)
        )
        begin, offset, count = args[3:6]
        starts = []
        for i in range(LANES):
            place = builder.load(builder.gep(key_at, [builder.add(begin, begin.type(i))]))
            starts.append(builder.gep(data, [builder.add(place, offset)]))
        target = builder.gep(target, [args[7]])

        def write(read: Callable[[Any], Any]) -> None:
            parts = [builder.bitcast(read(start), VECTOR) for start in starts]
            for i, part in enumerate(_turned(builder, parts)):
                llvm.write(builder, builder.gep(target, [begin.type(i * LANES)]), part)

        with builder.if_else(builder.icmp_signed(">=", count, count.type(width))) as (whole, rest):
            with whole:
                write(lambda start: llvm.read(builder, keys.dtype, start, width))
            with rest:
                write(lambda start: llvm.read_part(builder, keys.dtype, start, count, width))
        return context.get_dummy_value()

    integer = types.int64
    return types.void(rows, keys, places, integer, integer, integer, tile, integer), generate


@llvm.typed(_turn_of)
def turn(rows: Array, keys: Array, places: Array, first: int, offset: int, count: int, tile: Array, to: int) -> None:
    """Write a piece of sixteen keys of bfloat16 to a tile, pair by pair: ``tile[to + i * LANES + key]``.

    The piece of a key is ``keys[place + offset :]`` for ``places[first + key]``: up to `count` numbers and zeros
    behind, as many as a vector has. Nothing is compiled where rows are float32.
    """
    piece = np.zeros((LANES, 2 * LANES), np.uint16)
    count = min(count, 2 * LANES)
    for key in range(LANES):
        at = places[first + key] + offset
        piece[key, :count] = keys[at : at + count]
    tile[to : to + LANES * LANES] = piece.view(np.float32).T.ravel()


def _scores_of(
    rows: Any, at: Any, width: Any, tile: Any, places: Any, count: Any, scale: Any, out: Any, to: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if rows.dtype != types.uint16:  # never run
            return context.get_dummy_value()
        row_data, tile_data, data = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 7)
        )
        begin, apart, integer = args[1], args[2], args[1].type
        row_at = [builder.gep(row_data, [builder.add(begin, builder.mul(apart, integer(i)))]) for i in range(ROWS)]
        starts = [builder.gep(tile_data, [place]) for place in cgutils.unpack_tuple(builder, args[4])]

        def multiply(index: Any, sums: list[Any]) -> list[Any]:
            keys = [llvm.read(builder, types.float32, builder.gep(start, [index]), LANES) for start in starts]
            result = []
            for row in range(ROWS):
                place = builder.gep(row_at[row], [builder.ashr(index, integer(3))])
                number = builder.load(builder.bitcast(place, FLOAT.as_pointer()))
                number.align = 4
                every = builder.bitcast(llvm.spread(builder, number, VECTOR), llvm.BFLOATS)
                for i, key in enumerate(keys):
                    pairs = builder.bitcast(key, llvm.BFLOATS)
                    result.append(_multiplied(builder, every, pairs, sums[row * len(keys) + i]))
            return result

        end = builder.mul(args[5], integer(LANES))
        sums = _counted(builder, end, LANES, [llvm.every(0.0)] * (ROWS * len(starts)), multiply)
        factor = llvm.spread(builder, args[6], VECTOR)
        for i in range(len(starts)):
            for j, part in enumerate(_side_by_side(builder, sums[i :: len(starts)])):
                place = builder.gep(data, [builder.add(args[8], integer((i * ROWS + j) * LANES))])
                llvm.write(builder, place, builder.fmul(part, factor))
        return context.get_dummy_value()

    integer = types.int64
    return types.void(rows, integer, integer, tile, places, integer, types.float32, out, integer), generate


def _side_by_side(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the lanes of four vectors one of each after the other."""
    singles = [lane // 2 + lane % 2 * LANES for lane in range(2 * LANES)]
    doubles = [lane // 4 * 2 + lane % 2 + lane // 2 % 2 * LANES for lane in range(2 * LANES)]
    halves = []
    for order in (singles[:LANES], singles[LANES:]):
        halves.append(
            (llvm.shuffled(builder, rows[0], rows[1], order), llvm.shuffled(builder, rows[2], rows[3], order))
        )
    orders = doubles[:LANES], doubles[LANES:]
    return [llvm.shuffled(builder, first, second, order) for first, second in halves for order in orders]


@llvm.typed(_scores_of)
def scores_of(
    rows: Array,
    at: int,
    width: int,
    tile: Array,
    places: tuple[int, ...],
    count: int,
    scale: np.float32,
    out: Array,
    to: int,
) -> None:
    """Write the products of four rows, ``width`` apart from ``at`` on, and sixteen keys for each place in a tile.

    Keys are as `turn` writes them, `count` vectors each; ``out[to + key * 4 + row]`` is scaled. A product is summed up
    pair by pair, in their order. Rows are uint16, as long as whole vectors, where the processor
    `has_bfloat16_products`; where they are float32 nothing is compiled.
    """
    for group, place in enumerate(places):
        for row in range(ROWS):
            sums = np.zeros(LANES, np.float32)
            for i in range(count):
                keys = tile[place + i * LANES : place + (i + 1) * LANES].view(np.uint16)
                both = llvm.widened(rows[at + row * width + 2 * i : at + row * width + 2 * i + 2])
                sums += (llvm.widened(keys).reshape(LANES, 2) * both).sum(axis=1)
            begin = to + group * ROWS * LANES + row
            out[begin : begin + ROWS * LANES : ROWS] = sums * scale


def _run_of(array: Any) -> int:
    """Return how many numbers a vector of what is multiplied has."""
    return 2 * LANES if array.dtype == types.uint16 else LANES


# Pairs of bfloat16, in lanes as if they were float32: what is multiplied where `has_bfloat16_products`.


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


def _paired_tokens(builder: Any, x: Any, y: Any) -> Any:
    if not has_bfloat16_products():
        return llvm.every(0.0)
    kind = ir.FunctionType(llvm.BFLOATS, [VECTOR, VECTOR])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    narrow = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [y, x])
    narrow = builder.bitcast(narrow, ir.VectorType(SHORT, 2 * LANES))
    return builder.bitcast(llvm.shuffled(builder, narrow, narrow, _TOKENS_IN_PAIRS), VECTOR)


_TOKENS_IN_PAIRS = [
    2 * ROWS * pair + ROWS * token + row for pair in range(LANES // ROWS) for row in range(ROWS) for token in range(2)
]


@llvm.of_lanes(_paired_tokens)
def paired(x: Lanes, y: Lanes) -> Lanes:
    """Return numbers of four tokens each, of four rows, as pairs of bfloat16: lane ``4 * pair of tokens + row``."""
    bits = np.array([narrowed(number, np.empty(0, np.uint16)) for number in (*x, *y)], np.uint16)
    return bits[_TOKENS_IN_PAIRS].view(np.float32)


def _add_pairs(builder: Any, x: Any, y: Any, total: Any) -> Any:
    if not has_bfloat16_products():
        return total
    return _multiplied(builder, builder.bitcast(x, llvm.BFLOATS), builder.bitcast(y, llvm.BFLOATS), total)


@llvm.of_lanes(_add_pairs)
def add_pairs(x: Lanes, y: Lanes, total: Lanes) -> Lanes:
    """Return ``total`` and the products of both numbers of each pair."""
    products = llvm.widened(x.view(np.uint16)) * llvm.widened(y.view(np.uint16))
    pairs: Lanes = products.reshape(LANES, 2).sum(axis=1)
    return total + pairs


def _add_products_of(vectors: int, combine: Build) -> Callable[..., Any]:
    def typing(sums: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = [context.make_array(sums)(context, builder, args[i]).data for i in (0, 3, 5)]
            at, width, value_at, weight_at, count = args[1], args[2], args[4], args[6], args[7]
            number = width.type
            places = [
                builder.gep(data[0], [builder.add(at, builder.add(builder.mul(width, number(row)), number(i * LANES)))])
                for row in range(ROWS)
                for i in range(vectors)
            ]

            def add_token(token: Any, totals: list[Any]) -> list[Any]:
                value = builder.gep(data[1], [builder.add(value_at, builder.mul(width, token))])
                weight = builder.gep(data[2], [builder.add(weight_at, builder.mul(token, number(ROWS)))])
                some = [
                    llvm.read(builder, types.float32, builder.gep(value, [number(i * LANES)]), LANES)
                    for i in range(vectors)
                ]
                each = [
                    llvm.spread(builder, builder.load(builder.gep(weight, [number(row)])), VECTOR)
                    for row in range(ROWS)
                ]
                terms = [(each[i // vectors], some[i % vectors]) for i in range(len(totals))]
                return [combine(builder, *term, total) for term, total in zip(terms, totals, strict=True)]

            totals = [llvm.read(builder, types.float32, place, LANES) for place in places]
            for place, total in zip(places, _counted(builder, count, 1, totals, add_token), strict=True):
                llvm.write(builder, place, total)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(sums, integer, integer, sums, integer, sums, integer, integer), generate

    return typing


def _fma(builder: Any, x: Any, y: Any, total: Any) -> Any:
    return llvm.call(builder, "fma", x, y, total)


def _add_products(
    vectors: int,
    combine: Callable[[Lanes, Lanes, Lanes], Lanes],
    sums: Array,
    at: int,
    width: int,
    values: Array,
    value_at: int,
    weights: Array,
    weight_at: int,
    count: int,
) -> None:
    for token in range(count):
        for row in range(ROWS):
            weight = splat_at(weights, weight_at + token * ROWS + row)
            for i in range(0, vectors * LANES, LANES):
                place = at + row * width + i
                value = load(values, value_at + token * width + i)
                store(sums, place, combine(weight, value, load(sums, place)))


@llvm.typed(_add_products_of(4, _fma))
def add_products_64(
    sums: Array, at: int, width: int, values: Array, value_at: int, weights: Array, weight_at: int, count: int
) -> None:
    """Add ``count`` rows of 64 values, ``width`` apart, to four rows of sums, ``width`` apart, token by token.

    The weight of a token in a row is at ``4 * token + row``; all is float32.
    """
    _add_products(4, fma, sums, at, width, values, value_at, weights, weight_at, count)


@llvm.typed(_add_products_of(1, _fma))
def add_products_16(
    sums: Array, at: int, width: int, values: Array, value_at: int, weights: Array, weight_at: int, count: int
) -> None:
    """Do the same for sixteen values."""
    _add_products(1, fma, sums, at, width, values, value_at, weights, weight_at, count)


@llvm.typed(_add_products_of(4, _add_pairs))
def add_pair_products_64(
    sums: Array, at: int, width: int, values: Array, value_at: int, weights: Array, weight_at: int, count: int
) -> None:
    """Do the same as `add_products_64` where values and weights are pairs, those of two tokens each."""
    _add_products(4, add_pairs, sums, at, width, values, value_at, weights, weight_at, count)


@llvm.typed(_add_products_of(1, _add_pairs))
def add_pair_products_16(
    sums: Array, at: int, width: int, values: Array, value_at: int, weights: Array, weight_at: int, count: int
) -> None:
    """Do the same for sixteen pairs."""
    _add_products(1, add_pairs, sums, at, width, values, value_at, weights, weight_at, count)
