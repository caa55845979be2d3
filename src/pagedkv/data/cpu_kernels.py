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

from pagedkv.data.cpu_plan import ITEM, PIECE, SPLIT, TILE, Plan, Rules, Shape, padded, partial_size, quads_of
from pagedkv.data.simd import (
    LANES,
    ROWS,
    add,
    add_products_16,
    add_products_64,
    any_greater,
    dots,
    exp2,
    fetch_add,
    finite_or_zero,
    fma,
    give_way,
    load,
    load_fours,
    load_part,
    maximum,
    maximum_by_row,
    mul,
    narrowed,
    prefetch,
    raised,
    seen,
    splat,
    splat_at,
    spread,
    store,
    store_narrowed,
    sub,
    sum_by_row,
    tanh,
    zeros,
)
from pagedkv.jit import called, compiled, inlined

# What the CPU kernels are told: sizes, distances, rules; and how long their rows are.

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NOTHING = np.float32(-np.inf)
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


class Bases(NamedTuple):
    """Elements of the flat arrays before this call's own: one array may hold the keys and values of all layers."""

    query: int
    key: int
    value: int
    key_scale: int
    value_scale: int
    out: int


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


class Room(NamedTuple):
    """What a thread works in.

    Rows of queries; scores, keys and values of a tile; two numbers for each lane; for each four of rows the partial
    softmax of a split and that of all splits before; scales, and places of keys and values, of a split.
    """

    packed: Floats
    scores: Floats
    key_tile: Floats
    value_tile: Floats
    factors: Floats
    own: Floats
    scales: Floats
    quads: Ints
    key_at: Ints
    value_at: Ints


# The inner loops: one tile of tokens, four query rows at a time.
#
# What makes them fast. Query heads that share a kv head are rows of one small matrix, four of them worked on at a
# time, so a key or a value is loaded and widened once for all. Tokens are visited in the order in which they lie in
# memory, a few at a time for all heads, and asked for ahead of that: a head's row is too short for the hardware to
# see a stream. Scores are powers of two (``log2(e)`` is in the scale) and interleaved by row, ``score[token * 4 +
# row]``.

STEP = 4
"""Tokens that are visited for all heads before the next ones."""
FEW_QUADS = 4
"""Up to that many fours of rows of a head read keys and values where they lie; a copy of a tile serves more."""
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
def score_few(
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
    step, ahead = _visit(count, strides.key, strides.key_head, shape.head_dim, num_heads, shape.item_bytes)
    for token in range(0, count, step):
        for head in range(num_heads):
            head_at = head * strides.key_head
            for i in range(token, token + step, STEP):
                to = (head * num_quads * TILE + i) * ROWS
                at = head * num_quads * ROWS * padded(shape.head_dim)
                _score_keys(packed, at, num_quads, keys, key_at, tile + i, head_at, ahead, shape.head_dim, scores, to)


@inlined
def _score_keys(
    packed: Floats,
    at: int,
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
    width = padded(dim)
    for i in range(first + ahead, first + ahead + STEP):
        for d in range(0, width, LANES):
            prefetch(keys, key_at[i] + head_at + d)
    w, x = key_at[first] + head_at, key_at[first + 1] + head_at
    y, z = key_at[first + 2] + head_at, key_at[first + 3] + head_at
    for quad in range(num_quads):
        result = dots(packed, at + quad * ROWS * width, width, keys, w, x, y, z, dim)
        store(scores, to + quad * ROWS * TILE, result)


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
    scores: Floats, at: int, count: int, partials: Floats, partial: int, v_head_dim: int, factors: Floats
) -> None:
    """Turn the scores of four rows into weights; what they had gathered is rescaled only when a maximum moved by far."""
    before = load(partials, partial)
    top = before
    for i in range(at, at + count * ROWS, LANES):
        top = maximum(load(scores, i), top)
    top = raised(maximum_by_row(top), before, splat(MARGIN))
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
    scores: Floats,
) -> None:
    """Add a tile's weighted values to the rows of all heads."""
    dim = shape.v_head_dim
    step, ahead = _visit(count, strides.value, strides.value_head, dim, num_heads, shape.item_bytes)
    for token in range(0, count, step):
        for head in range(num_heads):
            head_at = head * strides.value_head
            for quad in range(num_quads):
                to = quads[quad, QUAD.partial] + head * quads[quad, QUAD.next_head] + 2 * LANES
                weights = ((head * num_quads + quad) * TILE + token) * ROWS
                _add_values(partials, to, values, value_at, tile + token, step, head_at, ahead, dim, scores, weights)


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


# Many rows of a head: a tile's keys and values are widened once for all of them.


@inlined
def _widen(array: Array, places: Ints, first: int, count: int, dim: int, tile: Floats) -> None:
    """Copy rows, as float32 and with zeros to whole lanes; those of the next tile are asked for."""
    width = padded(dim)
    for i in range(count):
        at, ahead, to = places[first + i], places[first + TILE + i], i * width
        for d in range(0, width, LANES):
            prefetch(array, ahead + d)
            some = load(array, at + d) if d + LANES <= dim else load_part(array, at + d, dim - d)
            store(tile, to + d, some)


@inlined
def _score_many(packed: Floats, at: int, tile: Floats, count: int, dim: int, scores: Floats) -> None:
    """Score four rows against the keys of a tile."""
    width = padded(dim)
    for i in range(0, count, STEP):
        key = i * width
        store(
            scores, i * ROWS, dots(packed, at, width, tile, key, key + width, key + 2 * width, key + 3 * width, width)
        )


@inlined
def _add_many(partials: Floats, at: int, tile: Floats, scores: Floats, count: int, dim: int) -> None:
    """Add the weighted values of a tile to four rows."""
    width = padded(dim)
    d = 0
    while d + 4 * LANES <= width:
        add_products_64(partials, at + d, width, tile, d, scores, 0, count)
        d += 4 * LANES
    while d < width:
        add_products_16(partials, at + d, width, tile, d, scores, 0, count)
        d += LANES


@called
def _room(heads: int, most_quads: int, with_scales: bool, shape: Shape) -> Room:
    """Return the arrays that a thread works in."""
    width, v_width = padded(shape.head_dim), padded(shape.v_head_dim)
    return Room(
        _floats(max(heads * FEW_QUADS, most_quads) * ROWS * width),
        _floats(heads * FEW_QUADS * ROWS * TILE),
        _floats(TILE * width),
        _floats(TILE * v_width),
        _floats(2 * LANES),
        _floats(2 * max(1, most_quads) * partial_size(shape.v_head_dim)),
        _floats(2 * heads * SPLIT if with_scales else 0),
        np.empty((most_quads, len(QUAD)), np.int64),
        np.empty(SPLIT + 2 * TILE, np.int64),
        np.empty(SPLIT + 2 * TILE, np.int64),
    )


@called
def _floats(count: int) -> Floats:
    """Return floats that begin at a cache line: a vector that crosses two of them takes twice as long to load."""
    room = np.empty(count + LANES, np.float32)
    first = -room.ctypes.data // room.itemsize % LANES
    return room[first : first + count]


@called
def _wait(counters: Ints, first: int, count: int, num_parts: int) -> None:
    """Wait until other threads are done with items."""
    for i in range(first, first + count):
        while fetch_add(counters, i, 0) < num_parts:
            give_way()


@called
def _attend_head(
    packed: Floats,
    num_quads: int,
    quads: Ints,
    states: Floats,
    place: int,
    keys: Array,
    values: Array,
    key_scales: Floats | None,
    value_scales: Floats | None,
    sequence: int,
    start: int,
    end: int,
    head: int,
    block_tables: Array,
    holes: Array,
    room: Room,
    bases: Bases,
    shape: Shape,
    strides: Strides,
    rules: Rules,
) -> None:
    """Let the rows of one head attend to positions of one split; their states are in the column ``place``."""
    table, hole, width = block_tables[sequence], holes[sequence], padded(shape.head_dim)
    scores = room.scores
    _locate(table, hole, start, end, head, bases, shape, strides, room.key_at, room.value_at)
    if key_scales is not None and value_scales is not None:
        _gather_scales(key_scales, bases.key_scale, table, hole, start, end, head, 1, shape, strides, room.scales, 0)
        _gather_scales(
            value_scales, bases.value_scale, table, hole, start, end, head, 1, shape, strides, room.scales, SPLIT
        )
    for tile in range(0, end - start, TILE):
        count = (min(TILE, end - start - tile) + STEP - 1) // STEP * STEP
        position = start + tile
        _widen(keys, room.key_at, tile, count, shape.head_dim, room.key_tile)
        _widen(values, room.value_at, tile, count, shape.v_head_dim, room.value_tile)
        for quad in range(num_quads):
            if position + count <= quads[quad, QUAD.low] or position >= quads[quad, QUAD.end]:
                continue
            at = quads[quad, place]
            _score_many(packed, quad * ROWS * width, room.key_tile, count, shape.head_dim, scores)
            if key_scales is not None:
                rescale(scores, 0, count, room.scales, tile)
            if rules.cap > 0:
                soft_cap(scores, 0, count, rules.cap)
            if position < quads[quad, QUAD.all_low] or position + count > min(end, quads[quad, QUAD.all_end]):
                first_row = quads[quad, QUAD.first_row]
                mask(
                    scores,
                    0,
                    position,
                    count,
                    end,
                    quads[quad, QUAD.position],
                    first_row,
                    shape.group,
                    rules,
                    room.factors,
                )
            softmax(scores, 0, count, states, at, shape.v_head_dim, room.factors)
            if key_scales is not None:
                rescale(scores, 0, count, room.scales, SPLIT + tile)
            _add_many(states, at + 2 * LANES, room.value_tile, scores, count, shape.v_head_dim)


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

    A thread waits for nothing but items that another one has taken already.
    """
    heads = (shape.num_kv_heads + num_parts - 1) // num_parts
    room = _room(heads, plan.most_quads, key_scales is not None, shape)
    packed, own, quads = room.packed, room.own, room.quads
    items, pieces, done = plan.items, plan.pieces, 1 + len(plan.pieces)
    while True:
        work = fetch_add(counters, 0, 1)
        if work >= len(items) * num_parts:
            return
        item, part = work // num_parts, work % num_parts
        start, end, is_whole = items[item, ITEM.start], items[item, ITEM.end], items[item, ITEM.is_whole]
        first_head = min(part * heads, shape.num_kv_heads)
        num_heads = min(heads, shape.num_kv_heads - first_head)
        piece = plan.members[items[item, ITEM.first_member]]
        sequence = pieces[piece, PIECE.sequence]
        num_quads = _list_quads(plan, item, first_head, shape, rules, quads)
        if items[item, ITEM.num_before]:
            _wait(counters, done + items[item, ITEM.first_before], items[item, ITEM.num_before], num_parts)
        elif not is_whole:
            _clear(partials, quads, num_quads, QUAD.partial, num_heads, shape)
        if num_quads <= FEW_QUADS and not is_whole:
            _pack(queries, bases, plan, item, first_head, num_heads, num_quads, shape, strides, rules, packed)
            _attend_few(
                packed,
                num_quads,
                num_heads,
                quads,
                partials,
                keys,
                values,
                key_scales,
                value_scales,
                sequence,
                start,
                end,
                first_head,
                block_tables,
                holes,
                room,
                bases,
                shape,
                strides,
                rules,
            )
        else:
            states, place = (own, QUAD.own) if is_whole else (partials, QUAD.partial)
            for head in range(first_head, first_head + num_heads):
                _pack(queries, bases, plan, item, head, 1, num_quads, shape, strides, rules, packed)
                if is_whole:
                    _begin(own, quads, num_quads, head, sinks, shape, room.factors)
                split = start
                while split < end:
                    stop = min(end, (split // SPLIT + 1) * SPLIT)
                    if is_whole:
                        _clear(own, quads, num_quads, QUAD.own, 1, shape)
                    _attend_head(
                        packed,
                        num_quads,
                        quads,
                        states,
                        place,
                        keys,
                        values,
                        key_scales,
                        value_scales,
                        sequence,
                        split,
                        stop,
                        head,
                        block_tables,
                        holes,
                        room,
                        bases,
                        shape,
                        strides,
                        rules,
                    )
                    for quad in range(num_quads):
                        if is_whole:
                            _merge(own, quads[quad, QUAD.merged], own, quads[quad, QUAD.own], shape, room.factors)
                        else:
                            quads[quad, QUAD.partial] += quads[quad, QUAD.next_head]
                    split = stop
                if is_whole:
                    _write(own, quads, num_quads, pieces[piece], head, out, bases, shape, strides)
            if is_whole:
                continue
        fetch_add(counters, done + item, 1)
        first_member = items[item, ITEM.first_member]
        for member in range(first_member, first_member + items[item, ITEM.num_members]):
            piece = plan.members[member]
            if fetch_add(counters, 1 + piece, 1) == pieces[piece, PIECE.num_items] * num_parts - 1:
                _combine(partials, own, quads, pieces[piece], sinks, out, bases, shape, strides, room.factors)


@called
def _attend_few(
    packed: Floats,
    num_quads: int,
    num_heads: int,
    quads: Ints,
    partials: Floats,
    keys: Array,
    values: Array,
    key_scales: Floats | None,
    value_scales: Floats | None,
    sequence: int,
    start: int,
    end: int,
    first_head: int,
    block_tables: Array,
    holes: Array,
    room: Room,
    bases: Bases,
    shape: Shape,
    strides: Strides,
    rules: Rules,
) -> None:
    """Let a few rows of several heads attend to positions of one split."""
    table, hole, scores = block_tables[sequence], holes[sequence], room.scores
    heads = len(scores) // (FEW_QUADS * ROWS * TILE)
    _locate(table, hole, start, end, first_head, bases, shape, strides, room.key_at, room.value_at)
    if key_scales is not None and value_scales is not None:
        base, to = bases.key_scale, heads * SPLIT
        _gather_scales(key_scales, base, table, hole, start, end, first_head, num_heads, shape, strides, room.scales, 0)
        base = bases.value_scale
        _gather_scales(
            value_scales, base, table, hole, start, end, first_head, num_heads, shape, strides, room.scales, to
        )
    for tile in range(0, end - start, TILE):
        count = (min(TILE, end - start - tile) + STEP - 1) // STEP * STEP
        score_few(packed, num_heads, num_quads, keys, room.key_at, tile, count, shape, strides, scores)
        for head in range(num_heads):
            for quad in range(num_quads):
                at_score, scale_at = (head * num_quads + quad) * ROWS * TILE, head * SPLIT + tile
                position, first_row = quads[quad, QUAD.position], quads[quad, QUAD.first_row]
                state = quads[quad, QUAD.partial] + head * quads[quad, QUAD.next_head]
                if key_scales is not None:
                    rescale(scores, at_score, count, room.scales, scale_at)
                if rules.cap > 0:
                    soft_cap(scores, at_score, count, rules.cap)
                mask(
                    scores, at_score, start + tile, count, end, position, first_row, shape.group, rules, room.factors
                )
                softmax(scores, at_score, count, partials, state, shape.v_head_dim, room.factors)
                if key_scales is not None:
                    rescale(scores, at_score, count, room.scales, heads * SPLIT + scale_at)
        add_few(partials, quads, num_heads, num_quads, values, room.value_at, tile, count, shape, strides, scores)


@called
def _list_quads(plan: Plan, item: int, first_head: int, shape: Shape, rules: Rules, quads: Ints) -> int:
    """List the fours of rows that an item has of a head, and return how many there are."""
    num_quads, size = 0, partial_size(shape.v_head_dim)
    first_member = plan.items[item, ITEM.first_member]
    for member in range(first_member, first_member + plan.items[item, ITEM.num_members]):
        piece = plan.pieces[plan.members[member]]
        num_queries, position, end = piece[PIECE.num_queries], piece[PIECE.position], piece[PIECE.end]
        count = quads_of(num_queries, shape)
        split = plan.items[item, ITEM.start] // SPLIT - piece[PIECE.low] // SPLIT
        partial = piece[PIECE.first_partial] + (split * shape.num_kv_heads + first_head) * count
        for quad in range(count):
            to, row = num_quads + quad, quad * ROWS
            first = position + row // shape.group
            last = position + min(num_queries - 1, (row + ROWS - 1) // shape.group)
            quads[to, QUAD.partial] = (partial + quad) * size
            quads[to, QUAD.next_head] = count * size
            quads[to, QUAD.own], quads[to, QUAD.merged] = 2 * to * size, (2 * to + 1) * size
            quads[to, QUAD.position], quads[to, QUAD.first_row] = position, row
            quads[to, QUAD.low], quads[to, QUAD.all_low] = first - rules.window + 1, last - rules.window + 1
            quads[to, QUAD.end] = last + 1 if rules.causal else end
            quads[to, QUAD.all_end] = first + 1 if rules.causal else end
        num_quads += count
    return num_quads


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
    key_base = bases.key + first_head * strides.key_head
    value_base = bases.value + first_head * strides.value_head
    offset, key_block, value_block = shape.block_size, key_base, value_base
    for i in range(end - start):
        if offset == shape.block_size or start + i == hole[0]:
            slot = start + i
            if slot >= hole[0]:
                slot += hole[1] - hole[0]
            block, offset = int(table[slot // shape.block_size]), slot % shape.block_size
            key_block, value_block = key_base + block * strides.key_block, value_base + block * strides.value_block
        key_at[i] = key_block + offset * strides.key
        value_at[i] = value_block + offset * strides.value
        offset += 1
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
    plan: Plan,
    item: int,
    first_head: int,
    num_heads: int,
    num_quads: int,
    shape: Shape,
    strides: Strides,
    rules: Rules,
    packed: Floats,
) -> None:
    """Copy queries, scaled, to rows of whole lanes: row ``token * group + head of the group`` of each kv head."""
    width, scale, first = padded(shape.head_dim), splat(rules.scale), 0
    first_member = plan.items[item, ITEM.first_member]
    for member in range(first_member, first_member + plan.items[item, ITEM.num_members]):
        piece = plan.pieces[plan.members[member]]
        rows, padded_rows = piece[PIECE.num_queries] * shape.group, quads_of(piece[PIECE.num_queries], shape) * ROWS
        for head in range(num_heads):
            for row in range(padded_rows):
                to = (head * num_quads * ROWS + first + row) * width
                query_head = (first_head + head) * shape.group + row % shape.group
                query = piece[PIECE.first_query] + row // shape.group
                at = bases.query + query * strides.query + query_head * strides.query_head
                for i in range(0, width, LANES):
                    count = min(LANES, shape.head_dim - i) if row < rows else 0
                    value = load(queries, at + i) if count == LANES else zeros()
                    if 0 < count < LANES:
                        value = load_part(queries, at + i, count)
                    store(packed, to + i, mul(value, scale))
        first += padded_rows


# Partial softmaxes of four rows: the maximum and the sum of each row in its lanes, then the weighted values.


@called
def _clear(states: Floats, quads: Ints, num_quads: int, place: int, num_heads: int, shape: Shape) -> None:
    """Make states of nothing, in the column ``place`` of each four of rows, for some heads."""
    size = partial_size(shape.v_head_dim)
    for quad in range(num_quads):
        for head in range(num_heads):
            at = quads[quad, place] + head * quads[quad, QUAD.next_head]
            store(states, at, splat(NOTHING))
            for i in range(at + LANES, at + size, LANES):
                store(states, i, zeros())


@called
def _begin(states: Floats, quads: Ints, num_quads: int, head: int, sinks: Floats, shape: Shape, few: Floats) -> None:
    """Make states that have seen nothing but the sinks, to merge others into."""
    _clear(states, quads, num_quads, QUAD.merged, 1, shape)
    for quad in range(num_quads):
        at = quads[quad, QUAD.merged]
        if len(sinks):
            for lane in range(LANES):
                few[lane] = sinks[head * shape.group + (quads[quad, QUAD.first_row] + lane % ROWS) % shape.group]
            top = load(few, 0)
            store(states, at, top)
            store(states, at + LANES, exp2(sub(top, finite_or_zero(top))))


@called
def _merge(states: Floats, to: int, others: Floats, at: int, shape: Shape, few: Floats) -> None:
    """Add what one state has seen to another."""
    width = padded(shape.v_head_dim)
    top = maximum(load(others, at), load(states, to))
    base = finite_or_zero(top)
    kept, added = exp2(sub(load(states, to), base)), exp2(sub(load(others, at), base))
    store(states, to, top)
    store(states, to + LANES, fma(load(others, at + LANES), added, mul(load(states, to + LANES), kept)))
    store(few, 0, kept)
    store(few, LANES, added)
    for row in range(ROWS):
        row_kept, row_added = splat_at(few, row), splat_at(few, LANES + row)
        for i in range(2 * LANES + row * width, 2 * LANES + (row + 1) * width, LANES):
            store(states, to + i, fma(load(others, at + i), row_added, mul(load(states, to + i), row_kept)))


@called
def _write(
    states: Floats,
    quads: Ints,
    num_quads: int,
    piece: Ints,
    head: int,
    out: Array,
    bases: Bases,
    shape: Shape,
    strides: Strides,
) -> None:
    """Write the results of some rows of a piece."""
    width, rows = padded(shape.v_head_dim), piece[PIECE.num_queries] * shape.group
    for quad in range(num_quads):
        for row in range(min(ROWS, rows - quads[quad, QUAD.first_row])):
            place, at = quads[quad, QUAD.first_row] + row, quads[quad, QUAD.merged]
            query, query_head = (
                piece[PIECE.first_query] + place // shape.group,
                head * shape.group + place % shape.group,
            )
            to = bases.out + query * strides.out + query_head * strides.out_head
            total, first = states[at + LANES + row], at + 2 * LANES + row * width
            factor = np.float32(1) / total if total != 0 else np.float32(0)
            whole = shape.v_head_dim // LANES * LANES
            for d in range(0, whole, LANES):
                store_narrowed(out, to + d, mul(load(states, first + d), splat(factor)))
            for d in range(whole, shape.v_head_dim):
                out[to + d] = narrowed(states[first + d] * factor, out)


@called
def _combine(
    partials: Floats,
    own: Floats,
    quads: Ints,
    piece: Ints,
    sinks: Floats,
    out: Array,
    bases: Bases,
    shape: Shape,
    strides: Strides,
    few: Floats,
) -> None:
    """Merge the partial softmaxes of a piece, in the order of its splits, and write the result."""
    size, num_quads = partial_size(shape.v_head_dim), quads_of(piece[PIECE.num_queries], shape)
    num_splits = (piece[PIECE.end] - 1) // SPLIT - piece[PIECE.low] // SPLIT + 1
    for quad in range(num_quads):
        quads[quad, QUAD.first_row], quads[quad, QUAD.merged] = quad * ROWS, quad * size
    for head in range(shape.num_kv_heads):
        _begin(own, quads, num_quads, head, sinks, shape, few)
        for quad in range(num_quads):
            for split in range(num_splits):
                partial = piece[PIECE.first_partial] + (split * shape.num_kv_heads + head) * num_quads + quad
                _merge(own, quad * size, partials, partial * size, shape, few)
        _write(own, quads, num_quads, piece, head, out, bases, shape, strides)
