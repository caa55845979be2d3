"""Attention of few queries over many keys, read from their blocks in place: decode, and short chunks.

The work of a sequence is cut into items of :data:`SPLIT` positions. An item leaves a partial softmax (the running
maximum, the sum, the weighted values); the thread that finishes a sequence's last item puts them together, always in
the order of the positions: flash-decoding (Dao et al., 2023) over the online softmax of Milakov and Gimelshein (2018).
Items and tiles are cut at fixed positions and each is computed by one thread in one order, so what a query gets depends
neither on the queries beside it, nor on the rest of the batch, nor on the number of threads, to the last bit.
"""

from __future__ import annotations

import numpy as np

from pagedkv.data.cpu_shapes import NOTHING, Array, Floats, Ints, Rules, Shape, Strides, padded, partial_size
from pagedkv.data.cpu_tile import STEP, TILE, add_tile, mask, rescale, score_tile, soft_cap, softmax
from pagedkv.data.simd import (
    LANES,
    ROWS,
    exp2,
    fetch_add,
    finite_or_zero,
    fma,
    load,
    load_part,
    maximum,
    mul,
    narrowed,
    splat,
    store,
    sub,
    zeros,
)
from pagedkv.jit import compiled

SPLIT = 512
"""Positions of a work item: 2 MB of bfloat16 keys and values at 8 heads of 128."""


@compiled
def _first_position(seq_len: int, num_queries: int, window: int) -> int:
    """Return where to begin: at a tile's edge, so that the tiles of a query do not depend on the queries beside it."""
    return max(0, seq_len - num_queries - window + 1) // TILE * TILE


@compiled
def plan_items(
    seq_lens: Array, cu_seqlens_q: Array, most_queries: int, window: int, shape: Shape
) -> tuple[Ints, Ints, int, int, int]:
    """Cut the sequences of at most ``most_queries`` query tokens into items.

    Returns
    -------
    items : int64 [num_items, 4]
        Sequence, first and last (exclusive) position, first of its partials.
    first_item : int64 [n + 1]
    num_positions, num_partials, most_quads : int
        Over all items; over all items; of one head in one item.
    """
    n = len(seq_lens)
    first_item = np.zeros(n + 1, np.int64)
    for i in range(n):
        seq_len, num_queries = int(seq_lens[i]), int(cu_seqlens_q[i + 1] - cu_seqlens_q[i])
        count = 0
        if 0 < num_queries <= most_queries:
            low = _first_position(seq_len, num_queries, window)
            count = (seq_len - 1) // SPLIT - low // SPLIT + 1
        first_item[i + 1] = first_item[i] + count
    items = np.empty((first_item[n], 4), np.int64)
    num_positions, num_partials, most_quads = 0, 0, 0
    for i in range(n):
        seq_len, num_queries = int(seq_lens[i]), int(cu_seqlens_q[i + 1] - cu_seqlens_q[i])
        low = _first_position(seq_len, num_queries, window)
        quads = (num_queries * shape.group + ROWS - 1) // ROWS
        for item in range(first_item[i], first_item[i + 1]):
            split = low // SPLIT + item - first_item[i]
            items[item, 0] = i
            items[item, 1] = max(low, split * SPLIT)
            items[item, 2] = min(seq_len, (split + 1) * SPLIT)
            items[item, 3] = num_partials
            num_positions += items[item, 2] - items[item, 1]
            num_partials += quads * shape.num_kv_heads
            most_quads = max(most_quads, quads)
    return items, first_item, num_positions, num_partials, most_quads


@compiled
def attend_items(
    counters: Ints,
    num_parts: int,
    items: Ints,
    first_item: Ints,
    most_quads: int,
    partials: Floats,
    queries: Array,
    keys: Array,
    values: Array,
    key_scales: Floats,
    value_scales: Floats,
    out: Array,
    sinks: Floats,
    block_tables: Array,
    seq_lens: Array,
    cu_seqlens_q: Array,
    holes: Array,
    shape: Shape,
    strides: Strides,
    rules: Rules,
) -> None:
    """Work on items, each for ``1 / num_parts`` of the kv heads, until none is left. Runs in every thread.

    ``counters[0]`` counts the parts of items that were taken; ``counters[1 + i]`` those of sequence i that are done.
    Without scales keys and values are what they are. With them a key's scale multiplies its scores, and a value's scale
    its weight, once for all elements.
    """
    heads = (shape.num_kv_heads + num_parts - 1) // num_parts
    size = partial_size(shape.v_head_dim)
    packed = np.empty(heads * most_quads * ROWS * padded(shape.head_dim), np.float32)
    scores = np.empty(heads * most_quads * ROWS * TILE, np.float32)
    key_at = np.empty(SPLIT + 2 * TILE, np.int64)
    value_at = np.empty(SPLIT + 2 * TILE, np.int64)
    is_quantised = len(key_scales) > 0
    scales = np.empty(2 * heads * SPLIT if is_quantised else 0, np.float32)
    while True:
        work = fetch_add(counters, 0, 1)
        if work >= len(items) * num_parts:
            return
        item, part = work // num_parts, work % num_parts
        sequence, start, end, partial = items[item, 0], items[item, 1], items[item, 2], items[item, 3]
        first_head = min(part * heads, shape.num_kv_heads)
        num_heads = min(heads, shape.num_kv_heads - first_head)
        first_query = int(cu_seqlens_q[sequence])
        num_queries = int(cu_seqlens_q[sequence + 1]) - first_query
        num_quads = (num_queries * shape.group + ROWS - 1) // ROWS
        at = (partial + first_head * num_quads) * size
        _locate(block_tables[sequence], holes[sequence], start, end, first_head, shape, strides, key_at, value_at)
        if is_quantised:
            table, hole, half = block_tables[sequence], holes[sequence], heads * SPLIT
            _gather_scales(key_scales, table, hole, start, end, first_head, num_heads, shape, strides, scales, 0)
            _gather_scales(value_scales, table, hole, start, end, first_head, num_heads, shape, strides, scales, half)
        _pack(queries, first_query, num_queries, first_head, num_heads, shape, strides, rules, packed)
        _clear(partials, at, num_heads * num_quads, size)
        query_position = int(seq_lens[sequence]) - num_queries
        for tile in range(0, end - start, TILE):
            count = (min(TILE, end - start - tile) + STEP - 1) // STEP * STEP
            score_tile(packed, num_heads, num_quads, keys, key_at, tile, count, shape, strides, scores)
            for quad in range(num_heads * num_quads):
                at_score = quad * ROWS * TILE
                scale_at = quad // num_quads * SPLIT + tile
                if is_quantised:
                    rescale(scores, at_score, count, scales, scale_at)
                if rules.cap > 0:
                    soft_cap(scores, at_score, count, rules.cap)
                first_row = quad % num_quads * ROWS
                mask(scores, at_score, start + tile, count, end, query_position, first_row, shape.group, rules)
                softmax(scores, at_score, count, partials, at + quad * partial_size(shape.v_head_dim), shape.v_head_dim)
                if is_quantised:
                    rescale(scores, at_score, count, scales, heads * SPLIT + scale_at)
            add_tile(partials, at, num_heads, num_quads, values, value_at, tile, count, shape, strides, scores)
        num_works = (first_item[sequence + 1] - first_item[sequence]) * num_parts
        if fetch_add(counters, 1 + sequence, 1) == num_works - 1:
            some = items[first_item[sequence] : first_item[sequence + 1], 3]
            _combine(partials, some, first_query, num_queries, num_quads, sinks, out, shape, strides)


@compiled
def _locate(
    table: Array,
    hole: Array,
    start: int,
    end: int,
    first_head: int,
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
        key_at[i] = block * strides.key_block + offset * strides.key + first_head * strides.key_head
        value_at[i] = block * strides.value_block + offset * strides.value + first_head * strides.value_head
    for i in range(end - start, end - start + 2 * TILE):
        key_at[i] = key_at[end - start - 1]
        value_at[i] = value_at[end - start - 1]


@compiled
def _gather_scales(
    pool: Floats,
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
        at = block * strides.scale_block + offset * strides.scale + first_head * strides.scale_head
        for head in range(num_heads):
            scales[to + head * SPLIT + i] = pool[at + head * strides.scale_head]
    for head in range(num_heads):
        for i in range(end - start, (end - start + STEP - 1) // STEP * STEP):
            scales[to + head * SPLIT + i] = 0


@compiled
def _pack(
    queries: Array,
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
            at = (first_query + row // shape.group) * strides.query + query_head * strides.query_head
            for i in range(0, width, LANES):
                count = min(LANES, shape.head_dim - i) if row < rows else 0
                value = load(queries, at + i) if count == LANES else zeros()
                if 0 < count < LANES:
                    value = load_part(queries, at + i, count)
                store(packed, to + i, mul(value, scale))


@compiled
def _clear(partials: Floats, at: int, count: int, size: int) -> None:
    for i in range(count):
        store(partials, at + i * size, splat(NOTHING))
        for j in range(LANES, size, LANES):
            store(partials, at + i * size + j, zeros())


@compiled
def _combine(
    partials: Floats,
    firsts: Ints,
    first_query: int,
    num_queries: int,
    num_quads: int,
    sinks: Floats,
    out: Array,
    shape: Shape,
    strides: Strides,
) -> None:
    """Put the partial softmaxes of a sequence together, in the order of its items, and write the result."""
    width, size = padded(shape.v_head_dim), partial_size(shape.v_head_dim)
    logits, shares = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    result = np.empty(ROWS * width, np.float32)
    for quad in range(shape.num_kv_heads * num_quads):
        head, first_row = quad // num_quads, quad % num_quads * ROWS
        for lane in range(LANES):
            query_head = head * shape.group + (first_row + lane % ROWS) % shape.group
            logits[lane] = sinks[query_head] if len(sinks) else NOTHING
        top = load(logits, 0)
        for first in firsts:
            top = maximum(load(partials, (first + quad) * size), top)
        base = finite_or_zero(top)
        total = exp2(sub(load(logits, 0), base))
        result[:] = 0
        for first in firsts:
            at = (first + quad) * size
            share = exp2(sub(load(partials, at), base))
            total = fma(load(partials, at + LANES), share, total)
            store(shares, 0, share)
            for row in range(ROWS):
                row_share = splat(shares[row])
                for d in range(row * width, (row + 1) * width, LANES):
                    store(result, d, fma(row_share, load(partials, at + 2 * LANES + d), load(result, d)))
        store(shares, 0, total)
        for row in range(min(ROWS, num_queries * shape.group - first_row)):
            token, member = (first_row + row) // shape.group, (first_row + row) % shape.group
            to = (first_query + token) * strides.out + (head * shape.group + member) * strides.out_head
            factor = np.float32(1) / shares[row] if shares[row] != 0 else np.float32(0)
            for d in range(shape.v_head_dim):
                out[to + d] = narrowed(result[row * width + d] * factor, out)
