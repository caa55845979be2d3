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
from pagedkv.data.cpu_tiles import (
    FEW_QUADS,
    NOTHING,
    QUAD,
    STEP,
    Strides,
    add_few,
    add_many,
    are_turned,
    ask_for_rows,
    in_steps,
    mask,
    pair_up,
    rescale,
    row_width,
    score_few,
    score_many,
    score_turned,
    soft_cap,
    softmax,
    turn_keys,
    widen,
)
from pagedkv.data.simd import (
    exp2,
    fetch_add,
    finite_or_zero,
    fma,
    give_way,
    is_bfloat16,
    load,
    load_part,
    maximum,
    mul,
    put,
    splat,
    splat_at,
    store,
    store_narrowed,
    sub,
    zeros,
)
from pagedkv.data.simd_llvm import CACHE_LINE, LANES, ROWS
from pagedkv.jit import called, compiled, inlined

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Queries, or what they get: float32, or where those are none what the narrow array holds.

    So models that compute in float32 over narrow keys and values attend by the code that narrow queries do.
    """

    wide: Floats
    narrow: Array


class Bases(NamedTuple):
    """Elements of the flat arrays before this call's own: one array may hold the keys and values of all layers."""

    query: int
    key: int
    value: int
    key_scale: int
    value_scale: int
    out: int


class Room(NamedTuple):
    """What a thread works in.

    Rows of queries, as what is multiplied: where they are bfloat16, so are the weights of values, and both stand in
    pairs in the lanes of float32. Scores, keys and values of a tile; two numbers for each lane; for each four of rows
    the partial softmax of a split and that of all splits before; scales, and places of keys and values, of a split.
    """

    packed: Array
    scores: Floats
    key_tile: Floats
    value_tile: Floats
    factors: Floats
    own: Floats
    scales: Floats
    quads: Ints
    key_at: Ints
    value_at: Ints


@called
def _room(heads: int, most_quads: int, with_scales: bool, shape: Shape, like: Array) -> Room:
    """Return the arrays that a thread works in."""
    width, v_width = row_width(shape.head_dim, like), padded(shape.v_head_dim)
    return Room(
        aligned(max(heads * FEW_QUADS, most_quads) * ROWS * width, like),
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
    return aligned(count, np.empty(0, np.float32))


@inlined
def aligned(count: int, like: Array) -> Array:
    """Return room that begins at a cache line: a vector that crosses two of them takes twice as long to load."""
    room = np.empty(count + CACHE_LINE, like.dtype)
    first = -room.ctypes.data % CACHE_LINE // like.itemsize
    return room[first : first + count]


@called
def _wait(counters: Ints, first: int, count: int, num_parts: int) -> None:
    """Wait until other threads are done with items."""
    for i in range(first, first + count):
        while fetch_add(counters, i, 0) < num_parts:
            give_way()


@called
def _attend_head(
    packed: Array,
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
    table, hole, width = block_tables[sequence], holes[sequence], row_width(shape.head_dim, packed)
    scores = room.scores
    _locate(table, hole, start, end, head, bases, shape, strides, room.key_at, room.value_at)
    if key_scales is not None and value_scales is not None:
        _gather_scales(key_scales, bases.key_scale, table, hole, start, end, head, 1, shape, strides, room.scales, 0)
        _gather_scales(
            value_scales, bases.value_scale, table, hole, start, end, head, 1, shape, strides, room.scales, SPLIT
        )
    for tile in range(0, end - start, TILE):
        count = in_steps(end - start - tile, packed)
        position = start + tile
        if are_turned(packed):
            turn_keys(packed, keys, room.key_at, tile, 0, TILE, count, shape.head_dim, room.key_tile)
        else:
            widen(keys, room.key_at, tile, count, shape.head_dim, room.key_tile)
        if is_bfloat16(packed):
            pair_up(values, room.value_at, tile, count, shape.v_head_dim, room.value_tile)
        else:
            widen(values, room.value_at, tile, count, shape.v_head_dim, room.value_tile)
        for quad in range(num_quads):
            if position + count <= quads[quad, QUAD.low] or position >= quads[quad, QUAD.end]:
                continue
            at = quads[quad, place]
            at_row = quad * ROWS * width
            if are_turned(packed):
                score_turned(packed, at_row, room.key_tile, count, shape.head_dim, rules.scale, scores, 0)
            else:
                score_many(packed, at_row, room.key_tile, count, shape.head_dim, scores)
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
            softmax(scores, 0, count, states, at, shape.v_head_dim, packed, room.factors)
            if key_scales is not None:
                rescale(scores, 0, count, room.scales, SPLIT + tile)
            add_many(states, at + 2 * LANES, room.value_tile, scores, count, shape.v_head_dim, packed)


@compiled
def attend_items(
    counters: Ints,
    num_parts: int,
    plan: Plan,
    partials: Floats,
    queries: Rows,
    keys: Array,
    values: Array,
    key_scales: Floats | None,
    value_scales: Floats | None,
    out: Rows,
    like: Array,
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
    ``like`` is any array of what is multiplied: float32; or uint16 where keys and values are bfloat16, and queries and
    weights shall be narrowed to that, on a processor that `has_bfloat16_products`.

    A thread waits for nothing but items that another one has taken already.
    """
    heads = (shape.num_kv_heads + num_parts - 1) // num_parts
    room = _room(heads, plan.most_quads, key_scales is not None, shape, like)
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
    packed: Array,
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
    ask_for_rows(keys, room.key_at, end - start, num_heads, strides.key, strides.key_head, shape.head_dim)
    ask_for_rows(values, room.value_at, end - start, num_heads, strides.value, strides.value_head, shape.v_head_dim)
    if key_scales is not None and value_scales is not None:
        base, to = bases.key_scale, heads * SPLIT
        _gather_scales(key_scales, base, table, hole, start, end, first_head, num_heads, shape, strides, room.scales, 0)
        base = bases.value_scale
        _gather_scales(
            value_scales, base, table, hole, start, end, first_head, num_heads, shape, strides, room.scales, to
        )
    for tile in range(0, end - start, TILE):
        count = in_steps(end - start - tile, packed)
        score_few(
            packed,
            num_heads,
            num_quads,
            keys,
            room.key_at,
            tile,
            count,
            shape,
            strides,
            rules.scale,
            scores,
            room.key_tile,
        )
        for head in range(num_heads):
            for quad in range(num_quads):
                at_score, scale_at = (head * num_quads + quad) * ROWS * TILE, head * SPLIT + tile
                position, first_row = quads[quad, QUAD.position], quads[quad, QUAD.first_row]
                state = quads[quad, QUAD.partial] + head * quads[quad, QUAD.next_head]
                if key_scales is not None:
                    rescale(scores, at_score, count, room.scales, scale_at)
                if rules.cap > 0:
                    soft_cap(scores, at_score, count, rules.cap)
                mask(scores, at_score, start + tile, count, end, position, first_row, shape.group, rules, room.factors)
                softmax(scores, at_score, count, partials, state, shape.v_head_dim, packed, room.factors)
                if key_scales is not None:
                    rescale(scores, at_score, count, room.scales, heads * SPLIT + scale_at)
        add_few(
            partials, quads, num_heads, num_quads, values, room.value_at, tile, count, shape, strides, packed, scores
        )


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
    queries: Rows,
    bases: Bases,
    plan: Plan,
    item: int,
    first_head: int,
    num_heads: int,
    num_quads: int,
    shape: Shape,
    strides: Strides,
    rules: Rules,
    packed: Array,
) -> None:
    """Copy queries to rows of whole vectors: row ``token * group + head of the group`` of each kv head.

    They are scaled, unless keys are turned: then their scores are.
    """
    width, first = row_width(shape.head_dim, packed), 0
    scale = splat(np.float32(1) if are_turned(packed) else rules.scale)
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
                    store_narrowed(packed, to + i, mul(_read(queries, at + i, count), scale))
        first += padded_rows


@inlined
def _read(rows: Rows, at: int, count: int) -> Any:
    """Return up to a vector of numbers and zeros behind."""
    if count == 0:
        return zeros()
    if len(rows.wide):
        return load(rows.wide, at) if count == LANES else load_part(rows.wide, at, count)
    return load(rows.narrow, at) if count == LANES else load_part(rows.narrow, at, count)


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
    out: Rows,
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
                result = mul(load(states, first + d), splat(factor))
                if len(out.wide):
                    store(out.wide, to + d, result)
                else:
                    store_narrowed(out.narrow, to + d, result)
            for d in range(whole, shape.v_head_dim):
                if len(out.wide):
                    put(out.wide, to + d, states[first + d] * factor)
                else:
                    put(out.narrow, to + d, states[first + d] * factor)


@called
def _combine(
    partials: Floats,
    own: Floats,
    quads: Ints,
    piece: Ints,
    sinks: Floats,
    out: Rows,
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
