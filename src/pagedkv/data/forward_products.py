"""Products of rows of activations and weights, a block of rows and outputs at a time.

An output is summed up in one order, whatever is computed beside it. Weights are asked for ahead of their use: where
several rows are multiplied by each, the processor by itself begins to read them as they are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.simd import (
    add,
    is_int8,
    load,
    load_fours,
    load_part,
    mul,
    prefetch,
    put,
    splat,
    store_fours,
    store_narrowed,
    zeros,
)
from pagedkv.data.simd_llvm import CACHE_LINE, LANES
from pagedkv.data.simd_products import WIDENED, add_dots, dot_stream, dot_tile, totals, widen
from pagedkv.jit import borrowed, called, inlined

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TO_ACTS, TO_FLOATS, ADDED = range(3)
"""What becomes of a row: narrowed into ``acts``, written into ``floats``, or added there."""

FEW_ROWS = 32
"""Up to so many rows are one block, and the items of a product are cut by ``columns``; more rows are cut as well."""
ROW_BLOCK = 64
COLUMN_BLOCK = 64
TILE_ROWS = 4
TILE_COLUMNS = 4
"""Sixteen sums and what they are multiplied from fit into the registers of AVX-512."""
SUMS_OF_COLUMN = TILE_ROWS * LANES
"""Sums of the lanes of a tile's rows, for one of its columns."""
MOST_COLUMNS = 16
"""The most of a panel."""
INNER_BYTES = 24 << 10
"""Weights that are multiplied by all rows of a block before the next ones: with four rows of activations they stay in
the first cache."""
PART_BYTES = 3 << 10
"""Of a row of activations, what is multiplied before the next: four rows of it stay in the first cache as well."""
NOWHERE = -(1 << 62)
"""Where there are no weights to ask for; weights may lie before the array that places are counted from."""
BLOCK = ROW_BLOCK * COLUMN_BLOCK
"""Outputs of a block, of which an activation takes up to two."""
FEW_ROWS_COLUMNS = BLOCK // FEW_ROWS
"""The most outputs of an item of few rows that are a block: the longer the weights of an item are, the faster they are
read."""
FEW_ROWS_OF_INT8 = 8
"""More rows than these are worth a copy of the weights as what is multiplied, a panel at a time."""


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


def panel_of(size: int, item_bytes: int) -> tuple[int, int]:
    """Return how many outputs of so many inputs are a panel, and how many inputs are summed up at once."""
    vector = 2 * LANES
    parts = -(-size * item_bytes // PART_BYTES)
    part = min(size, -(-size // (parts * vector)) * vector)
    columns = min(MOST_COLUMNS, INNER_BYTES // (part * item_bytes))
    return max(TILE_COLUMNS, columns // TILE_COLUMNS * TILE_COLUMNS), part


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
    scratch: Floats,
    sums: Floats,
    panel: Array,
) -> None:
    """Multiply a block of rows by a block of weights; output ``column`` of a row is ``apart`` from that of the next.

    The first rows read a panel of the weights as a stream; the others ask for the next one meanwhile, of which the last
    begins at `following`.
    """
    acts = borrowed(acts)
    weights = borrowed(weights)
    constants = borrowed(constants)
    floats = borrowed(floats)
    routes = borrowed(routes)
    scratch = borrowed(scratch)
    sums = borrowed(sums)
    panel = borrowed(panel)
    stride, size, rows = operation.row_stride, operation.size_in, tile.last_row - tile.first_row
    if rows == 1:
        _multiply_row(
            operation, tile, matrix, target + tile.first_row * apart, acts, weights, constants, floats, routes, scratch
        )
        return
    groups = (rows + TILE_ROWS - 1) // TILE_ROWS
    line = CACHE_LINE // weights.itemsize
    part = operation.part if groups > 1 else size
    tiles = max(1, groups - 1) * ((size + part - 1) // part)
    step = (TILE_COLUMNS * stride + tiles * line - 1) // (tiles * line) * line
    for inner in range(tile.first_column, tile.last_column, operation.inner):
        inner_end = min(tile.last_column, inner + operation.inner)
        first = matrix.weight + inner * stride
        ahead = following if inner_end == tile.last_column else matrix.weight + inner_end * stride
        if is_int8(weights) and rows > FEW_ROWS_OF_INT8:
            width = (size + 2 * LANES - 1) // (2 * LANES) * (2 * LANES)
            _widen(weights, first, stride, inner_end - inner, size, width, panel)
            _multiply_panel(
                operation,
                tile,
                matrix,
                target,
                apart,
                acts,
                panel,
                0,
                width,
                inner,
                inner_end,
                constants,
                floats,
                routes,
                scratch,
                sums,
                weights,
                ahead,
                step,
                part,
            )
        else:
            _multiply_panel(
                operation,
                tile,
                matrix,
                target,
                apart,
                acts,
                weights,
                first,
                stride,
                inner,
                inner_end,
                constants,
                floats,
                routes,
                scratch,
                sums,
                weights,
                ahead,
                step,
                part,
            )


@called
def _multiply_row(
    operation: Any,
    tile: Tile,
    matrix: Matrix,
    to: int,
    acts: Array,
    weights: Array,
    constants: Floats,
    floats: Floats,
    routes: Ints,
    scratch: Floats,
) -> None:
    """Multiply one row by a block of weights: nothing else in the loop, which reads at the memory's speed."""
    acts = borrowed(acts)
    weights = borrowed(weights)
    constants = borrowed(constants)
    floats = borrowed(floats)
    routes = borrowed(routes)
    scratch = borrowed(scratch)
    stride, size, x = operation.row_stride, operation.size_in, _source(operation, tile.first_row, routes)
    whole_end = tile.last_column - (tile.last_column - tile.first_column) % TILE_COLUMNS
    for column in range(tile.first_column, whole_end, TILE_COLUMNS):
        columns = _four_from(matrix.weight + column * stride, stride)
        dot_tile(acts, (x,), weights, columns, size, scratch)
        _put(operation, matrix, 1, column, to + column, 0, constants, floats, scratch)
    if whole_end < tile.last_column:
        last, count = matrix.weight + whole_end * stride, tile.last_column - whole_end
        _multiply_rest(acts, (x, x, x, x), weights, last, stride, count, size, scratch)
        _put_rest(operation, matrix, 1, whole_end, count, to + whole_end, 0, constants, floats, scratch)


@called
def _multiply_panel(
    operation: Any,
    tile: Tile,
    matrix: Matrix,
    target: int,
    apart: int,
    acts: Array,
    panel: Array,
    first: int,
    stride: int,
    inner: int,
    inner_end: int,
    constants: Floats,
    floats: Floats,
    routes: Ints,
    scratch: Floats,
    sums: Floats,
    weights: Array,
    ahead: int,
    step: int,
    part: int,
) -> None:
    """Multiply a block of rows by the weights of the outputs inner … inner_end, the first of which begins at first."""
    acts = borrowed(acts)
    panel = borrowed(panel)
    constants = borrowed(constants)
    floats = borrowed(floats)
    routes = borrowed(routes)
    scratch = borrowed(scratch)
    sums = borrowed(sums)
    weights = borrowed(weights)
    size, line = operation.size_in, CACHE_LINE // weights.itemsize
    whole_end = inner + (inner_end - inner) // TILE_COLUMNS * TILE_COLUMNS
    if part < size:
        groups = (tile.last_row - tile.first_row + TILE_ROWS - 1) // TILE_ROWS
        sums[: groups * (inner_end - inner) * SUMS_OF_COLUMN] = 0
    for begin in range(0, size, part):
        is_last = begin + part >= size
        row, place = tile.first_row, 0
        while row < tile.last_row:
            height = min(TILE_ROWS, tile.last_row - row)
            x0, x1 = _source(operation, row, routes), _source(operation, row + min(1, height - 1), routes)
            x2 = _source(operation, row + (2 if height > 2 else 0), routes)
            x3 = _source(operation, row + height - 1, routes)
            to = target + row * apart
            for column in range(inner, whole_end, TILE_COLUMNS):
                columns = _four_from(first + (column - inner) * stride + begin, stride)
                if ahead != NOWHERE and row > tile.first_row:
                    for i in range(ahead, ahead + step, line):
                        prefetch(weights, i)
                    ahead += step
                # One and two rows have code of their own for whole runs; else they are computed twice, as `_put` has
                # it, and the last of three. The first rows find the weights in memory, or on their way.
                if part < size:
                    rows = (x0 + begin, x1 + begin, x2 + begin, x3 + begin)
                    add_dots(acts, rows, panel, columns, min(part, size - begin), sums, place)
                    if is_last:
                        totals(sums, place, scratch)
                    place += TILE_COLUMNS * SUMS_OF_COLUMN
                elif height == 1:
                    dot_tile(acts, (x0,), panel, columns, size, scratch)
                elif row == tile.first_row:
                    dot_stream(acts, (x0, x1, x2, x3), panel, columns, size, scratch)
                elif height == 2:
                    dot_tile(acts, (x0, x1), panel, columns, size, scratch)
                else:
                    dot_tile(acts, (x0, x1, x2, x3), panel, columns, size, scratch)
                if is_last:
                    _put(operation, matrix, height, column, to + column, apart, constants, floats, scratch)
            if is_last and whole_end < inner_end:
                last = first + (whole_end - inner) * stride
                count = inner_end - whole_end
                _multiply_rest(acts, (x0, x1, x2, x3), panel, last, stride, count, size, scratch)
                _put_rest(
                    operation, matrix, height, whole_end, count, to + whole_end, apart, constants, floats, scratch
                )
            row += height


@inlined
def _four_from(first: int, stride: int) -> tuple[int, int, int, int]:
    return first, first + stride, first + 2 * stride, first + 3 * stride


@called
def _multiply_rest(
    acts: Array,
    rows: tuple[int, int, int, int],
    weights: Array,
    first: int,
    stride: int,
    count: int,
    size: int,
    scratch: Floats,
) -> None:
    """Multiply four rows by the last outputs, fewer than four."""
    acts = borrowed(acts)
    weights = borrowed(weights)
    scratch = borrowed(scratch)
    columns = (first, first + min(1, count - 1) * stride, first + (count - 1) * stride, first + (count - 1) * stride)
    dot_tile(acts, rows, weights, columns, size, scratch)


@inlined
def panel_size(operations: Array) -> int:
    """Return the most that the weights of one panel take, in what is multiplied."""
    size = 0
    for operation in operations:
        size = max(size, operation.inner * ((operation.size_in + 2 * LANES - 1) // (2 * LANES) * (2 * LANES)))
    return int(size)


@called
def _widen(weights: Array, first: int, stride: int, count: int, size: int, width: int, panel: Array) -> None:
    """Copy rows of weights as what is multiplied, with zeros to whole vectors."""
    weights = borrowed(weights)
    panel = borrowed(panel)
    whole = size - size % WIDENED
    for column in range(count):
        at, to = first + column * stride, column * width
        for i in range(0, whole, WIDENED):
            widen(weights, at + i, panel, to + i)
        for i in range(whole, width, LANES):
            some = zeros()
            if i + LANES <= size:
                some = load(weights, at + i)
            elif i < size:
                some = load_part(weights, at + i, size - i)
            store_narrowed(panel, to + i, some)


@inlined
def _source(operation: Any, row: int, routes: Ints) -> int:
    """Return where the activations of a row begin; that of a pair may be that of its token."""
    if operation.by_pair:
        row = routes[operation.num_experts + 1 + row]
    return int(operation.source + row * operation.source_width)


@inlined
def _put(
    operation: Any,
    matrix: Matrix,
    height: int,
    column: int,
    to: int,
    apart: int,
    constants: Floats,
    floats: Floats,
    scratch: Floats,
) -> None:
    """Write the sums of a tile, with what belongs to each output."""
    # Fewer rows than four stand in the lanes of the others, too.
    second = to + apart if height > 1 else to
    places = (to, second, to + 2 * apart, to + (height - 1) * apart) if height > 2 else (to, second, to, second)
    value = load(scratch, 0)
    if matrix.factor >= 0:
        at = matrix.factor + column
        value = mul(value, load_fours(constants, (at, at, at, at)))
    if matrix.bias >= 0:
        at = matrix.bias + column
        value = add(value, load_fours(constants, (at, at, at, at)))
    if operation.scale != 1:
        value = mul(value, splat(operation.scale))
    if operation.goes == ADDED:
        value = add(value, load_fours(floats, places))
    store_fours(floats, places, value)


@called
def _put_rest(
    operation: Any,
    matrix: Matrix,
    height: int,
    column: int,
    width: int,
    to: int,
    apart: int,
    constants: Floats,
    floats: Floats,
    scratch: Floats,
) -> None:
    """Write the sums of a tile of fewer outputs than four."""
    constants = borrowed(constants)
    floats = borrowed(floats)
    scratch = borrowed(scratch)
    for j in range(width):
        by = constants[matrix.factor + column + j] if matrix.factor >= 0 else np.float32(1)
        more = constants[matrix.bias + column + j] if matrix.bias >= 0 else np.float32(0)
        for i in range(height):
            number = (scratch[i * TILE_COLUMNS + j] * by + more) * operation.scale
            place = to + i * apart + j
            put(floats, place, number + floats[place] if operation.goes == ADDED else number)
