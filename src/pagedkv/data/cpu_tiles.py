"""Attention over one tile of keys and values: scores, weights, weighted values, for few and for many rows of queries.

The states of four rows are one partial softmax: the maximum and the sum of each row in its lanes, then the weighted
values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.cpu_plan import TILE, Rules, Shape, padded
from pagedkv.data.simd import (
    add,
    any_greater,
    exp2,
    exp2_to_bfloat16,
    finite_or_zero,
    fma,
    is_bfloat16,
    load,
    load_fours,
    load_pairs,
    load_pairs_part,
    load_part,
    maximum,
    maximum_by_row,
    mul,
    prefetch,
    raised,
    seen,
    splat,
    splat_at,
    spread,
    store,
    sub,
    sum_by_row,
    tanh,
    zeros,
)
from pagedkv.data.simd_llvm import CACHE_LINE, IS_WIDE, LANES, ROWS
from pagedkv.data.simd_products import (
    add_pair_products_16,
    add_pair_products_64,
    add_pairs,
    add_products_16,
    add_products_64,
    add_rows,
    dots,
    paired,
    scores_of,
    turn,
)
from pagedkv.jit import borrowed, called, inlined

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NOTHING = np.float32(-np.inf)
ONES = np.uint32(0x3F803F80).view(np.float32)
"""Two ones of bfloat16."""
MARGIN = np.float32(8)
"""Powers of two by which a score may exceed the number that is taken off: weights stay exact, and most tiles change no
maximum (Dao, FlashAttention-4, 2025)."""


class Strides(NamedTuple):
    """Distances in elements."""

    query: int
    query_head: int
    key_block: int
    key: int
    key_head: int
    value_block: int
    value: int
    value_head: int
    out: int
    out_head: int
    scale_block: int
    scale: int
    scale_head: int


class Quad(NamedTuple):
    """Columns of the list of an item's fours of rows.

    Where the partial of the first head is and how far it is to the next one; where the thread's own states are; where
    the piece begins, and which of its rows is the first. Some row sees the positions from low up to ``end``, all see
    those from ``all_low`` up to ``all_end``.
    """

    partial: int
    next_head: int
    own: int
    merged: int
    position: int
    first_row: int
    low: int
    end: int
    all_low: int
    all_end: int


QUAD = Quad(*range(10))


# The inner loops: one tile of tokens, four query rows at a time.
#
# What makes them fast. Query heads that share a kv head are rows of one small matrix, four of them worked on at a
# time, so a key or a value is loaded and widened once for all. Keys of bfloat16, and all where registers are few, are
# turned, so that sixteen of them are the lanes of a vector and no product has to be summed up across lanes, which
# would be as much work as to multiply. Others are visited in the order in which they lie in memory, a few at a time for
# all heads, and rows are asked for ahead of that: one is too short for the hardware to see a stream. Scores are powers
# of two (``log2(e)`` is in the scale) and interleaved by row, ``score[token * 4 + row]``.

STEP = 4
"""Tokens that are scored together."""
VISITED = STEP if IS_WIDE else LANES
"""Tokens whose values are visited for all heads before the next ones: sums leave the registers in between."""
FEW_QUADS = 4
"""Up to that many fours of rows of a head read values where they lie; a copy of a tile serves more."""
AHEAD_BYTES = 8192
"""How far ahead of its use a row is asked for."""


@inlined
def _ahead(row: int, head: int, width: int, num_heads: int, item_bytes: int) -> int:
    """Return how many tokens ahead to ask for rows."""
    row_bytes = (num_heads if head < row else 1) * width * item_bytes
    return min(TILE, max(STEP, AHEAD_BYTES // row_bytes))


@called
def ask_for_rows(array: Array, places: Ints, count: int, num_heads: int, row: int, apart: int, width: int) -> None:
    """Ask for the first rows, of all heads, at once.

    What computes asks for those that lie further ahead; it would wait for these, a few at a time.
    """
    array = borrowed(array)
    places = borrowed(places)
    for i in range(min(count, _ahead(row, apart, width, num_heads, array.itemsize))):
        for head in range(num_heads):
            at = places[i] + head * apart
            for d in range(0, width, CACHE_LINE // array.itemsize):
                prefetch(array, at + d)


@inlined
def score_few(
    packed: Array,
    num_heads: int,
    num_quads: int,
    keys: Array,
    key_at: Ints,
    tile: int,
    count: int,
    shape: Shape,
    strides: Strides,
    scale: np.float32,
    scores: Floats,
    key_tile: Floats,
) -> None:
    """Score the rows of all heads against a tile's keys."""
    width = row_width(shape.head_dim, packed)
    ahead = _ahead(strides.key, strides.key_head, shape.head_dim, num_heads, shape.item_bytes)
    if are_turned(packed):
        # As many keys as are scored together; where heads of a token lie side by side, of all heads before the next.
        is_cut = not IS_WIDE and strides.key_head < strides.key
        size, ahead = (LANES, LANES) if is_cut else (count, ahead)
        for token in range(0, count, size):
            some = min(size, count - token)
            for head in range(num_heads):
                head_at = head * strides.key_head
                turn_keys(packed, keys, key_at, tile + token, head_at, ahead, some, shape.head_dim, key_tile)
                for quad in range(num_quads):
                    row = (head * num_quads + quad) * ROWS
                    to = row * TILE + token * ROWS
                    score_turned(packed, row * width, key_tile, some, shape.head_dim, scale, scores, to)
        return
    step = STEP if strides.key_head < strides.key else count
    for token in range(0, count, step):
        for head in range(num_heads):
            head_at, at = head * strides.key_head, head * num_quads * ROWS
            for i in range(token, token + step, STEP):
                to = at * TILE + i * ROWS
                _score_keys(
                    packed,
                    at * width,
                    width,
                    num_quads,
                    keys,
                    key_at,
                    tile + i,
                    head_at,
                    ahead,
                    shape.head_dim,
                    scores,
                    to,
                )


@inlined
def _score_keys(
    packed: Array,
    at: int,
    width: int,
    num_quads: int,
    keys: Array,
    key_at: Ints,
    first: int,
    head_at: int,
    ahead: int,
    dim: int,
    scores: Floats,
    to: int,
) -> None:
    """Score the rows of a head against four keys."""
    for i in range(first + ahead, first + ahead + STEP):
        for d in range(0, dim, LANES):
            prefetch(keys, key_at[i] + head_at + d)
    w, x = key_at[first] + head_at, key_at[first + 1] + head_at
    y, z = key_at[first + 2] + head_at, key_at[first + 3] + head_at
    for quad in range(num_quads):
        store(scores, to + quad * ROWS * TILE, dots(packed, at + quad * ROWS * width, width, keys, w, x, y, z, dim))


@inlined
def are_turned(packed: Array) -> bool:
    """Tell whether keys are turned: of bfloat16, and all where sixteen sums of a vector do not fit into registers."""
    return not IS_WIDE or is_bfloat16(packed)


@inlined
def _per_lane(packed: Array) -> int:
    """Return how many numbers of a key stand in a lane."""
    return 2 if is_bfloat16(packed) else 1


@called
def turn_keys(
    packed: Array,
    keys: Array,
    key_at: Ints,
    first: int,
    head_at: int,
    ahead: int,
    count: int,
    dim: int,
    tile: Floats,
) -> None:
    """Copy keys to a tile, sixteen side by side, as numbers or in pairs; some of those `ahead` are asked for."""
    keys = borrowed(keys)
    key_at = borrowed(key_at)
    tile = borrowed(tile)
    packed = borrowed(packed)
    step = _per_lane(packed) * LANES
    size = row_width(dim, packed) // step * LANES * LANES
    for i in range(0, count, LANES):
        to = i // LANES * size
        for d in range(0, dim, step):
            if d % (CACHE_LINE // keys.itemsize) == 0:
                for key in range(first + i, first + i + LANES):
                    prefetch(keys, key_at[key + ahead] + head_at + d)
            turn(packed, keys, key_at, first + i, head_at + d, dim - d, tile, to)
            to += LANES * LANES


@inlined
def score_turned(
    packed: Array, at: int, tile: Floats, count: int, dim: int, scale: np.float32, scores: Floats, to: int
) -> None:
    """Score four rows against keys that were turned."""
    width = row_width(dim, packed)
    length = width // _per_lane(packed)
    apart = length * LANES
    if not IS_WIDE:
        for i in range(0, count, LANES):
            scores_of(packed, at, width, tile, (i * length,), length, scale, scores, to + i * ROWS)
    elif count > 2 * LANES:
        scores_of(packed, at, width, tile, (0 * apart, apart, 2 * apart, 3 * apart), length, scale, scores, to)
    elif count > LANES:
        scores_of(packed, at, width, tile, (0 * apart, apart), length, scale, scores, to)
    else:
        scores_of(packed, at, width, tile, (0 * apart,), length, scale, scores, to)


@called
def rescale(scores: Floats, at: int, count: int, scales: Floats, scale_at: int) -> None:
    """Multiply the scores, or the weights, of four rows by the scale that each token's quantised numbers have."""
    for i in range(0, count * ROWS, LANES):
        store(scores, at + i, mul(load(scores, at + i), spread(scales, scale_at + i // ROWS)))


@called
def soft_cap(scores: Floats, at: int, count: int, cap: np.float32) -> None:
    """Turn scores, scaled by 1 / soft-cap, into soft-capped ones."""
    for i in range(at, at + count * ROWS, LANES):
        store(scores, i, mul(tanh(load(scores, i)), splat(cap)))


@called
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
    few: Floats,
) -> None:
    """Hide the keys that a row does not see, and what stands behind the item's end."""
    is_whole = True
    for row in range(ROWS):
        query = query_position + (first_row + row) // group
        low = query - rules.window + 1 - position
        high = (min(end, query + 1) if rules.causal else end) - position
        is_whole = is_whole and low <= 0 and count <= high
        few[row], few[ROWS + row] = min(max(low, 0), count), min(max(high, 0), count)
    if is_whole:
        return
    lows, highs = load_fours(few, (0, 0, 0, 0)), load_fours(few, (ROWS, ROWS, ROWS, ROWS))
    for i in range(0, count * ROWS, LANES):
        first = splat(np.float32(i // ROWS))
        store(scores, at + i, seen(load(scores, at + i), first, lows, highs))


@inlined
def softmax(
    scores: Floats, at: int, count: int, partials: Floats, partial: int, v_head_dim: int, packed: Array, factors: Floats
) -> None:
    """Turn the scores of four rows into weights; what they gathered is rescaled only when a maximum moved by far."""
    before = load(partials, partial)
    top = before
    for i in range(at, at + count * ROWS, LANES):
        top = maximum(load(scores, i), top)
    top = raised(maximum_by_row(top), before, splat(MARGIN))
    base = finite_or_zero(top)  # of a row that has seen nothing yet
    total = zeros()
    if is_bfloat16(packed):
        for i in range(0, count * ROWS, 2 * LANES):
            first, second = sub(load(scores, at + i), base), sub(load(scores, at + i + LANES), base)
            pairs = paired(exp2_to_bfloat16(first), exp2_to_bfloat16(second))
            store(scores, at + i // 2, pairs)
            total = add_pairs(pairs, splat(ONES), total)
    else:
        for i in range(at, at + count * ROWS, LANES):
            weight = exp2(sub(load(scores, i), base))
            store(scores, i, weight)
            total = add(total, weight)
    factor = exp2(sub(before, base))
    store(partials, partial, top)
    store(partials, partial + LANES, fma(load(partials, partial + LANES), factor, sum_by_row(total)))
    if any_greater(top, before):
        width = padded(v_head_dim)
        store(factors, 0, factor)
        for row in range(ROWS):
            row_factor = splat_at(factors, row)
            begin = partial + 2 * LANES + row * width
            for i in range(begin, begin + width, LANES):
                store(partials, i, mul(load(partials, i), row_factor))


@inlined
def add_few(
    partials: Floats,
    quads: Ints,
    num_heads: int,
    num_quads: int,
    values: Array,
    value_at: Ints,
    tile: int,
    count: int,
    shape: Shape,
    strides: Strides,
    packed: Array,
    scores: Floats,
) -> None:
    """Add a tile's weighted values to the rows of all heads."""
    dim = shape.v_head_dim
    ahead = _ahead(strides.value, strides.value_head, dim, num_heads, shape.item_bytes)
    # Where the heads of a token lie side by side (NHD) a few tokens are visited for all of them.
    size = VISITED if num_heads > 1 and strides.value_head < strides.value else count
    for token in range(0, count, size):
        step = min(size, count - token)
        for head in range(num_heads):
            head_at = head * strides.value_head
            for quad in range(num_quads):
                to = quads[quad, QUAD.partial] + head * quads[quad, QUAD.next_head] + 2 * LANES
                weights, first = (head * num_quads + quad) * TILE * ROWS, tile + token
                if is_bfloat16(packed):
                    weights += token // 2 * ROWS
                    _add_pairs(partials, to, values, value_at, first, step, head_at, ahead, dim, scores, weights)
                else:
                    weights += token * ROWS
                    _add_values(partials, to, values, value_at, first, step, head_at, ahead, dim, scores, weights)


@inlined
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
    """Add ``count`` weighted values to four rows, sixteen numbers of each at a time, whose sums stay in registers."""
    width, asked = padded(dim), first + ahead
    for d in range(0, dim, LANES):
        at, left = head_at + d, dim - d
        add_rows(partials, to + d, width, values, value_at, first, asked, at, left, scores, weights, count)


@inlined
def _add_pairs(
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
    """Do the same with pairs of tokens."""
    width = padded(dim)
    for i in range(first, first + count, STEP):
        w = weights + (i - first) // 2 * ROWS
        at_w, at_x = value_at[i] + head_at, value_at[i + 1] + head_at
        at_y, at_z = value_at[i + 2] + head_at, value_at[i + 3] + head_at
        ahead_w, ahead_x = value_at[i + ahead] + head_at, value_at[i + 1 + ahead] + head_at
        ahead_y, ahead_z = value_at[i + 2 + ahead] + head_at, value_at[i + 3 + ahead] + head_at
        for d in range(0, width, LANES):
            if d + LANES <= dim:
                first_pairs = load_pairs(values, at_w + d, at_x + d)
                second_pairs = load_pairs(values, at_y + d, at_z + d)
            else:
                first_pairs = load_pairs_part(values, at_w + d, at_x + d, dim - d)
                second_pairs = load_pairs_part(values, at_y + d, at_z + d, dim - d)
            prefetch(values, ahead_w + d)
            prefetch(values, ahead_x + d)
            prefetch(values, ahead_y + d)
            prefetch(values, ahead_z + d)
            for row in range(ROWS):
                at = to + row * width + d
                some = add_pairs(splat_at(scores, w + row), first_pairs, load(partials, at))
                store(partials, at, add_pairs(splat_at(scores, w + ROWS + row), second_pairs, some))


# Many rows of a head: a tile's values are widened once for all of them.


@inlined
def widen(array: Array, places: Ints, first: int, count: int, dim: int, tile: Floats) -> None:
    """Copy rows, as float32 and with zeros to whole lanes; those of the next tile are asked for."""
    width = padded(dim)
    for i in range(count):
        at, ahead, to = places[first + i], places[first + TILE + i], i * width
        for d in range(0, width, LANES):
            prefetch(array, ahead + d)
            some = load(array, at + d) if d + LANES <= dim else load_part(array, at + d, dim - d)
            store(tile, to + d, some)


@inlined
def pair_up(array: Array, places: Ints, first: int, count: int, dim: int, tile: Floats) -> None:
    """Copy rows of bfloat16 as pairs of tokens, with zeros to whole lanes; those of the next tile are asked for."""
    width = padded(dim)
    for i in range(0, count, 2):
        at, following, to = places[first + i], places[first + i + 1], i // 2 * width
        for d in range(0, width, LANES):
            prefetch(array, places[first + TILE + i] + d)
            prefetch(array, places[first + TILE + i + 1] + d)
            if d + LANES <= dim:
                store(tile, to + d, load_pairs(array, at + d, following + d))
            else:
                store(tile, to + d, load_pairs_part(array, at + d, following + d, dim - d))


@inlined
def score_many(packed: Array, at: int, tile: Floats, count: int, dim: int, scores: Floats) -> None:
    """Score four rows against the keys of a tile."""
    width = padded(dim)
    for i in range(0, count, STEP):
        key = i * width
        store(
            scores, i * ROWS, dots(packed, at, width, tile, key, key + width, key + 2 * width, key + 3 * width, width)
        )


@inlined
def add_many(partials: Floats, at: int, tile: Floats, scores: Floats, count: int, dim: int, packed: Array) -> None:
    """Add the weighted values of a tile to four rows."""
    width = padded(dim)
    d = 0
    while IS_WIDE and d + 4 * LANES <= width:
        if is_bfloat16(packed):
            add_pair_products_64(partials, at + d, width, tile, d, scores, 0, count // 2)
        else:
            add_products_64(partials, at + d, width, tile, d, scores, 0, count)
        d += 4 * LANES
    while d < width:
        if is_bfloat16(packed):
            add_pair_products_16(partials, at + d, width, tile, d, scores, 0, count // 2)
        else:
            add_products_16(partials, at + d, width, tile, d, scores, 0, count)
        d += LANES


@inlined
def in_steps(count: int, packed: Array) -> int:
    """Return how many tokens of a tile are visited: whole steps, and whole vectors of pairs."""
    step = 2 * STEP if is_bfloat16(packed) else STEP
    return (min(TILE, count) + step - 1) // step * step


@inlined
def row_width(dim: int, packed: Array) -> int:
    """Return the length of a row of queries, whole vectors of what is multiplied."""
    return (dim + 2 * LANES - 1) // (2 * LANES) * (2 * LANES) if is_bfloat16(packed) else padded(dim)
