"""Blocks of products: right for every number of rows and outputs, and of the same bits whatever is computed beside."""

import numpy as np
import pytest
import torch

from pagedkv.data.forward_kernels import OPERATION
from pagedkv.data.forward_products import (
    ADDED,
    NOWHERE,
    SUMS,
    TO_FLOATS,
    Matrix,
    Tile,
    copy_size,
    multiply,
)
from pagedkv.data.simd_llvm import IS_WIDE
from pagedkv.data.simd_products import PANEL
from pagedkv.data.weights import _pack
from pagedkv.jit import compiled

SIZE = 200


@compiled
def products(operations, tiles, following, x, weights, constants, out, apart, routes, sums, copies, number):
    matrix, copied = Matrix(0, operations[0].bias, operations[0].factor), np.full(2, NOWHERE)
    for tile in tiles:
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
            sums,
            copies,
            copied,
            number,
        )


def computed(x, weights, *tiles, is_packed=False, following=NOWHERE, goes=TO_FLOATS, start=None, number=0):
    """Return what an operation makes of blocks of rows of x and weights, with a bias and a factor for each output."""
    count = len(weights)
    if is_packed:
        weights = weights.copy()
        _pack(torch.from_numpy(weights), 1)
    operations = np.zeros(1, OPERATION)
    fields = {
        "size_in": SIZE,
        "size_out": count,
        "source_width": SIZE,
        "row_stride": SIZE,
        "packed": count // PANEL * PANEL if is_packed else 0,
    }
    fields |= {"scale": 0.5, "goes": goes, "bias": 0, "factor": count}
    for name, given in fields.items():
        operations[name] = given
    constants = np.concatenate([np.arange(count), 1 + np.arange(count), np.zeros(16)]).astype(np.float32)
    out = np.zeros((len(x), count), np.float32) if start is None else start.copy()
    sums = np.full(SUMS, np.nan, np.float32)
    kind = np.float32 if IS_WIDE else weights.dtype
    copies = np.full(2 * copy_size(operations.view(np.recarray)), np.nan if kind == np.float32 else 77, kind)
    routes = np.zeros(8, np.int64)
    flat = (x.ravel(), weights.ravel(), constants, out.ravel())
    products(operations, np.array(tiles), following, *flat, count, routes, sums, copies, number)
    return out


def given(rows, count, dtype=np.float32):
    rng = np.random.default_rng(rows)
    x, weights = rng.standard_normal((rows, SIZE), np.float32), rng.standard_normal((count, SIZE), np.float32)
    return x, (weights * 40).astype(dtype) if dtype == np.int8 else weights


COUNTS = (8, 32, 64, 90)


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 33, 64])
def test_products_are_right_whatever_the_rows_and_outputs(rows, count, dtype):
    x, weights = given(rows, count, dtype)
    got = computed(x, weights, (0, rows, 0, count))
    outputs = np.arange(count)
    exact = (x.astype(np.float64) @ weights.T.astype(np.float64) * (1 + outputs) + outputs) * 0.5
    assert np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max()
    alone = [computed(x, weights, (row, row + 1, 0, count)) for row in range(rows)]
    assert (got == np.sum(alone, axis=0)).all()
    assert (got == computed(x, weights, (0, rows, 0, count), is_packed=True)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("goes", [TO_FLOATS, ADDED])
@pytest.mark.parametrize("first", [0, 32, 64])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 96, 100, 128, 160, 224, 290])
def test_one_row_by_any_number_of_panels_is_what_many_rows_are(count, first, goes, dtype):
    x, weights = given(7, first + count + 40, dtype)
    start = np.arange(x.shape[0] * len(weights), dtype=np.float32).reshape(x.shape[0], -1)
    whole = computed(x, weights, (0, 7, 0, len(weights)), is_packed=True, goes=goes, start=start)
    for row, following in ((0, NOWHERE), (4, 10**9)):
        tile = (row, row + 1, first, first + count)
        got = computed(x, weights, tile, is_packed=True, goes=goes, start=start, following=following)
        block = slice(row, row + 1), slice(first, first + count)
        assert (got[block] == whole[block]).all()
        got[block] = start[block]
        assert (got == start).all()


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("rows", "tile"), [(20, (5, 12, 32, 61)), (60, (10, 50, 32, 88)), (9, (8, 9, 64, 90))])
def test_a_block_alone_is_written(rows, tile, is_packed):
    x, weights = given(rows, 90)
    start = np.full((rows, 90), 7, np.float32)
    whole = computed(x, weights, (0, rows, 0, 90))
    got = computed(x, weights, tile, is_packed=is_packed, start=start)
    block = slice(*tile[:2]), slice(*tile[2:])
    assert (got[block] == whole[block]).all()
    got[block] = 7
    assert (got == start).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 17, 40])
def test_sums_are_added_once(rows):
    x, weights = given(rows, 70)
    start = np.ones((rows, 70), np.float32)
    plain = computed(x, weights, (0, rows, 0, 70))
    for is_packed in (False, True):
        got = computed(x, weights, (0, rows, 0, 70), is_packed=is_packed, goes=ADDED, start=start)
        assert (got == plain + 1).all()


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("following", [NOWHERE, 0, 10**9, -(10**9)])
def test_what_is_asked_for_ahead_changes_nothing(following, rows):
    x, weights = given(rows, 90)
    plain = computed(x, weights, (0, rows, 0, 90))
    for is_packed in (False, True):
        assert (computed(x, weights, (0, rows, 0, 90), is_packed=is_packed, following=following) == plain).all()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("is_packed", "dtype"), [(True, np.int8), (False, np.int8), (False, np.float32)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3), (3, 1, 0, 2)])
def test_a_copy_of_weights_serves_the_rows_that_follow_and_no_others(number, is_packed, dtype, order):
    x, weights = given(138, 64, dtype)
    tiles = [(0, 64, 0, 64), (128, 138, 0, 32), (64, 128, 0, 64), (128, 138, 32, 64)]
    by_themselves = sum(computed(x, weights, tile, is_packed=is_packed) for tile in tiles)
    got = computed(x, weights, *[tiles[place] for place in order], is_packed=is_packed, number=number)
    assert np.array_equal(got, by_themselves)
