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
    CACHE_LINE,
    FLOAT,
    INT,
    LANES,
    ROWS,
    SHORT,
    VECTOR,
    Array,
    Build,
    Lanes,
    has_bfloat16_products,
    lanes,
)
from pagedkv.jit import formula

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
    orders = [[place for i in half for place in (i, _BYTES.count + i)] for half in _HALVES_OF_FOURS]
    return [builder.bitcast(llvm.shuffled(builder, low, high, order), llvm.BFLOATS) for order in orders]


_HALVES_OF_FOURS = [[i + j + k for i in range(0, 64, 16) for j in range(8)] for k in (0, 8)]
"""Bytes of 64 that are the first and the second pair of inputs of sixteen outputs: the halves of each block of sixteen,
which one instruction interleaves."""


def _pairs_of_fours(builder: Any, bits: Any) -> list[Any]:
    """Return 64 numbers of int8 as both pairs of four inputs of sixteen outputs."""
    if _has_byte_tables():
        return _looked_up(builder, bits)
    return [_paired(builder, llvm.shuffled(builder, bits, bits, half), types.int8) for half in _HALVES_OF_FOURS]


def _multiplied(builder: Any, x: Any, y: Any, total: Any) -> Any:
    """Add the products of two vectors of float32, or of pairs of bfloat16, to a sum of each lane."""
    if x.type == VECTOR:
        return llvm.call(builder, "fma", x, y, total)
    kind = ir.FunctionType(VECTOR, [VECTOR, llvm.BFLOATS, llvm.BFLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [total, x, y])


def _places_of(context: Any, builder: Any, array: Any, args: Any, count: int, apart: int = LANES) -> list[Any]:
    """Return where so many vectors of an array are, from an index on."""
    data = builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
    return [builder.gep(data, [args[1].type(i * apart)]) for i in range(count)]


def _starts_of(context: Any, builder: Any, array: Any, value: Any, indices: Any) -> list[Any]:
    """Return where the places of a tuple are in an array."""
    data = context.make_array(array)(context, builder, value).data
    return [builder.gep(data, [place]) for place in cgutils.unpack_tuple(builder, indices)]


def _vectors_from(builder: Any, start: Any, count: int) -> list[Any]:
    return [builder.gep(start, [INT(i * LANES)]) for i in range(count)]


def _rows_from(builder: Any, data: Any, at: Any, width: Any) -> list[Any]:
    """Return where four rows are, each `width` behind the one before."""
    return [builder.gep(data, [builder.add(at, builder.mul(width, width.type(row)))]) for row in range(ROWS)]


# Panels: the weights of 32 outputs side by side, input by input.

PANEL = 2 * LANES
"""Outputs of a panel."""
UNROLLED = 4
"""Units of inputs that one turn of the loop multiplies."""
MOST_AHEAD = {1: 8, 2: 2}
"""Cache lines that one turn asks for, by panels: as many as it reads of one panel, and two panels serve many rows."""


@formula
def lines_of_turn(item_bytes: int) -> int:
    """Return how many cache lines of a panel one turn reads where inputs lie one by one."""
    return UNROLLED * PANEL * item_bytes // CACHE_LINE


@formula
def unit_of(act_bytes: int, is_int8: bool) -> int:
    """Return how many inputs of an output lie side by side, in one unit of a panel.

    One input is ``[size_in, 32]``. Pairs of bfloat16 are multiplied together: ``[size_in / 2, 32, 2]``. int8 that is
    multiplied as bfloat16 comes in fours: ``[size_in / 4, 2, 4, 2, 4, 2]``, in which an output is found by the second,
    third and fifth place and an input by the others.
    """
    return 1 if act_bytes == 4 else 4 if is_int8 else 2


_MULTIPLIES_PAIRS = has_bfloat16_products()


@formula
def unit_of_copy(item_bytes: int) -> int:
    """Return the same for a copy of weights of which a number takes so many bytes."""
    return 2 if _MULTIPLIES_PAIRS and item_bytes == 2 else 1


@llvm.typed(
    lambda weights, acts: (
        (acts if llvm.IS_WIDE else weights)(weights, acts),
        lambda context, builder, signature, args: args[int(llvm.IS_WIDE)],
    )
)
def copied_as(weights: Array, acts: Array) -> Array:
    """Return the array of two, both `borrowed`, of whose kind a copy of weights is.

    It is that of what is multiplied, so that int8 is widened once for many rows; or, where a register is half a vector
    and widening costs less than reading twice as much, that of the weights, whose panels take the same code.
    """
    return acts if llvm.IS_WIDE else weights


class _Panels:
    """Panels that are multiplied by runs of some array: of `left` by `right`, both dtypes."""

    def __init__(self, builder: Any, left: Any, right: Any) -> None:
        self._builder, self._left, self._right = builder, left, right
        self.unit = unit_of(left.bitwidth // 8, right == types.int8)

    def weights(self, start: Any, unit: Any, vectors: int) -> list[list[Any]]:
        """Return what one unit of some outputs is multiplied by: for each number, or pair, of it so many vectors."""
        builder = self._builder
        size = LANES * self.unit
        places = [builder.gep(start, [builder.add(unit, unit.type(i * size))]) for i in range(vectors)]
        bits = [llvm.read(builder, self._right, place, size) for place in places]
        if self.unit == 4:
            return [list(pair) for pair in zip(*(_pairs_of_fours(builder, each) for each in bits), strict=True)]
        if self.unit == 2:
            return [[builder.bitcast(each, llvm.BFLOATS) for each in bits]]
        return [[llvm.widened_bits(builder, each, self._right) for each in bits]]

    def number(self, start: Any, offset: Any) -> Any:
        """Return a number, or a pair, of a run in all lanes."""
        builder, address = self._builder, self._builder.gep(start, [offset])
        if self.unit == 1:
            return llvm.spread(builder, builder.load(address), VECTOR)
        pair = builder.load(builder.bitcast(address, INT.as_pointer()))
        pair.align = 2
        return builder.bitcast(llvm.spread(builder, pair, llvm.INTS), llvm.BFLOATS)

    def last_number(self, start: Any, offset: Any) -> Any:
        """Return the last number of a run with a zero for the other one of the pair."""
        builder = self._builder
        pair = builder.zext(builder.load(builder.gep(start, [offset])), INT)
        return builder.bitcast(llvm.spread(builder, pair, llvm.INTS), llvm.BFLOATS)


def _add_panels(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build the products of whole panels."""
    _, rows, _, panels, _, sums = signature.args[:6]
    places = _places_of(context, builder, sums, (args[5], args[4].type(0)), 2 * rows.count * panels.count)
    ask = (
        _asking(context, builder, signature.args[6:], args[6:], _most_ahead(signature.args[6], panels.count))
        if len(args) > 6
        else lambda turn: None
    )
    return _add_outputs(context, builder, signature.args, args, places, 2, ask)


def _add_outputs(
    context: Any, builder: Any, kinds: Any, args: Any, places: list[Any], vectors: int, ask: Callable[[Any], None]
) -> Any:
    """Build the loop along the runs, with sums in registers, of one vector of a panel's outputs or of both."""
    x, y, count = kinds[0], kinds[2], args[4]
    xs, ys = (_starts_of(context, builder, kinds[i], args[i], args[i + 1]) for i in (0, 2))
    some = _Panels(builder, x.dtype, y.dtype)

    def multiplied(totals: list[Any], numbers: list[Any], weights: list[Any]) -> list[Any]:
        terms = [(number, weight) for number in numbers for weight in weights]
        return [_multiplied(builder, *term, total) for term, total in zip(terms, totals, strict=True)]

    def add_unit(totals: list[Any], offset: Any, number: Callable[[Any, Any], Any] = some.number) -> list[Any]:
        at = builder.mul(offset, offset.type(PANEL))
        parts = [some.weights(start, at, vectors) for start in ys]
        for i, weights in enumerate(zip(*parts, strict=True)):
            place = builder.add(offset, offset.type(2 * i))
            totals = multiplied(
                totals, [number(start, place) for start in xs], [each for pair in weights for each in pair]
            )
        return totals

    def add_turn(offset: Any, totals: list[Any]) -> list[Any]:
        ask(builder.sdiv(offset, offset.type(UNROLLED * some.unit)))
        for i in range(UNROLLED):
            totals = add_unit(totals, builder.add(offset, offset.type(i * some.unit)))
        return totals

    turns = builder.and_(count, count.type(-UNROLLED * some.unit))
    whole = builder.and_(count, count.type(-some.unit))
    totals = [llvm.read(builder, types.float32, place, LANES) for place in places]
    totals = _counted(builder, turns, UNROLLED * some.unit, totals, add_turn)
    left = builder.sub(whole, turns)
    totals = _counted(builder, left, some.unit, totals, lambda i, totals: add_unit(totals, builder.add(turns, i)))
    if some.unit == 2:
        rest = builder.sub(count, whole)
        totals = _counted(builder, rest, 1, totals, lambda i, totals: add_unit(totals, whole, some.last_number))
    for place, total in zip(places, totals, strict=True):
        llvm.write(builder, place, total)
    return context.get_dummy_value()


def _most_ahead(weights: Any, panels: int) -> int:
    return MOST_AHEAD[panels] if llvm.IS_WIDE else lines_of_turn(weights.dtype.bitwidth // 8)


def _asking(context: Any, builder: Any, kinds: Any, args: Any, count: int) -> Callable[[Any], None]:
    """Return what asks for some cache lines in a turn of the loop."""
    data, line = context.make_array(kinds[0])(context, builder, args[0]).data, CACHE_LINE * 8 // kinds[0].dtype.bitwidth

    def ask(turn: Any) -> None:
        begin = builder.add(args[1], builder.mul(turn, args[2]))
        for i in range(count):
            place = builder.gep(data, [builder.add(begin, begin.type(i * line))])
            llvm.prefetch(builder, kinds[0].dtype, place)

    return ask


def _panels_typing(x: Any, rows: Any, y: Any, panels: Any, count: Any, sums: Any, *ahead: Any) -> Any:
    more = (ahead[0], types.int64, types.int64) if ahead else ()
    return types.void(x, rows, y, panels, types.int64, sums, *more), _add_panels


@llvm.typed(lambda x, rows, y, panels, count, sums: _panels_typing(x, rows, y, panels, count, sums))
def add_panels(x: Array, rows: tuple[int, ...], y: Array, panels: tuple[int, ...], count: int, sums: Array) -> None:
    """Add the products of runs of `count` numbers of x, which begin at `rows`, and of panels of y, at `panels`.

    Rows and panels are tuples; the sums of a row and a panel are ``sums[(row * len(panels) + panel) * PANEL :]``,
    float32. An output's products are added one after the other, whatever is computed beside it. x is float32, and y any
    kind that `load` takes; or x is uint16, bfloat16, and y is uint16 or int8 without -128, where the processor
    `has_bfloat16_products`. For the order of y see `unit_of`: `count` is whole units, but may be odd where they are 2.
    """
    for i, row in enumerate(rows):
        for j, panel in enumerate(panels):
            at = (i * len(panels) + j) * PANEL
            _add_panel(x[row : row + count], y[panel:], sums[at : at + PANEL])


@llvm.typed(_panels_typing)
def add_panels_ahead(
    x: Array,
    rows: tuple[int, ...],
    y: Array,
    panels: tuple[int, ...],
    count: int,
    sums: Array,
    weights: Array,
    ahead: int,
    step: int,
) -> None:
    """Do the same, and ask for `weights` from the place `ahead` on: for `step` numbers in each turn of the loop.

    A turn is `UNROLLED` units, and asks for `MOST_AHEAD` cache lines; where a register is half a vector, for as many as
    it reads. They may lie anywhere.
    """
    add_panels(x, rows, y, panels, count, sums)


def _streams_typing(x: Any, rows: Any, y: Any, panels: Any, count: Any, sums: Any, ahead: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        act_bits, bits = x.dtype.bitwidth, y.dtype.bitwidth
        lines = lines_of_turn(bits // 8) if bits < act_bits else 0
        turn_size = UNROLLED * unit_of(act_bits // 8, y.dtype == types.int8) * PANEL
        distance = builder.mul(args[6], args[6].type(CACHE_LINE * 8 // bits))
        asks = [
            _asking(context, builder, (y,), (args[2], builder.add(panel, distance), distance.type(turn_size)), lines)
            for panel in cgutils.unpack_tuple(builder, args[3])
        ]
        places = _places_of(context, builder, sums, (args[5], args[4].type(0)), 2 * rows.count * panels.count)

        def ask_of_all(turn: Any) -> None:
            for ask in asks:
                ask(turn)

        return _add_outputs(context, builder, signature.args, args, places, 2, ask_of_all)

    return types.void(x, rows, y, panels, types.int64, sums, types.int64), generate


@llvm.typed(_streams_typing)
def add_streams(
    x: Array, rows: tuple[int, ...], y: Array, panels: tuple[int, ...], count: int, sums: Array, ahead: int
) -> None:
    """Do the same, and ask for what lies so many cache lines ahead in each panel, where y has fewer bits than x.

    What is as wide as x the processor by itself reads far enough ahead.
    """
    add_panels(x, rows, y, panels, count, sums)


def _half_panel_typing(
    x: Any, rows: Any, y: Any, panels: Any, count: Any, sums: Any, at: Any, weights: Any, ahead: Any, step: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x.dtype != types.float32:  # never run
            return context.get_dummy_value()
        places = _places_of(context, builder, sums, args[5:7], rows.count, PANEL)
        ask = _asking(context, builder, signature.args[7:], args[7:], lines_of_turn(weights.dtype.bitwidth // 8) // 2)
        return _add_outputs(context, builder, signature.args, args, places, 1, ask)

    integer = types.int64
    return types.void(x, rows, y, panels, integer, sums, integer, weights, integer, integer), generate


@llvm.typed(_half_panel_typing)
def add_half_panel(
    x: Array,
    rows: tuple[int, ...],
    y: Array,
    panels: tuple[int, ...],
    count: int,
    sums: Array,
    at: int,
    weights: Array,
    ahead: int,
    step: int,
) -> None:
    """Do the same for one half of one panel, sixteen outputs: those of row i are ``sums[at + i * PANEL :]``.

    A turn asks for half of the cache lines that both halves read in one. x is float32; for others nothing is compiled.
    """
    for i, row in enumerate(rows):
        half = np.pad(y[panels[0] :][: count * PANEL], (0, PANEL // 2))[: count * PANEL]
        both = np.zeros(PANEL, np.float32)
        _add_panel(x[row : row + count], half, both)
        sums[at + i * PANEL :][: PANEL // 2] += both[: PANEL // 2]


def _add_panel(x: Array, y: Array, sums: Array) -> None:
    unit = unit_of(x.itemsize, y.dtype == np.int8)
    size = -(-len(x) // unit) * unit
    numbers = np.zeros(size, np.float32)
    numbers[: len(x)] = llvm.widened(x)
    weights = unpacked(llvm.widened(y[: size * PANEL]), unit)
    step = min(unit, 2)
    for i in range(0, size, step):
        sums += (numbers[i : i + step] * weights[:, i : i + step]).sum(axis=1)


AXES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    1: ((-1, PANEL), (1, 0)),
    2: ((-1, PANEL, 2), (1, 0, 2)),
    4: ((-1, 2, 4, 2, 4, 2), (1, 2, 4, 0, 3, 5)),
}
"""By unit: the shape of a panel, and the order in which its axes are those of rows."""


def unpacked(panel: Array, unit: int) -> Array:
    """Return a panel as rows, ``[PANEL, size_in]``."""
    shape, order = AXES[unit]
    return panel.reshape(shape).transpose(order).reshape(PANEL, -1)


def _pack(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Build the transposition of sixteen rows of sixteen numbers, or pairs."""
    y, panel = signature.args[0], signature.args[6]
    unit = unit_of_copy(panel.dtype.bitwidth // 8)
    data = context.make_array(y)(context, builder, args[0]).data
    first, apart, last, offset, left = args[1:6]
    starts = []
    for i in range(LANES):
        row = builder.select(builder.icmp_signed("<", last, last.type(i)), last, last.type(i))
        starts.append(builder.gep(data, [builder.add(builder.add(first, builder.mul(apart, row)), offset)]))
    targets = _places_of(context, builder, panel, args[6:], LANES, PANEL * unit)
    _turn_piece(builder, y.dtype, starts, left, unit, targets, panel.dtype)
    return context.get_dummy_value()


@llvm.typed(
    lambda y, first, apart, last, offset, left, panel, to: (
        types.void(y, *[types.int64] * 5, panel, types.int64),
        _pack,
    )
)
def pack(y: Array, first: int, apart: int, last: int, offset: int, left: int, panel: Array, to: int) -> None:
    """Write a piece of sixteen rows of weights to half a panel, ``panel[to:]``, which is `copied_as` they are.

    Row i begins at ``first + min(i, last) * apart``. The piece begins at `offset`: sixteen numbers, or as many pairs
    where bfloat16 is multiplied; of them `left` are read, with zeros behind.
    """
    unit = unit_of_copy(panel.itemsize)
    size, left = LANES * unit, min(left, LANES * unit)
    piece = np.zeros((LANES, size), np.float32)
    for i in range(LANES):
        at = first + min(i, last) * apart + offset
        piece[i, :left] = llvm.widened(y[at : at + left])
    rows = piece.reshape(LANES, LANES, unit)
    for i in range(LANES):
        for j, number in enumerate(rows[:, i].ravel()):
            panel[to + i * PANEL * unit + j] = narrowed(number, panel)


WIDENED = 4 * PANEL
"""Numbers that `widen` copies."""


def _widen(context: Any, builder: Any, signature: Any, args: Any) -> None:
    numbers, _, target, _ = signature.args
    places = _places_of(context, builder, numbers, args, WIDENED // LANES)
    targets = _places_of(context, builder, target, args[2:], WIDENED // LANES)
    if (numbers.dtype, target.dtype) == (types.int8, types.uint16):
        bits = [llvm.read(builder, numbers.dtype, place, 4 * LANES) for place in places[::4]]
        pairs = zip(*(_pairs_of_fours(builder, each) for each in bits), strict=True)
        for to, vector in zip(targets[::2], [each for pair in pairs for each in pair], strict=True):
            llvm.write(builder, to, vector, target.dtype.bitwidth // 8)
        return
    for place, to in zip(places, targets, strict=True):
        some = llvm.read(builder, numbers.dtype, place, LANES)
        write_narrowed(builder, target.dtype, to, llvm.widened_bits(builder, some, numbers.dtype))


@llvm.typed(lambda numbers, index, target, to: (types.void(numbers, types.int64, target, types.int64), _widen))
def widen(numbers: Array, index: int, target: Array, to: int) -> None:
    """Copy four inputs of a panel of int8 without -128 to ``target[to:]``, a panel of what is multiplied."""
    some = llvm.widened(numbers[index : index + WIDENED])
    if target.dtype == np.uint16:
        some = unpacked(some, 4).reshape(PANEL, 2, 2).transpose(1, 0, 2).ravel()
    for i, number in enumerate(some):
        target[to + i] = narrowed(number, target)


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
        dim = args[8]
        row_at = _rows_from(builder, row_data, args[1], args[2])
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


def _orders(lanes: int) -> tuple[list[list[int]], list[list[int]]]:
    blocks, halves = range(0, lanes, 4), ((0, 1), (2, 3))
    singles = [[i + j + k for i in blocks for j in half for k in (0, lanes)] for half in halves]
    return singles, [[i + j + k for i in blocks for k in (0, lanes) for j in half] for half in halves]


_ORDERS = {lanes: _orders(lanes) for lanes in (LANES, LANES // 2)}
_HALVES = [[k + i for k in (0, LANES) for i in half] for half in (range(8), range(8, LANES))]
_QUARTERS = [[k + i + j for k in (0, LANES) for i in (0, 8) for j in half] for half in (range(4), range(4, 8))]
"""Which lanes of two vectors go into two others: single numbers and pairs from within blocks of four, or whole blocks.
Processors have one fast instruction for each."""


def _both(builder: Any, orders: list[list[int]], x: Any, y: Any) -> list[Any]:
    return [llvm.shuffled(builder, x, y, order) for order in orders]


def _turned_fours(builder: Any, parts: list[Any]) -> list[list[Any]]:
    """Return, for each four of the vectors, four others: block b of the j-th has their lanes 4 b + j."""
    turned, (singles, doubles) = [], _ORDERS[parts[0].type.count]
    for i in range(0, len(parts), 4):
        first, second = (_both(builder, singles, *parts[j : j + 2]) for j in (i, i + 2))
        turned.append([some for pair in zip(first, second, strict=True) for some in _both(builder, doubles, *pair)])
    return turned


def _turned(builder: Any, parts: list[Any]) -> list[Any]:
    """Return sixteen vectors of what stands in the same lane of sixteen vectors."""
    turned = _turned_fours(builder, parts)
    columns: list[Any] = [None] * LANES
    for j in range(4):
        first, second = (_both(builder, _HALVES, turned[i][j], turned[i + 1][j]) for i in (0, 2))
        blocks = [some for pair in zip(first, second, strict=True) for some in _both(builder, _QUARTERS, *pair)]
        columns[j::4] = blocks
    return columns


def _turned_half(builder: Any, parts: list[Any]) -> list[Any]:
    """Return halves of a vector, of what stands in the same lane of eight: there are sixteen registers of AVX2."""
    (first, second), lanes = _turned_fours(builder, parts), parts[0].type.count
    orders = [[k + lane for k in (block, lanes + block) for lane in range(4)] for block in range(0, lanes, 4)]
    return [llvm.shuffled(builder, first[j], second[j], order) for order in orders for j in range(4)]


def _widened_halves(builder: Any, parts: list[Any], dtype: Any) -> list[Any]:
    """Return as float32 what stands in the same lane of eight vectors; bfloat16 is turned pair by pair."""
    if dtype != types.uint16:
        return _turned_half(builder, [llvm.widened_bits(builder, part, dtype) for part in parts])
    halves = []
    for pairs in _turned_half(builder, [builder.bitcast(part, ir.VectorType(INT, LANES // 2)) for part in parts]):
        first = builder.shl(pairs, llvm.every_int(16, pairs.type))
        second = builder.and_(pairs, llvm.every_int(-1 << 16, pairs.type))
        halves += [builder.bitcast(bits, ir.VectorType(FLOAT, LANES // 2)) for bits in (first, second)]
    return halves


def _turn_piece(
    builder: Any, dtype: Any, starts: list[Any], left: Any, unit: int, targets: list[Any], kind: Any
) -> None:
    """Build the transposition of sixteen runs of sixteen units, where fewer numbers are left with zeros behind them.

    They are written as what is multiplied, float32 or bfloat16; or, where a register is half a vector, as they were.
    """
    size = unit * LANES

    def widened(bits: Any) -> Any:
        if unit == 2:
            return builder.bitcast(_paired(builder, bits, dtype), VECTOR)
        return llvm.widened_bits(builder, bits, dtype)

    def turn(read: Callable[[Any], Any]) -> None:
        if llvm.IS_WIDE:
            parts = [widened(read(start)) for start in starts]
            for target, part in zip(targets, _turned(builder, parts), strict=True):
                llvm.write(builder, target, part, kind.bitwidth // 8)
            return
        for first in (0, LANES // 2):
            parts = [read(start) for start in starts[first : first + LANES // 2]]
            for target, part in zip(targets, _widened_halves(builder, parts, dtype), strict=True):
                narrow = llvm.narrowed_to(builder, kind, part)
                llvm.write(builder, builder.gep(target, [INT(first)]), narrow, kind.bitwidth // 8)

    with builder.if_else(builder.icmp_signed(">=", left, left.type(size))) as (whole, rest):
        with whole:
            turn(lambda start: llvm.read(builder, dtype, start, size))
        with rest:
            turn(lambda start: llvm.read_part(builder, dtype, start, left, size))


def _turn_of(rows: Any, keys: Any, places: Any, first: Any, offset: Any, count: Any, tile: Any, to: Any) -> Any:
    unit = 2 if rows.dtype == types.uint16 else 1

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if unit == 2 and keys.dtype != rows.dtype:  # never run
            return context.get_dummy_value()
        data, key_at = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (1, 2))
        begin, offset, count = args[3:6]
        starts = []
        for i in range(LANES):
            place = builder.load(builder.gep(key_at, [builder.add(begin, begin.type(i))]))
            starts.append(builder.gep(data, [builder.add(place, offset)]))
        targets = _places_of(context, builder, tile, args[6:], LANES)
        _turn_piece(builder, keys.dtype, starts, count, unit, targets, types.float32)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(rows, keys, places, integer, integer, integer, tile, integer), generate


@llvm.typed(_turn_of)
def turn(rows: Array, keys: Array, places: Array, first: int, offset: int, count: int, tile: Array, to: int) -> None:
    """Write a piece of sixteen keys to a tile, number by number: ``tile[to + i * LANES + key]``.

    The piece of a key is ``keys[place + offset :]`` for ``places[first + key]``: up to `count` numbers and zeros
    behind, as many as there are lanes, as float32. Where rows are uint16 keys are bfloat16, and go pair by pair.
    """
    unit = 2 if rows.dtype == np.uint16 else 1
    piece = np.zeros((LANES, unit * LANES), np.uint16 if unit == 2 else np.float32)
    count = min(count, unit * LANES)
    for key in range(LANES):
        at = places[first + key] + offset
        piece[key, :count] = keys[at : at + count] if unit == 2 else llvm.widened(keys[at : at + count])
    tile[to : to + LANES * LANES] = piece.view(np.float32).T.ravel()


def _scores_of(
    rows: Any, at: Any, width: Any, tile: Any, places: Any, count: Any, scale: Any, out: Any, to: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        is_paired = rows.dtype == types.uint16
        row_data, data = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 7))
        integer = args[1].type
        row_at = _rows_from(builder, row_data, args[1], args[2])
        starts = _starts_of(context, builder, tile, args[3], args[4])

        def multiply(index: Any, sums: list[Any]) -> list[Any]:
            keys = [llvm.read(builder, types.float32, builder.gep(start, [index]), LANES) for start in starts]
            result = []
            for row in range(ROWS):
                place = builder.gep(row_at[row], [builder.ashr(index, integer(3 if is_paired else 4))])
                number = builder.load(builder.bitcast(place, FLOAT.as_pointer()))
                number.align = 4
                each = [llvm.spread(builder, number, VECTOR), *keys]
                if is_paired:
                    each = [builder.bitcast(some, llvm.BFLOATS) for some in each]
                for i, key in enumerate(each[1:]):
                    result.append(_multiplied(builder, each[0], key, sums[row * len(keys) + i]))
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
    number by number, or pair by pair, in their order. Rows are as long as whole vectors; they are uint16 where the
    processor `has_bfloat16_products`.
    """
    unit = 2 if rows.dtype == np.uint16 else 1
    for group, place in enumerate(places):
        for row in range(ROWS):
            sums = np.zeros(LANES, np.float32)
            for i in range(count):
                keys = tile[place + i * LANES : place + (i + 1) * LANES].view(rows.dtype)
                some = llvm.widened(rows[at + row * width + unit * i : at + row * width + unit * (i + 1)])
                sums += (llvm.widened(keys).reshape(LANES, unit) * some).sum(axis=1)
            begin = to + group * ROWS * LANES + row
            out[begin : begin + ROWS * LANES : ROWS] = sums * scale


# Pairs of bfloat16, in lanes as if they were float32: what is multiplied where `has_bfloat16_products`.


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


def _add_tokens(
    builder: Any, sums: list[Any], weights: Any, count: Any, vectors: int, combine: Build, read: Callable[[Any], Any]
) -> None:
    """Build the sums of four rows over some tokens, whose weights follow each other, with their vectors of values."""

    def add_token(token: Any, totals: list[Any]) -> list[Any]:
        some, weight = read(token), builder.gep(weights, [builder.mul(token, token.type(ROWS))])
        each = [
            llvm.spread(builder, builder.load(builder.gep(weight, [token.type(row)])), VECTOR) for row in range(ROWS)
        ]
        terms = [(each[i // vectors], some[i % vectors]) for i in range(len(totals))]
        return [combine(builder, *term, total) for term, total in zip(terms, totals, strict=True)]

    totals = [llvm.read(builder, types.float32, place, LANES) for place in sums]
    for place, total in zip(sums, _counted(builder, count, 1, totals, add_token), strict=True):
        llvm.write(builder, place, total)


def _add_products_of(vectors: int, combine: Build) -> Callable[..., Any]:
    def typing(sums: Any, *_: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = [context.make_array(sums)(context, builder, args[i]).data for i in (0, 3, 5)]
            at, width, value_at, weight_at, count = args[1], args[2], args[4], args[6], args[7]

            def read(token: Any) -> list[Any]:
                value = builder.gep(data[1], [builder.add(value_at, builder.mul(width, token))])
                starts = _vectors_from(builder, value, vectors)
                return [llvm.read(builder, types.float32, start, LANES) for start in starts]

            rows = _rows_from(builder, data[0], at, width)
            places = [place for row in rows for place in _vectors_from(builder, row, vectors)]
            _add_tokens(builder, places, builder.gep(data[2], [weight_at]), count, vectors, combine, read)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(sums, integer, integer, sums, integer, sums, integer, integer), generate

    return typing


def _add_rows_of(sums: Any, _at: Any, _width: Any, values: Any, places: Any, *_: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 4, 9)]
        at, width, (first, ahead, offset, left), (weight_at, count) = args[1], args[2], args[5:9], args[10:]
        targets = _rows_from(builder, data[0], at, width)

        def place_of(index: Any) -> Any:
            place = builder.load(builder.gep(data[2], [index]))
            return builder.gep(data[1], [builder.add(place, offset)])

        def add_all(read: Callable[[Any], Any]) -> None:
            def read_token(token: Any) -> list[Any]:
                llvm.prefetch(builder, values.dtype, place_of(builder.add(ahead, token)))
                bits = read(place_of(builder.add(first, token)))
                return [llvm.widened_bits(builder, bits, values.dtype)]

            _add_tokens(builder, targets, builder.gep(data[3], [weight_at]), count, 1, _fma, read_token)

        with builder.if_else(builder.icmp_signed(">=", left, left.type(LANES))) as (whole, rest):
            with whole:
                add_all(lambda place: llvm.read(builder, values.dtype, place, LANES))
            with rest:
                add_all(lambda place: llvm.read_part(builder, values.dtype, place, left))
        return context.get_dummy_value()

    integer = types.int64
    return types.void(sums, integer, integer, values, places, *[integer] * 4, sums, integer, integer), generate


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


@llvm.typed(_add_rows_of)
def add_rows(
    sums: Array,
    at: int,
    width: int,
    values: Array,
    places: Array,
    first: int,
    ahead: int,
    offset: int,
    left: int,
    weights: Array,
    weight_at: int,
    count: int,
) -> None:
    """Add up to sixteen values of each of ``count`` tokens to four rows of sums, ``width`` apart, token by token.

    Those of a token are ``values[place + offset :]``, as many as are ``left``, for ``places[first + token]``; those for
    ``places[ahead + token]`` are asked for. The weight of a token in a row is at ``4 * token + row``.
    """
    some, left = np.zeros(LANES, np.float32), min(left, LANES)
    for token in range(count):
        begin = places[first + token] + offset
        some[:left] = llvm.widened(values[begin : begin + left])
        _add_products(1, fma, sums, at, width, some, 0, weights, weight_at + token * ROWS, 1)


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
