"""Numba kernels of paged attention: few queries over many keys, read from their blocks in place.

The work of a sequence is cut into items of :data:`SPLIT` positions. An item leaves a partial softmax (the running
maximum, the sum, the weighted values); the thread that finishes a sequence's last item puts them together, always in
the order of the positions: flash-decoding (Dao et al., 2023) over the online softmax of Milakov and Gimelshein (2018).
Items and tiles are cut at fixed positions and each is computed by one thread in one order, so what a query gets depends
neither on the queries beside it, nor on the rest of the batch, nor on the number of threads, to the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.cpu_plan import SPLIT, TILE, Plan, Rules, Shape, padded, partial_size
from pagedkv.data.simd import (
    LANES,
    ROWS,
    add,
    any_greater,
    exp2,
    fetch_add,
    finite_or_zero,
    fma,
    load,
    load_part,
    maximum,
    maximum_by_row,
    mul,
    narrowed,
    prefetch,
    splat,
    splat_at,
    spread,
    store,
    store_half,
    sub,
    sum_by_row,
    sums,
    tanh,
    zeros,
)
from pagedkv.jit import called, compiled, inlined

# What the CPU kernels are told: sizes, distances, rules; and how long their rows are.

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NOTHING = np.float32(-np.inf)


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


class Bases(NamedTuple):
    """Elements of the flat arrays before this call's own: one array may hold the keys and values of all layers."""

    query: int
    key: int
    value: int
    key_scale: int
    value_scale: int
    out: int


# The inner loops: one tile of tokens, four query rows at a time.
#
# What makes them fast. Query heads that share a kv head are rows of one small matrix, four of them worked on at a
# time, so a key or a value is loaded and widened once for all. Tokens are visited in the order in which they lie in
# memory, a few at a time for all heads, and asked for ahead of that: a head's row is too short for the hardware to
# see a stream. Scores are powers of two (``log2(e)`` is in the scale) and interleaved by row, ``score[token * 4 +
# row]``.

STEP = 4
"""Tokens that are visited for all heads before the next ones."""
AHEAD_BYTES = 8192
"""How far ahead of its use a row is asked for."""


@inlined
def _visit(count: int, row: int, head: int, width: int, num_heads: int, item_bytes: int) -> tuple[int, int]:
    """Return how many tokens to visit per head, and how many tokens ahead to ask for rows.

    Where the heads of a token lie side by side (NHD) it is a few, else (HND) all tokens of the tile.
    """
    side_by_side = head < row
    row_bytes = (num_heads if side_by_side else 1) * width * item_bytes
    return (STEP if side_by_side else count), min(TILE, max(STEP, AHEAD_BYTES // row_bytes))


@inlined
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


@inlined
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


@inlined
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
            row_factor = splat_at(factors, row)
            begin = partial + 2 * LANES + row * width
            for i in range(begin, begin + width, LANES):
                store(partials, i, mul(load(partials, i), row_factor))


@inlined
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
    """Add ``count`` weighted values to four rows, four at a time: a row is loaded and stored once for them."""
    width = padded(dim)
    for i in range(first, first + count, STEP):
        w = weights + (i - first) * ROWS
        w0, x0, y0, z0 = _weights(scores, w)
        w1, x1, y1, z1 = _weights(scores, w + 1)
        w2, x2, y2, z2 = _weights(scores, w + 2)
        w3, x3, y3, z3 = _weights(scores, w + 3)
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
            _add_row(partials, at, w0, x0, y0, z0, value_w, value_x, value_y, value_z)
            _add_row(partials, at + width, w1, x1, y1, z1, value_w, value_x, value_y, value_z)
            _add_row(partials, at + 2 * width, w2, x2, y2, z2, value_w, value_x, value_y, value_z)
            _add_row(partials, at + 3 * width, w3, x3, y3, z3, value_w, value_x, value_y, value_z)


@inlined
def _weights(scores: Floats, at: int) -> tuple[Any, Any, Any, Any]:
    """Return the weights of one row for four tokens, each in all lanes."""
    first, second = splat_at(scores, at), splat_at(scores, at + ROWS)
    return first, second, splat_at(scores, at + 2 * ROWS), splat_at(scores, at + 3 * ROWS)


@inlined
def _add_row(
    partials: Floats,
    at: int,
    w: Any,
    x: Any,
    y: Any,
    z: Any,
    value_w: Any,
    value_x: Any,
    value_y: Any,
    value_z: Any,
) -> None:
    """Add four weighted values to the lanes of one row."""
    row = fma(x, value_x, fma(w, value_w, load(partials, at)))
    store(partials, at, fma(z, value_z, fma(y, value_y, row)))


@compiled
def attend_items(
    counters: Ints,
    num_parts: int,
    plan: Plan,
    partials: Floats,
    queries: Array,
    keys: Array,
    values: Array,
    key_scales: Floats | None,
    value_scales: Floats | None,
    out: Array,
    sinks: Floats,
    block_tables: Array,
    holes: Array,
    bases: Bases,
    shape: Shape,
    strides: Strides,
    rules: Rules,
) -> None:
    """Work on the items of a plan, each for ``1 / num_parts`` of the kv heads, until none is left.

    Runs in every thread. ``counters`` are ``plan.num_counters`` zeros: of the parts of items that were taken, then for
    each piece and for each item of those that are done. ``partials`` are ``plan.num_partials * partial_size`` floats;
    what they hold does not matter. Without scales keys and values are what they are, and nothing for scales is
    compiled. With them a key's scale multiplies its scores, and a value's scale its weight, once for all elements.
    """
    heads = (shape.num_kv_heads + num_parts - 1) // num_parts
    size = partial_size(shape.v_head_dim)
    packed = np.empty(heads * plan.most_quads * ROWS * padded(shape.head_dim), np.float32)
    scores = np.empty(heads * plan.most_quads * ROWS * TILE, np.float32)
    key_at = np.empty(SPLIT + 2 * TILE, np.int64)
    value_at = np.empty(SPLIT + 2 * TILE, np.int64)
    scales = np.empty(0 if key_scales is None else 2 * heads * SPLIT, np.float32)
    items, pieces = plan.items, plan.pieces
    while True:
        work = fetch_add(counters, 0, 1)
        if work >= len(items) * num_parts:
            return
        item, part = work // num_parts, work % num_parts
        start, end = items[item, 2], items[item, 3]
        piece = plan.members[items[item, 0]]
        sequence, first_query, num_queries = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
        first_head = min(part * heads, shape.num_kv_heads)
        num_heads = min(heads, shape.num_kv_heads - first_head)
        num_quads = (num_queries * shape.group + ROWS - 1) // ROWS
        split = start // SPLIT - pieces[piece, 7]
        partial = pieces[piece, 5] + split * num_quads * shape.num_kv_heads
        at = (partial + first_head * num_quads) * size
        table, hole = block_tables[sequence], holes[sequence]
        _locate(table, hole, start, end, first_head, bases, shape, strides, key_at, value_at)
        if key_scales is not None and value_scales is not None:
            to_key, to_value = bases.key_scale, bases.value_scale
            half = heads * SPLIT
            _gather_scales(
                key_scales, to_key, table, hole, start, end, first_head, num_heads, shape, strides, scales, 0
            )
            _gather_scales(
                value_scales, to_value, table, hole, start, end, first_head, num_heads, shape, strides, scales, half
            )
        _pack(queries, bases, first_query, num_queries, first_head, num_heads, shape, strides, rules, packed)
        _clear(partials, at, num_heads * num_quads, size)
        query_position = pieces[piece, 3]
        for tile in range(0, end - start, TILE):
            count = (min(TILE, end - start - tile) + STEP - 1) // STEP * STEP
            score_tile(packed, num_heads, num_quads, keys, key_at, tile, count, shape, strides, scores)
            for quad in range(num_heads * num_quads):
                at_score = quad * ROWS * TILE
                scale_at = quad // num_quads * SPLIT + tile
                if key_scales is not None:
                    rescale(scores, at_score, count, scales, scale_at)
                if rules.cap > 0:
                    soft_cap(scores, at_score, count, rules.cap)
                first_row = quad % num_quads * ROWS
                mask(scores, at_score, start + tile, count, end, query_position, first_row, shape.group, rules)
                softmax(scores, at_score, count, partials, at + quad * partial_size(shape.v_head_dim), shape.v_head_dim)
                if key_scales is not None:
                    rescale(scores, at_score, count, scales, heads * SPLIT + scale_at)
            add_tile(partials, at, num_heads, num_quads, values, value_at, tile, count, shape, strides, scores)
        if fetch_add(counters, 1 + piece, 1) == pieces[piece, 8] * num_parts - 1:
            _combine(partials, pieces[piece], sinks, out, bases, shape, strides)


@called
def _locate(
    table: Array,
    hole: Array,
    start: int,
    end: int,
    first_head: int,
    bases: Bases,
    shape: Shape,
    strides: Strides,
    key_at: Ints,
    value_at: Ints,
) -> None:
    """Find where the positions start … end lie; the last one is repeated behind, for what looks ahead."""
    for i in range(end - start):
        slot = start + i
        if slot >= hole[0]:
            slot += hole[1] - hole[0]
        block, offset = np.int64(table[slot // shape.block_size]), slot % shape.block_size
        key_at[i] = bases.key + block * strides.key_block + offset * strides.key
        key_at[i] += first_head * strides.key_head
        value_at[i] = bases.value + block * strides.value_block + offset * strides.value
        value_at[i] += first_head * strides.value_head
    for i in range(end - start, end - start + 2 * TILE):
        key_at[i] = key_at[end - start - 1]
        value_at[i] = value_at[end - start - 1]


@called
def _gather_scales(
    pool: Floats,
    base: int,
    table: Array,
    hole: Array,
    start: int,
    end: int,
    first_head: int,
    num_heads: int,
    shape: Shape,
    strides: Strides,
    scales: Floats,
    to: int,
) -> None:
    """Copy the scales of the positions start … end, SPLIT places for each head; behind them zeros to whole lanes."""
    for i in range(end - start):
        slot = start + i
        if slot >= hole[0]:
            slot += hole[1] - hole[0]
        block, offset = np.int64(table[slot // shape.block_size]), slot % shape.block_size
        at = base + block * strides.scale_block + offset * strides.scale + first_head * strides.scale_head
        for head in range(num_heads):
            scales[to + head * SPLIT + i] = pool[at + head * strides.scale_head]
    for head in range(num_heads):
        for i in range(end - start, (end - start + STEP - 1) // STEP * STEP):
            scales[to + head * SPLIT + i] = 0


@called
def _pack(
    queries: Array,
    bases: Bases,
    first_query: int,
    num_queries: int,
    first_head: int,
    num_heads: int,
    shape: Shape,
    strides: Strides,
    rules: Rules,
    packed: Floats,
) -> None:
    """Copy queries, scaled, to rows of whole lanes: row ``token * group + head of the group`` of each kv head."""
    width, rows = padded(shape.head_dim), num_queries * shape.group
    padded_rows = (rows + ROWS - 1) // ROWS * ROWS
    scale = splat(rules.scale)
    for head in range(num_heads):
        for row in range(padded_rows):
            to = (head * padded_rows + row) * width
            query_head = (first_head + head) * shape.group + row % shape.group
            at = bases.query + (first_query + row // shape.group) * strides.query + query_head * strides.query_head
            for i in range(0, width, LANES):
                count = min(LANES, shape.head_dim - i) if row < rows else 0
                value = load(queries, at + i) if count == LANES else zeros()
                if 0 < count < LANES:
                    value = load_part(queries, at + i, count)
                store(packed, to + i, mul(value, scale))


@called
def _clear(partials: Floats, at: int, count: int, size: int) -> None:
    for i in range(count):
        store(partials, at + i * size, splat(NOTHING))
        for j in range(LANES, size, LANES):
            store(partials, at + i * size + j, zeros())


@called
def _combine(
    partials: Floats,
    piece: Ints,
    sinks: Floats,
    out: Array,
    bases: Bases,
    shape: Shape,
    strides: Strides,
) -> None:
    """Put the partial softmaxes of a piece together, in the order of its splits, and write the result."""
    first_query, num_queries, first_partial, num_splits = piece[1], piece[2], piece[5], piece[6]
    num_quads = (num_queries * shape.group + ROWS - 1) // ROWS
    num_partials = num_quads * shape.num_kv_heads
    width, size = padded(shape.v_head_dim), partial_size(shape.v_head_dim)
    logits, shares = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    result = np.empty(ROWS * width, np.float32)
    for quad in range(shape.num_kv_heads * num_quads):
        head, first_row = quad // num_quads, quad % num_quads * ROWS
        for lane in range(LANES):
            query_head = head * shape.group + (first_row + lane % ROWS) % shape.group
            logits[lane] = sinks[query_head] if len(sinks) else NOTHING
        top = load(logits, 0)
        for split in range(num_splits):
            top = maximum(load(partials, (first_partial + split * num_partials + quad) * size), top)
        base = finite_or_zero(top)
        total = exp2(sub(load(logits, 0), base))
        result[:] = 0
        for split in range(num_splits):
            at = (first_partial + split * num_partials + quad) * size
            share = exp2(sub(load(partials, at), base))
            total = fma(load(partials, at + LANES), share, total)
            store(shares, 0, share)
            for row in range(ROWS):
                row_share = splat_at(shares, row)
                for d in range(row * width, (row + 1) * width, LANES):
                    store(result, d, fma(row_share, load(partials, at + 2 * LANES + d), load(result, d)))
        store(shares, 0, total)
        for row in range(min(ROWS, num_queries * shape.group - first_row)):
            token, member = (first_row + row) // shape.group, (first_row + row) % shape.group
            to = bases.out + (first_query + token) * strides.out + (head * shape.group + member) * strides.out_head
            factor = np.float32(1) / shares[row] if shares[row] != 0 else np.float32(0)
            for d in range(shape.v_head_dim):
                out[to + d] = narrowed(result[row * width + d] * factor, out)
