"""Products of rows of activations and weights, a block of rows and outputs at a time.

An output is summed up in one order, whatever is computed beside it. Weights are asked for ahead of their use: where
several rows are multiplied by each, the processor by itself begins to read them as they are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.simd import add, is_int8, load, mul, prefetch, prefetch_to_write, put, splat, store, take, zeros
from pagedkv.data.simd_llvm import CACHE_LINE, IS_WIDE, LANES
from pagedkv.data.simd_products import (
    PANEL,
    UNROLLED,
    WIDENED,
    add_half_panel,
    add_panels,
    add_panels_ahead,
    add_streams,
    lines_of_turn,
    pack,
    unit_of,
    unit_of_copy,
    widen,
)
from pagedkv.data.team import num_threads
from pagedkv.jit import borrowed, called, inlined

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TO_ACTS, TO_FLOATS, ADDED = range(3)
"""What becomes of a row: narrowed into ``acts``, written into ``floats``, or added there."""

FEW_ROWS = 32
"""Up to so many rows are one block, and the items of a product are cut by ``columns``; more rows are cut as well."""
ROW_BLOCK = 64
COLUMN_BLOCK = 2 * PANEL
TILE_ROWS, TILE_COLUMNS = (4, COLUMN_BLOCK) if IS_WIDE else (6, PANEL)
"""Rows and outputs that are multiplied together: by two panels, whose sums fill half of the registers; or, where there
are sixteen registers of half the size, by half a panel at a time, whose sums fill three quarters."""
TILE_INPUTS = 192
"""Inputs of half a panel that stay in the first cache while all rows are multiplied by them."""
SUMS = TILE_ROWS * TILE_COLUMNS if IS_WIDE else ROW_BLOCK * PANEL
"""Sums of a tile, or of all rows and a panel."""
NOWHERE = -(1 << 62)
"""Where there are no weights to ask for; weights may lie before the array that places are counted from."""
BLOCK = ROW_BLOCK * COLUMN_BLOCK
"""Outputs of a block, of which an activation takes up to two."""
FEW_ROWS_COLUMNS = BLOCK // FEW_ROWS
"""The most outputs of an item of few rows that are a block: the longer the weights of an item are, the faster they are
read."""
FEW_ROWS_OF_INT8 = 8 if IS_WIDE else ROW_BLOCK
"""More rows than these, which may be all of a block, are worth a copy of the weights as what is multiplied."""
FIRST_LINES = 32
"""How many lines of what few rows read next are asked for: the processor sees a stream only when some were read."""
AHEAD, AHEAD_OF_STREAM = 32, 16
"""How many cache lines are asked for ahead of what one or two rows read, of one stream or of each of some."""
ITEM_BYTES, LONG_ITEM_BYTES = 1 << 16, 1 << 18
ITEMS_OF_THREAD, MOST_ITEMS = 2, 128
"""A product of few rows is cut into items of so many bytes of weights, long enough to be read as a stream, or fewer so
that each thread finds some, but not into more items: what the last one takes is what threads wait for."""


class Tile(NamedTuple):
    """Rows and outputs that one item computes."""

    first_row: int
    last_row: int
    first_column: int
    last_column: int


class Matrix(NamedTuple):
    """Where a weight, its bias and its factors begin; -1 where there is none."""

    weight: int
    bias: int
    factor: int


def columns_of_item(size_out: int, output_bytes: int, is_activated: bool, has_gate: bool) -> int:
    """Return how many outputs an item of few rows has, so that threads which take items by turns read alike.

    Parameters
    ----------
    size_out : int
    output_bytes : int
        Of the weights of an output.
    is_activated, has_gate : bool
        An item's outputs then fit into a block, and with a gate they have two weights each.
    """
    threads, num_bytes = num_threads(), size_out * output_bytes
    num_items = max(1, min(ITEMS_OF_THREAD * threads, num_bytes // ITEM_BYTES), -(-num_bytes // LONG_ITEM_BYTES))
    columns = -(-size_out // min(MOST_ITEMS, num_items)) // (2 if has_gate else 1)
    panels, most = _panels(size_out), _panels(FEW_ROWS_COLUMNS if is_activated else size_out)
    wanted = min(most, max(1, _panels(columns)))

    def cost(count: int) -> tuple[int, int]:
        turns = -(-panels // (count * threads))
        return turns * count, abs(count - wanted)

    return PANEL * min(range(wanted // 2 + 1, min(most, wanted + wanted // 2) + 1), key=cost)


def _panels(columns: int) -> int:
    return -(-columns // PANEL)


@inlined
def num_blocks(operation: Any, rows: int) -> int:
    """Return how many items a product of so many rows is."""
    if rows <= FEW_ROWS:
        return (operation.size_out + operation.columns - 1) // operation.columns if rows else 0
    blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    return int(blocks * ((operation.size_out + COLUMN_BLOCK - 1) // COLUMN_BLOCK))


@inlined
def tile_of(operation: Any, item: int, first: int, rows: int) -> Tile:
    """Return the block of an item of a product of some rows, from the first on."""
    if rows <= FEW_ROWS:
        first_row, last_row, width = first, first + rows, operation.columns
        first_column = item * width
    else:
        blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
        first_row, width = first + item % blocks * ROW_BLOCK, COLUMN_BLOCK
        last_row, first_column = min(first + rows, first_row + ROW_BLOCK), item // blocks * width
    return Tile(first_row, last_row, first_column, min(operation.size_out, first_column + width))


@inlined
def matrix_of(operation: Any, expert: int, places: Ints) -> Matrix:
    """Return the weights of a product, or those of an expert."""
    if expert < 0:
        return Matrix(operation.weight, operation.bias, operation.factor)
    weight, bias = places[operation.weights + expert], places[operation.biases + expert]
    return Matrix(weight, bias, places[operation.factors + expert])


@inlined
def gate_of(operation: Any, expert: int, places: Ints) -> Matrix:
    """Return the weights of its gate."""
    if expert < 0:
        return Matrix(operation.gate, operation.gate_bias, operation.gate_factor)
    weight, bias = places[operation.gates + expert], places[operation.gate_biases + expert]
    return Matrix(weight, bias, places[operation.gate_factors + expert])


@inlined
def copy_size(operations: Array) -> int:
    """Return the most numbers that a copy of two panels takes, as what is multiplied."""
    size = 0
    for operation in operations:
        size = max(size, COLUMN_BLOCK * _padded(operation.size_in))
    return int(size)


@inlined
def _padded(size: int) -> int:
    """Return how many inputs the copy of a panel has: whole vectors of numbers, or of pairs."""
    return (size + 2 * LANES - 1) // (2 * LANES) * (2 * LANES)


@called
def multiply(
    operation: Any,
    tile: Tile,
    matrix: Matrix,
    following: int,
    target: int,
    apart: int,
    acts: Array,
    weights: Array,
    constants: Floats,
    floats: Floats,
    routes: Ints,
    sums: Floats,
    copies: Array,
    copied: Ints,
    number: int,
) -> None:
    """Multiply a block of rows by a block of weights; output ``column`` of a row is ``apart`` from that of the next.

    The first rows read a panel of the weights as a stream; the others ask for the next one meanwhile, of which the last
    begins at `following`. Where there are no others its first lines are asked for. What is no panel yet, and int8 for
    more rows, is copied, `copied_as` they are, to the copy of this number of ``copies``, unless these weights, whose
    place is in ``copied``, are there from the rows before. The block begins at a whole panel.
    """
    acts = borrowed(acts)
    weights = borrowed(weights)
    constants = borrowed(constants)
    floats = borrowed(floats)
    routes = borrowed(routes)
    sums = borrowed(sums)
    copies = borrowed(copies)
    copied = borrowed(copied)
    rows, size = tile.last_row - tile.first_row, operation.size_in
    copy = number * (len(copies) // len(copied))
    width = TILE_COLUMNS if rows > FEW_ROWS else PANEL
    column = tile.first_column
    if not IS_WIDE and rows == 1:
        column = _multiply_row(
            operation, tile, matrix, following, target, apart, acts, weights, constants, floats, routes, sums
        )
    while column < tile.last_column:
        end = min(tile.last_column, column + width)
        if column < operation.packed < end:
            end = operation.packed
        first = matrix.weight + column * operation.row_stride
        ahead = following if end == tile.last_column else matrix.weight + end * operation.row_stride
        is_packed = end <= operation.packed
        if end == tile.last_column and rows <= TILE_ROWS and following != NOWHERE:
            _ask(weights, following)
        if is_packed and not (is_int8(weights) and rows > FEW_ROWS_OF_INT8):
            _multiply_panels(
                operation,
                tile,
                matrix,
                column,
                end,
                target,
                apart,
                acts,
                weights,
                first,
                PANEL * size,
                constants,
                floats,
                routes,
                sums,
                weights,
                ahead,
            )
        else:
            is_there = rows > FEW_ROWS and copied[number] == first
            for begin in range(column, column if is_there else end, PANEL):
                at, to = matrix.weight + begin * operation.row_stride, copy + (begin - column) * _padded(size)
                if IS_WIDE and is_packed:
                    for i in range(0, PANEL * size, WIDENED):
                        widen(weights, at + i, copies, to + i)
                else:
                    _copy_rows(weights, at, operation.row_stride, min(PANEL, end - begin), size, copies, to, ahead)
            copied[number] = first if rows > FEW_ROWS else NOWHERE  # fewer copy one panel alone
            _multiply_panels(
                operation,
                tile,
                matrix,
                column,
                end,
                target,
                apart,
                acts,
                copies,
                copy,
                PANEL * _padded(size),
                constants,
                floats,
                routes,
                sums,
                weights,
                ahead,
            )
        column = end


@called
def _copy_rows(
    weights: Array, first: int, stride: int, count: int, size: int, copy: Array, to: int, ahead: int
) -> None:
    """Copy rows of weights as a panel, with zeros to whole vectors; ask for others from ahead on.

    The processor sees no stream in sixteen rows that are read side by side.
    """
    weights = borrowed(weights)
    copy = borrowed(copy)
    unit, line = unit_of_copy(copy.itemsize), CACHE_LINE // weights.itemsize
    for half in range(0, count, LANES):
        at, last = first + half * stride, min(LANES, count - half) - 1
        for i in range(0, size, LANES * unit):
            if ahead != NOWHERE:
                begin = ahead + half * size + i * LANES
                for j in range(begin, begin + LANES * LANES * unit, line):
                    prefetch(weights, j)
            pack(weights, at, stride, last, i, size - i, copy, to + i * PANEL + half * unit)


@called
def _multiply_panels(
    operation: Any,
    tile: Tile,
    matrix: Matrix,
    column: int,
    end: int,
    target: int,
    apart: int,
    acts: Array,
    panels: Array,
    first: int,
    step: int,
    constants: Floats,
    floats: Floats,
    routes: Ints,
    sums: Floats,
    weights: Array,
    ahead: int,
) -> None:
    """Multiply a block of rows by one panel or two, `step` apart, those of the outputs column … end."""
    acts = borrowed(acts)
    panels = borrowed(panels)
    constants = borrowed(constants)
    floats = borrowed(floats)
    routes = borrowed(routes)
    sums = borrowed(sums)
    weights = borrowed(weights)
    if not IS_WIDE:
        rows, to = tile.last_row - tile.first_row, target + tile.first_row * apart
        if rows > 2:
            ahead = first if ahead == NOWHERE else ahead
            own = first if end <= operation.packed else NOWHERE
            _multiply_halves(operation, tile, end - column, acts, panels, first, routes, sums, weights, own, ahead)
        else:
            _multiply_two(operation, tile, column, end, to, apart, acts, panels, first, floats, routes, sums)
        _put(operation, matrix, rows, column, end, to, apart, constants, floats, sums, 0)
        return
    size, second = operation.size_in, first + step
    groups = (tile.last_row - tile.first_row + TILE_ROWS - 1) // TILE_ROWS
    turns = max(1, size // (UNROLLED * unit_of(acts.itemsize, is_int8(panels))))
    asked = max(1, groups - 1) * turns * CACHE_LINE // weights.itemsize  # one line in each turn
    turn = ((end - column) * size + asked - 1) // asked * (CACHE_LINE // weights.itemsize)
    for row in range(tile.first_row, tile.last_row, TILE_ROWS):
        height = min(TILE_ROWS, tile.last_row - row)
        x0, x1 = _source(operation, row, routes), _source(operation, row + min(1, height - 1), routes)
        # One and two rows have code of their own; else, and where more is asked for, the last one is computed again.
        x2 = _source(operation, row + (2 if height > 2 else 0), routes)
        x3 = _source(operation, row + height - 1, routes)
        for i in range(0, SUMS, LANES):
            store(sums, i, zeros())
        for i in range(height):  # which another processor may have written last
            for at in range(column, end, LANES):
                prefetch_to_write(floats, target + (row + i) * apart + at)
        is_ahead = row > tile.first_row and ahead != NOWHERE
        if end - column > PANEL and is_ahead:
            add_panels_ahead(acts, (x0, x1, x2, x3), panels, (first, second), size, sums, weights, ahead, turn)
        elif end - column > PANEL:
            add_panels(acts, (x0, x1, x2, x3), panels, (first, second), size, sums)
        elif is_ahead:
            add_panels_ahead(acts, (x0, x1, x2, x3), panels, (first,), size, sums, weights, ahead, turn)
        elif height == 1:
            add_panels(acts, (x0,), panels, (first,), size, sums)
        elif height == 2:
            add_panels(acts, (x0, x1), panels, (first,), size, sums)
        else:
            add_panels(acts, (x0, x1, x2, x3), panels, (first,), size, sums)
        if is_ahead:
            ahead += turns * turn
        _put(operation, matrix, height, column, end, target + row * apart, apart, constants, floats, sums, 0)


@called
def _multiply_row(
    operation: Any,
    tile: Tile,
    matrix: Matrix,
    following: int,
    target: int,
    apart: int,
    acts: Array,
    weights: Array,
    constants: Floats,
    floats: Floats,
    routes: Ints,
    sums: Floats,
) -> int:
    """Multiply one row by all whole panels of a block, and return the column behind them.

    Memory is read faster at two or three places than at one: the panels are cut into as many streams.
    """
    acts = borrowed(acts)
    weights = borrowed(weights)
    constants = borrowed(constants)
    floats = borrowed(floats)
    routes = borrowed(routes)
    sums = borrowed(sums)
    size, column, step = operation.size_in, tile.first_column, PANEL * operation.row_stride
    x, to = _source(operation, tile.first_row, routes), target + tile.first_row * apart
    left = (min(tile.last_column, operation.packed) - column) // PANEL
    while left > 0:
        num_streams = 1 if left == 1 else 2 + left % 2
        num_panels = left // num_streams
        left -= num_streams * num_panels
        for panel in range(num_panels):
            if left == 0 and panel == num_panels - 1 and following != NOWHERE:
                _ask(weights, following)
            first, width = matrix.weight + column * operation.row_stride, num_panels * PANEL
            second, third = first + num_panels * step, first + 2 * num_panels * step
            for i in range(0, num_streams * PANEL, LANES):
                store(sums, i, zeros())
            for at in range(column, column + num_streams * width, width):  # which another processor may have written
                prefetch_to_write(floats, to + at)
                prefetch_to_write(floats, to + at + LANES)
            if num_streams == 1:
                add_streams(acts, (x,), weights, (first,), size, sums, AHEAD)
            elif num_streams == 2:
                add_streams(acts, (x,), weights, (first, second), size, sums, AHEAD_OF_STREAM)
            else:
                add_streams(acts, (x,), weights, (first, second, third), size, sums, AHEAD_OF_STREAM)
            for i in range(num_streams):
                at = column + i * width
                _put(operation, matrix, 1, at, at + PANEL, to, apart, constants, floats, sums, i * PANEL)
            column += PANEL
        column += (num_streams - 1) * num_panels * PANEL
    return column


@inlined
def _ask(weights: Array, first: int) -> None:
    line = CACHE_LINE // weights.itemsize
    for i in range(first, first + FIRST_LINES * line, line):
        prefetch(weights, i)


@called
def _multiply_two(
    operation: Any,
    tile: Tile,
    column: int,
    end: int,
    to: int,
    apart: int,
    acts: Array,
    panels: Array,
    first: int,
    floats: Floats,
    routes: Ints,
    sums: Floats,
) -> None:
    """Multiply one or two rows by one panel."""
    acts = borrowed(acts)
    panels = borrowed(panels)
    floats = borrowed(floats)
    routes = borrowed(routes)
    sums = borrowed(sums)
    rows, size = tile.last_row - tile.first_row, operation.size_in
    x0, x1 = _source(operation, tile.first_row, routes), _source(operation, tile.last_row - 1, routes)
    for i in range(0, rows * PANEL, LANES):
        store(sums, i, zeros())
    for i in range(rows):  # which another processor may have written last
        for at in range(column, end, LANES):
            prefetch_to_write(floats, to + i * apart + at)
    if rows == 2:
        add_streams(acts, (x0, x1), panels, (first,), size, sums, AHEAD)
    else:
        add_streams(acts, (x0,), panels, (first,), size, sums, AHEAD)


@called
def _multiply_halves(
    operation: Any,
    tile: Tile,
    count: int,
    acts: Array,
    panels: Array,
    first: int,
    routes: Ints,
    sums: Floats,
    weights: Array,
    own: int,
    ahead: int,
) -> None:
    """Multiply a block of rows by one panel, half of it and some inputs at a time, and ask for those that are next.

    They are weights of this panel, which begins at `own` unless it is a copy, or those that begin at `ahead`.
    """
    acts = borrowed(acts)
    panels = borrowed(panels)
    routes = borrowed(routes)
    sums = borrowed(sums)
    weights = borrowed(weights)
    size, rows = operation.size_in, tile.last_row - tile.first_row
    for i in range(0, rows * PANEL, LANES):
        store(sums, i, zeros())
    calls = (count + LANES - 1) // LANES * ((rows + TILE_ROWS - 1) // TILE_ROWS)
    line = CACHE_LINE // weights.itemsize
    step = (lines_of_turn(weights.itemsize) + calls - 1) // calls * line  # what is next within as many turns
    for begin in range(0, size, TILE_INPUTS):
        length = min(TILE_INPUTS, size - begin)
        following = begin + length
        asked = own + following * PANEL if following < size and own != NOWHERE else ahead
        for half in range(0, count, LANES):
            place = (first + begin * PANEL + half,)
            for row in range(tile.first_row, tile.last_row, TILE_ROWS):
                height, to = min(TILE_ROWS, tile.last_row - row), (row - tile.first_row) * PANEL + half
                x0 = _source(operation, row, routes) + begin
                x1 = _source(operation, row + min(1, height - 1), routes) + begin
                x2 = _source(operation, row + min(2, height - 1), routes) + begin
                x3 = _source(operation, row + min(3, height - 1), routes) + begin
                if height <= 4:
                    add_half_panel(acts, (x0, x1, x2, x3), panels, place, length, sums, to, weights, asked, step)
                else:
                    x4 = _source(operation, row + min(4, height - 1), routes) + begin
                    x5 = _source(operation, row + height - 1, routes) + begin
                    xs = (x0, x1, x2, x3, x4, x5)
                    add_half_panel(acts, xs, panels, place, length, sums, to, weights, asked, step)
                asked += length // UNROLLED * step


@inlined
def _source(operation: Any, row: int, routes: Ints) -> int:
    """Return where the activations of a row begin; that of a pair may be that of its token."""
    if operation.by_pair:
        row = routes[operation.num_experts + 1 + row]
    return int(operation.source + row * operation.source_width)


@called
def _put(
    operation: Any,
    matrix: Matrix,
    height: int,
    column: int,
    end: int,
    to: int,
    apart: int,
    constants: Floats,
    floats: Floats,
    sums: Floats,
    first: int,
) -> None:
    """Write the sums of a tile, from the first on, with what belongs to each output."""
    constants = borrowed(constants)
    floats = borrowed(floats)
    sums = borrowed(sums)
    width = COLUMN_BLOCK if end - column > PANEL else PANEL
    for i in range(height):
        for at in range(column, end, LANES):
            place, begin = to + i * apart + at, first + i * width + at - column
            value = load(sums, begin)
            if matrix.factor >= 0:
                value = mul(value, load(constants, matrix.factor + at))
            if matrix.bias >= 0:
                value = add(value, load(constants, matrix.bias + at))
            if operation.scale != 1:
                value = mul(value, splat(operation.scale))
            if at + LANES <= end:
                store(floats, place, add(value, load(floats, place)) if operation.goes == ADDED else value)
                continue
            store(sums, begin, value)
            for j in range(end - at):
                number = sums[begin + j]
                put(floats, place + j, number + take(floats, place + j) if operation.goes == ADDED else number)
