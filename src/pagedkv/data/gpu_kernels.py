"""The Triton kernels of paged attention: tiles of query rows over tiles of keys, and the sum of the splits.

A row of a tile is one query head of one query token; all heads of a group share a tile, so that a key is read once for
all of them. A sequence's keys are split among programs as in "Flash-Decoding" (Dao et al., 2023). A hole is stepped
over: the tiles before it come first, then those behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.data.gpu_tile import LOG2_E, NOTHING, blocks_of_tile, one_tile, with_sink


@triton.jit
def _sequence_of_tile(cu_seqlens_q, num_sequences, tile, TILE_Q: tl.constexpr):
    """Return the last sequence whose tiles begin at or before this one.

    Sequence i gets the tiles from ``cu_seqlens_q[i] // TILE_Q + i`` on: enough for it, and known without the host.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // TILE_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _num_tiles(low, high, TILE_N: tl.constexpr):
    """Return how many tiles hold the slots in [low, high)."""
    return tl.where(low < high, tl.cdiv(high, TILE_N) - low // TILE_N, 0)


@triton.jit(do_not_specialize=["num_sequences", "fewest", "most", "least_tiles", "window", "table_row"])
def attend_tiles(
    out,
    partial,
    partial_sums,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    sinks,
    block_tables,
    seq_lens,
    cu_seqlens_q,
    holes,
    num_sequences,
    fewest,
    most,
    least_tiles,
    scale,
    softcap,
    window,
    table_row,
    query_token,
    query_head,
    out_token,
    out_head,
    KEY_BLOCK: tl.constexpr,
    KEY_TOKEN: tl.constexpr,
    KEY_HEAD: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_TOKEN: tl.constexpr,
    VALUE_HEAD: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    SCALE_TOKEN: tl.constexpr,
    SCALE_HEAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_DV: tl.constexpr,
    SPLIT: tl.constexpr,
    SEARCH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend for one tile of query rows of one kv head, over one split of the sequence's keys.

    Serves the sequences that have ``fewest`` to ``most`` query tokens and leaves the others alone. Grid: (tiles * kv
    heads, splits); with SEARCH the tiles are counted over all sequences, without it every sequence has one. The heads
    of a tile follow each other, as their keys do in memory. A split has ``least_tiles`` of keys at least.

    Strides of the pool are compiled in: without them, finding the keys takes more instructions than the products do.
    """
    TILE_Q: tl.constexpr = TILE_M // GROUP
    tile = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    if SEARCH:
        tile = tl.num_programs(0) // KV_HEADS - 1 - tile  # the tiles with the most keys begin first
        sequence = _sequence_of_tile(cu_seqlens_q, num_sequences, tile, TILE_Q)
    else:
        sequence = tile
    query_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - query_start
    first = (tile - query_start // TILE_Q - sequence) * TILE_Q if SEARCH else 0
    if (first >= q_len) | (q_len < fewest) | (q_len > most):
        return
    seq_len = tl.load(seq_lens + sequence)
    hole_start = tl.load(holes + 2 * sequence)
    hole_length = tl.load(holes + 2 * sequence + 1) - hole_start
    hole_start = tl.where(hole_length > 0, hole_start, seq_len)

    scale = tl.full([], scale, tl.float32)  # the interpreter would take tiny ones for float64
    softcap = tl.full([], softcap, tl.float32)

    rows = tl.arange(0, TILE_M)
    token = first + rows // GROUP
    is_row = (rows < TILE_Q * GROUP) & (token < q_len)
    head = kv_head * GROUP + rows % GROUP
    position = seq_len - q_len + token
    d = tl.arange(0, TILE_D)
    at_query = (query_start + token).to(tl.int64) * query_token + head.to(tl.int64) * query_head
    query = tl.load(
        queries + at_query[:, None] + d[None, :], mask=is_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0
    ).to(COMPUTE)

    # Keys that any row sees, [low, high), and keys that every row sees.
    first_position = seq_len - q_len + first
    last_position = seq_len - q_len + tl.minimum(first + TILE_Q, q_len) - 1
    high = last_position + 1 if CAUSAL else seq_len
    whole_high = first_position + 1 if CAUSAL else seq_len
    low = tl.maximum(first_position - window + 1, 0) if WINDOW else 0
    whole_low = tl.maximum(last_position - window + 1, 0) if WINDOW else 0

    # Tiles are counted by slot: those of the keys before the hole, then those of the keys behind it.
    before = _num_tiles(low, tl.minimum(high, hole_start), TILE_N)
    behind = _num_tiles(tl.maximum(low, hole_start) + hole_length, high + hole_length, TILE_N)
    start = 0
    stop = before + behind
    if SPLIT:
        share = tl.maximum(tl.cdiv(stop, tl.num_programs(1)), least_tiles)
        start = tl.minimum(tl.program_id(1) * share, stop)
        stop = tl.minimum(start + share, stop)

    table = block_tables + sequence.to(tl.int64) * table_row
    keys += kv_head.to(tl.int64) * KEY_HEAD
    values += kv_head.to(tl.int64) * VALUE_HEAD
    if SCALED:
        key_scales += kv_head.to(tl.int64) * SCALE_HEAD
        value_scales += kv_head.to(tl.int64) * SCALE_HEAD
    acc = tl.zeros([TILE_M, TILE_DV], tl.float32)
    top = tl.full([TILE_M], NOTHING, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    # fmt: off
    for side in range(0, 1 + (behind > 0).to(tl.int32)):
        shift = hole_length if side else 0
        low_slot = tl.maximum(low, hole_start) + hole_length if side else low
        high_slot = high + hole_length if side else tl.minimum(high, hole_start)
        origin = low_slot // TILE_N - (before if side else 0)
        begin = origin + (tl.maximum(start, before) if side else tl.minimum(start, before))
        end = origin + (tl.maximum(stop, before) if side else tl.minimum(stop, before))
        whole_begin = tl.cdiv(tl.maximum(low_slot, whole_low + shift), TILE_N)
        whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
        whole_end = tl.minimum(high_slot, whole_high + shift) // TILE_N
        whole_end = tl.maximum(tl.minimum(whole_end, end), whole_begin)

        # Blocks are looked up one tile ahead of the keys: else every copy of keys would wait for its table first.
        whole_high_slot = whole_end * TILE_N
        ahead = blocks_of_tile(whole_begin, table, 0, whole_high_slot, BLOCK_SIZE, TILE_N)
        for i in range(whole_begin, whole_end):
            block = ahead
            ahead = blocks_of_tile(i + 1, table, 0, whole_high_slot, BLOCK_SIZE, TILE_N)
            acc, top, total = one_tile(
                acc, top, total, i, block, query, position, keys, values, key_scales, value_scales,
                low_slot, high_slot, shift, scale, softcap, window,
                KEY_BLOCK, KEY_TOKEN, VALUE_BLOCK, VALUE_TOKEN, SCALE_BLOCK, SCALE_TOKEN,
                BLOCK_SIZE, HEAD_DIM, V_HEAD_DIM, TILE_N, TILE_D, TILE_DV,
                False, CAUSAL, WINDOW, SOFTCAP, SCALED, PRECISION,
            )
        num_before = whole_begin - begin
        for j in tl.range(0, num_before + end - whole_end, num_stages=1):
            i = tl.where(j < num_before, begin + j, whole_end + j - num_before)
            block = blocks_of_tile(i, table, low_slot, high_slot, BLOCK_SIZE, TILE_N)
            acc, top, total = one_tile(
                acc, top, total, i, block, query, position, keys, values, key_scales, value_scales,
                low_slot, high_slot, shift, scale, softcap, window,
                KEY_BLOCK, KEY_TOKEN, VALUE_BLOCK, VALUE_TOKEN, SCALE_BLOCK, SCALE_TOKEN,
                BLOCK_SIZE, HEAD_DIM, V_HEAD_DIM, TILE_N, TILE_D, TILE_DV,
                True, CAUSAL, WINDOW, SOFTCAP, SCALED, PRECISION,
            )
    # fmt: on

    dv = tl.arange(0, TILE_DV)
    is_cell = is_row[:, None] & (dv < V_HEAD_DIM)[None, :]
    if SPLIT:
        row = (sequence.to(tl.int64) * most + token) * (KV_HEADS * GROUP) + head
        row = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_sums + row * 2, top, mask=is_row)
        tl.store(partial_sums + row * 2 + 1, total, mask=is_row)
        tl.store(partial + row[:, None] * V_HEAD_DIM + dv[None, :], acc, mask=is_cell & (start < stop))
    else:
        if SINKS:
            acc, total = with_sink(acc, top, total, tl.load(sinks + head, mask=is_row, other=0.0))
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        at_out = (query_start + token).to(tl.int64) * out_token + head.to(tl.int64) * out_head
        tl.store(out + at_out[:, None] + dv[None, :], result.to(out.dtype.element_ty), mask=is_cell)


@triton.jit(do_not_specialize=["fewest", "most", "splits"])
def combine_splits(
    out,
    partial,
    partial_sums,
    sinks,
    cu_seqlens_q,
    fewest,
    most,
    splits,
    out_token,
    out_head,
    V_HEAD_DIM: tl.constexpr,
    TILE_DV: tl.constexpr,
    TILE_S: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Add up what the splits of one query head of one query token left behind. Grid: (sequences * most, heads).

    There are TILE_S splits at most. One that saw no key left no partial result, its memory may hold anything.
    """
    sequence = tl.program_id(0) // most
    token = tl.program_id(0) % most
    head = tl.program_id(1)
    query_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - query_start
    if (token >= q_len) | (q_len < fewest) | (q_len > most):
        return
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * splits
    s = tl.arange(0, TILE_S)
    tops = tl.load(partial_sums + (row + s) * 2, mask=s < splits, other=NOTHING)
    sums = tl.load(partial_sums + (row + s) * 2 + 1, mask=s < splits, other=0.0)
    top = tl.max(tops, 0)
    if SINKS:
        logit = tl.load(sinks + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, logit)
    base = tl.where(top == NOTHING, 0.0, top)
    total = tl.sum(sums * tl.exp2(tops - base), 0)
    if SINKS:
        total += tl.exp2(logit - base)
    dv = tl.arange(0, TILE_DV)
    acc = tl.zeros([TILE_DV], tl.float32)
    for start in range(0, splits, CHUNK):
        part = start + tl.arange(0, CHUNK)
        weights = tl.exp2(tl.load(partial_sums + (row + part) * 2, mask=part < splits, other=NOTHING) - base)
        mask = (weights > 0)[:, None] & (dv < V_HEAD_DIM)[None, :]
        parts = tl.load(partial + (row + part)[:, None] * V_HEAD_DIM + dv[None, :], mask=mask, other=0.0)
        acc += tl.sum(parts * weights[:, None], 0)
    result = acc / tl.where(total > 0, total, 1.0)
    at_out = (query_start + token).to(tl.int64) * out_token + head.to(tl.int64) * out_head
    tl.store(out + at_out + dv, result.to(out.dtype.element_ty), mask=dv < V_HEAD_DIM)
