"""Blocks of products: right for every number of rows and outputs, and of the same bits in parts and beside others."""

import numpy as np
import pytest

from pagedkv.data.forward_kernels import OPERATION
from pagedkv.data.forward_products import (
    ADDED,
    MOST_COLUMNS,
    NOWHERE,
    ROW_BLOCK,
    SUMS_OF_COLUMN,
    TILE_ROWS,
    TO_FLOATS,
    Matrix,
    Tile,
    multiply,
    panel_size,
)
from pagedkv.jit import compiled

SIZE = 200


@compiled
def product(operations, tile, following, x, weights, constants, out, apart, routes, scratch, sums, panel):
    matrix = Matrix(0, operations[0].bias, operations[0].factor)
    multiply(
        operations[0],
        Tile(tile[0], tile[1], tile[2], tile[3]),
        matrix,
        following,
        0,
        apart,
        x,
        weights,
        constants,
        out,
        routes,
        scratch,
        sums,
        panel,
    )


def computed(x, weights, tile, *, part=SIZE, inner=8, following=NOWHERE, goes=TO_FLOATS, start=None):
    """Return what an operation makes of a block of rows of x and weights, with a bias and a factor for each output."""
    count = len(weights)
    operations = np.zeros(1, OPERATION)
    fields = {
        "size_in": SIZE,
        "size_out": count,
        "source_width": SIZE,
        "row_stride": SIZE,
        "inner": inner,
        "part": part,
    }
    fields |= {"scale": 0.5, "goes": goes, "bias": 0, "factor": count}
    for name, given in fields.items():
        operations[name] = given
    constants = np.concatenate([np.arange(count), 1 + np.arange(count), np.zeros(16)]).astype(np.float32)
    out = np.zeros((len(x), count), np.float32) if start is None else start.copy()
    scratch = np.zeros(16, np.float32)
    sums = np.full(ROW_BLOCK // TILE_ROWS * MOST_COLUMNS * SUMS_OF_COLUMN, np.nan, np.float32)
    panel = np.zeros(panel_size(operations.view(np.recarray)) if weights.dtype == np.int8 else 0, np.float32)
    routes = np.zeros(8, np.int64)
    flat = (x.ravel(), weights.ravel(), constants, out.ravel())
    product(operations, np.array(tile), following, *flat, count, routes, scratch, sums, panel)
    return out


def given(rows, count, dtype=np.float32):
    rng = np.random.default_rng(rows)
    x, weights = rng.standard_normal((rows, SIZE), np.float32), rng.standard_normal((count, SIZE), np.float32)
    return x, (weights * 40).astype(dtype) if dtype == np.int8 else weights


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("part", [SIZE, 96, 32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 64])
def test_products_are_right_whatever_the_rows_and_parts(rows, part, dtype):
    x, weights = given(rows, 30, dtype)
    got = computed(x, weights, (0, rows, 0, 30), part=part)
    exact = (x.astype(np.float64) @ weights.T.astype(np.float64) * (1 + np.arange(30)) + np.arange(30)) * 0.5
    assert np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max()
    alone = [computed(x, weights, (row, row + 1, 0, 30)) for row in range(rows)]
    assert (got == np.sum(alone, axis=0)).all()


@pytest.mark.parametrize("part", [SIZE, 64])
def test_a_block_alone_is_written(part):
    x, weights = given(20, 30)
    start = np.full((20, 30), 7, np.float32)
    whole = computed(x, weights, (0, 20, 0, 30))
    got = computed(x, weights, (5, 12, 16, 29), part=part, start=start)
    assert (got[5:12, 16:29] == whole[5:12, 16:29]).all()
    got[5:12, 16:29] = 7
    assert (got == start).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 17])
def test_sums_are_added_once(rows):
    x, weights = given(rows, 24)
    start = np.ones((rows, 24), np.float32)
    plain = computed(x, weights, (0, rows, 0, 24))
    for part in (SIZE, 64):
        got = computed(x, weights, (0, rows, 0, 24), part=part, goes=ADDED, start=start)
        assert (got == plain + 1).all()


@pytest.mark.parametrize("following", [NOWHERE, 0, 10**9, -(10**9)])
def test_what_is_asked_for_ahead_changes_nothing(following):
    x, weights = given(9, 30)
    assert (computed(x, weights, (0, 9, 0, 30), following=following) == computed(x, weights, (0, 9, 0, 30))).all()
