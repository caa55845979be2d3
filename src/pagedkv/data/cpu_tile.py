"""The inner loops of :mod:`pagedkv.data.cpu_kernels`: one tile of tokens, four query rows at a time.

What makes them fast. Query heads that share a kv head are rows of one small matrix, four of them worked on at a time,
so a key or a value is loaded and widened once for all. Tokens are visited in the order in which they lie in memory, a
few at a time for all heads, and asked for ahead of that: a head's row is too short for the hardware to see a stream.
Scores are powers of two (``log2(e)`` is in the scale) and interleaved by row, ``score[token * 4 + row]``.
"""

from __future__ import annotations

import numpy as np

from pagedkv.data.cpu_shapes import NOTHING, Array, Floats, Ints, Rules, Shape, Strides, padded, partial_size
from pagedkv.data.simd import (
    LANES,
    ROWS,
    add,
    any_greater,
    exp2,
    finite_or_zero,
    fma,
    load,
    load_part,
    maximum,
    maximum_by_row,
    mul,
    prefetch,
    splat,
    spread,
    store,
    store_half,
    sub,
    sum_by_row,
    sums,
    tanh,
    zeros,
)
from pagedkv.jit import compiled

__all__ = ["STEP", "TILE", "add_tile", "mask", "rescale", "score_tile", "soft_cap", "softmax"]

TILE = 32
"""Positions whose scores are held at a time."""
STEP = 4
"""Tokens that are visited for all heads before the next ones."""
AHEAD_BYTES = 8192
"""How far ahead of its use a row is asked for."""


@compiled
def _visit(count: int, row: int, head: int, width: int, num_heads: int, item_bytes: int) -> tuple[int, int]:
    """Return how many tokens to visit per head, and how many tokens ahead to ask for rows.

    Where the heads of a token lie side by side (NHD) it is a few, else (HND) all tokens of the tile.
    """
    side_by_side = head < row
    row_bytes = (num_heads if side_by_side else 1) * width * item_bytes
    return (STEP if side_by_side else count), min(TILE, max(STEP, AHEAD_BYTES // row_bytes))


@compiled
def score_tile(
    packed: Floats,
    num_heads: int,
    num_quads: int,
    keys: Array,
    key_at: Ints,
    tile: int,
    count: int,
    shape: Shape,
    strides: Strides,
    scores: Floats,
) -> None:
    """Score the rows of all heads against a tile's keys."""
    width = padded(shape.head_dim)
    step, ahead = _visit(count, strides.key, strides.key_head, shape.head_dim, num_heads, shape.item_bytes)
    for token in range(0, count, step):
        for head in range(num_heads):
            for quad in range(head * num_quads, (head + 1) * num_quads):
                to = quad * ROWS * TILE + token * ROWS
                at = quad * ROWS * width
                first = tile + token
                _score_keys(
                    packed, at, keys, key_at, first, step, head * strides.key_head, ahead, shape.head_dim, scores, to
                )


@compiled
def _score_keys(
    packed: Floats,
    at: int,
    keys: Array,
    key_at: Ints,
    first: int,
    count: int,
    head_at: int,
    ahead: int,
    dim: int,
    scores: Floats,
    to: int,
) -> None:
    """Score four rows against ``count`` keys, two at a time: eight sums in flight hide the latency of one."""
    width = padded(dim)
    for i in range(first, first + count, 2):
        x, y = key_at[i] + head_at, key_at[i + 1] + head_at
        x_ahead, y_ahead = key_at[i + ahead] + head_at, key_at[i + 1 + ahead] + head_at
        x0, x1, x2, x3 = zeros(), zeros(), zeros(), zeros()
        y0, y1, y2, y3 = zeros(), zeros(), zeros(), zeros()
        for d in range(0, width, LANES):
            prefetch(keys, x_ahead + d)
            prefetch(keys, y_ahead + d)
            if d + LANES <= dim:
                key_x, key_y = load(keys, x + d), load(keys, y + d)
            else:
                key_x, key_y = load_part(keys, x + d, dim - d), load_part(keys, y + d, dim - d)
            query = load(packed, at + d)
            x0, y0 = fma(query, key_x, x0), fma(query, key_y, y0)
            query = load(packed, at + width + d)
            x1, y1 = fma(query, key_x, x1), fma(query, key_y, y1)
            query = load(packed, at + 2 * width + d)
            x2, y2 = fma(query, key_x, x2), fma(query, key_y, y2)
            query = load(packed, at + 3 * width + d)
            x3, y3 = fma(query, key_x, x3), fma(query, key_y, y3)
        store_half(scores, to + (i - first) * ROWS, sums(x0, x1, x2, x3, y0, y1, y2, y3))


@compiled
def rescale(scores: Floats, at: int, count: int, scales: Floats, scale_at: int) -> None:
    """Multiply the scores, or the weights, of four rows by the scale that each token's quantised numbers have."""
    for i in range(0, count * ROWS, LANES):
        store(scores, at + i, mul(load(scores, at + i), spread(scales, scale_at + i // ROWS)))


@compiled
def soft_cap(scores: Floats, at: int, count: int, cap: np.float32) -> None:
    """Turn scores, scaled by 1 / soft-cap, into soft-capped ones."""
    for i in range(at, at + count * ROWS, LANES):
        store(scores, i, mul(tanh(load(scores, i)), splat(cap)))


@compiled
def mask(
    scores: Floats,
    at: int,
    position: int,
    count: int,
    end: int,
    query_position: int,
    first_row: int,
    group: int,
    rules: Rules,
) -> None:
    """Hide the keys that a row does not see, and what stands behind the item's end."""
    for row in range(ROWS):
        query = query_position + (first_row + row) // group
        low = query - rules.window + 1
        high = min(end, query + 1) if rules.causal else end
        if low <= position and position + count <= high:
            continue
        for i in range(count):
            if not low <= position + i < high:
                scores[at + i * ROWS + row] = NOTHING


@compiled
def softmax(scores: Floats, at: int, count: int, partials: Floats, partial: int, v_head_dim: int) -> None:
    """Turn the scores of four rows into weights; what they had gathered is rescaled only when a maximum moved."""
    before = load(partials, partial)
    top = before
    for i in range(at, at + count * ROWS, LANES):
        top = maximum(load(scores, i), top)
    top = maximum_by_row(top)
    base = finite_or_zero(top)  # of a row that has seen nothing yet
    total = zeros()
    for i in range(at, at + count * ROWS, LANES):
        weight = exp2(sub(load(scores, i), base))
        store(scores, i, weight)
        total = add(total, weight)
    factor = exp2(sub(before, base))
    store(partials, partial, top)
    store(partials, partial + LANES, fma(load(partials, partial + LANES), factor, sum_by_row(total)))
    if any_greater(top, before):
        width = padded(v_head_dim)
        factors = np.empty(LANES, np.float32)
        store(factors, 0, factor)
        for row in range(ROWS):
            row_factor = splat(factors[row])
            begin = partial + 2 * LANES + row * width
            for i in range(begin, begin + width, LANES):
                store(partials, i, mul(load(partials, i), row_factor))


@compiled
def add_tile(
    partials: Floats,
    at: int,
    num_heads: int,
    num_quads: int,
    values: Array,
    value_at: Ints,
    tile: int,
    count: int,
    shape: Shape,
    strides: Strides,
    scores: Floats,
) -> None:
    """Add a tile's weighted values to the rows of all heads."""
    dim = shape.v_head_dim
    step, ahead = _visit(count, strides.value, strides.value_head, dim, num_heads, shape.item_bytes)
    for token in range(0, count, step):
        for head in range(num_heads):
            for quad in range(head * num_quads, (head + 1) * num_quads):
                to = at + quad * partial_size(dim) + 2 * LANES
                weights = quad * ROWS * TILE + token * ROWS
                first, head_at = tile + token, head * strides.value_head
                _add_values(
                    partials, to, values, value_at, first, step, head_at, ahead, shape.v_head_dim, scores, weights
                )


@compiled
def _add_values(
    partials: Floats,
    to: int,
    values: Array,
    value_at: Ints,
    first: int,
    count: int,
    head_at: int,
    ahead: int,
    dim: int,
    scores: Floats,
    weights: int,
) -> None:
    """Add ``count`` weighted values to four rows, four at a time: a row is loaded and stored once for them."""
    width = padded(dim)
    for i in range(first, first + count, STEP):
        w = weights + (i - first) * ROWS
        w0, x0, y0, z0 = splat(scores[w]), splat(scores[w + 4]), splat(scores[w + 8]), splat(scores[w + 12])
        w1, x1, y1, z1 = splat(scores[w + 1]), splat(scores[w + 5]), splat(scores[w + 9]), splat(scores[w + 13])
        w2, x2, y2, z2 = splat(scores[w + 2]), splat(scores[w + 6]), splat(scores[w + 10]), splat(scores[w + 14])
        w3, x3, y3, z3 = splat(scores[w + 3]), splat(scores[w + 7]), splat(scores[w + 11]), splat(scores[w + 15])
        at_w, at_x = value_at[i] + head_at, value_at[i + 1] + head_at
        at_y, at_z = value_at[i + 2] + head_at, value_at[i + 3] + head_at
        ahead_w, ahead_x = value_at[i + ahead] + head_at, value_at[i + 1 + ahead] + head_at
        ahead_y, ahead_z = value_at[i + 2 + ahead] + head_at, value_at[i + 3 + ahead] + head_at
        for d in range(0, width, LANES):
            if d + LANES <= dim:
                value_w, value_x = load(values, at_w + d), load(values, at_x + d)
                value_y, value_z = load(values, at_y + d), load(values, at_z + d)
            else:
                value_w, value_x = load_part(values, at_w + d, dim - d), load_part(values, at_x + d, dim - d)
                value_y, value_z = load_part(values, at_y + d, dim - d), load_part(values, at_z + d, dim - d)
            prefetch(values, ahead_w + d)
            prefetch(values, ahead_x + d)
            prefetch(values, ahead_y + d)
            prefetch(values, ahead_z + d)
            at = to + d
            row = fma(x0, value_x, fma(w0, value_w, load(partials, at)))
            store(partials, at, fma(z0, value_z, fma(y0, value_y, row)))
            at += width
            row = fma(x1, value_x, fma(w1, value_w, load(partials, at)))
            store(partials, at, fma(z1, value_z, fma(y1, value_y, row)))
            at += width
            row = fma(x2, value_x, fma(w2, value_w, load(partials, at)))
            store(partials, at, fma(z2, value_z, fma(y2, value_y, row)))
            at += width
            row = fma(x3, value_x, fma(w3, value_w, load(partials, at)))
            store(partials, at, fma(z3, value_z, fma(y3, value_y, row)))
