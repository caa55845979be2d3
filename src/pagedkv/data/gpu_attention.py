"""The Triton kernels of paged attention: tiles of query rows over tiles of keys, and the sum of the splits.

A row of a tile is one query head of one query token; all heads of a group share a tile, so that a key is read once for
all of them. A sequence's keys are split among programs as in "Flash-Decoding" (Dao et al., 2023). Keys are counted by
position: a hole is stepped over, so that nothing has to be masked for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagedkv.data.gpu_tile import LOG2_E, NOTHING, one_tile, with_sink

__all__ = ["attend_tiles", "combine_splits"]


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


@triton.jit(do_not_specialize=["num_sequences", "fewest", "most", "window", "table_row"])
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
    scale,
    softcap,
    window,
    table_row,
    query_token,
    query_head,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    scale_block,
    scale_token,
    scale_head,
    out_token,
    out_head,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_DV: tl.constexpr,
    SPLITS: tl.constexpr,
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

    Serves the sequences that have ``fewest`` to ``most`` query tokens and leaves the others alone. Grid: (tiles, kv
    heads, SPLITS); with SEARCH the tiles are counted over all sequences, without it every sequence has one.
    """
    TILE_Q: tl.constexpr = TILE_M // GROUP
    tile = tl.program_id(0)
    if SEARCH:
        tile = tl.num_programs(0) - 1 - tile  # the tiles with the most keys begin first
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
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

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

    begin = low // TILE_N
    end = tl.cdiv(high, TILE_N)
    if SPLITS > 1:
        share = tl.cdiv(end - begin, SPLITS)
        begin += split * share
        end = tl.minimum(begin + share, end)
        begin = tl.minimum(begin, end)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(whole_low, TILE_N), begin), end)
    whole_end = tl.maximum(tl.minimum(whole_high // TILE_N, end), whole_begin)

    table = block_tables + sequence.to(tl.int64) * table_row
    keys += kv_head.to(tl.int64) * key_head
    values += kv_head.to(tl.int64) * value_head
    if SCALED:
        key_scales += kv_head.to(tl.int64) * scale_head
        value_scales += kv_head.to(tl.int64) * scale_head
    acc = tl.zeros([TILE_M, TILE_DV], tl.float32)
    top = tl.full([TILE_M], NOTHING, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    # fmt: off
    for i in range(whole_begin, whole_end):
        acc, top, total = one_tile(
            acc, top, total, i, query, position, keys, values, key_scales, value_scales, table,
            low, high, hole_start, hole_length, scale, softcap, window,
            key_block, key_token, value_block, value_token, scale_block, scale_token,
            BLOCK_SIZE, HEAD_DIM, V_HEAD_DIM, TILE_N, TILE_D, TILE_DV,
            False, CAUSAL, WINDOW, SOFTCAP, SCALED, PRECISION,
        )
    num_before = whole_begin - begin
    for j in range(0, num_before + end - whole_end):
        i = tl.where(j < num_before, begin + j, whole_end + j - num_before)
        acc, top, total = one_tile(
            acc, top, total, i, query, position, keys, values, key_scales, value_scales, table,
            low, high, hole_start, hole_length, scale, softcap, window,
            key_block, key_token, value_block, value_token, scale_block, scale_token,
            BLOCK_SIZE, HEAD_DIM, V_HEAD_DIM, TILE_N, TILE_D, TILE_DV,
            True, CAUSAL, WINDOW, SOFTCAP, SCALED, PRECISION,
        )
    # fmt: on

    dv = tl.arange(0, TILE_DV)
    is_cell = is_row[:, None] & (dv < V_HEAD_DIM)[None, :]
    if SPLITS > 1:
        num_heads = tl.num_programs(1) * GROUP
        row = ((sequence.to(tl.int64) * most + token) * num_heads + head) * SPLITS + split
        tl.store(partial_sums + row * 2, top, mask=is_row)
        tl.store(partial_sums + row * 2 + 1, total, mask=is_row)
        tl.store(partial + row[:, None] * V_HEAD_DIM + dv[None, :], acc, mask=is_cell)
    else:
        if SINKS:
            acc, total = with_sink(acc, top, total, tl.load(sinks + head, mask=is_row, other=0.0))
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        at_out = (query_start + token).to(tl.int64) * out_token + head.to(tl.int64) * out_head
        tl.store(out + at_out[:, None] + dv[None, :], result.to(out.dtype.element_ty), mask=is_cell)


@triton.jit(do_not_specialize=["fewest", "most"])
def combine_splits(
    out,
    partial,
    partial_sums,
    sinks,
    cu_seqlens_q,
    fewest,
    most,
    out_token,
    out_head,
    V_HEAD_DIM: tl.constexpr,
    TILE_DV: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Add up what the splits of one query head of one query token left behind. Grid: (sequences * most, heads)."""
    sequence = tl.program_id(0) // most
    token = tl.program_id(0) % most
    head = tl.program_id(1)
    query_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - query_start
    if (token >= q_len) | (q_len < fewest) | (q_len > most):
        return
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(partial_sums + row * 2)
    sums = tl.load(partial_sums + row * 2 + 1)
    top = tl.max(tops, 0)
    weights = tl.exp2(tops - tl.where(top == NOTHING, 0.0, top))
    dv = tl.arange(0, TILE_DV)
    parts = tl.load(partial + row[:, None] * V_HEAD_DIM + dv[None, :], mask=(dv < V_HEAD_DIM)[None, :], other=0.0)
    acc = tl.sum(parts * weights[:, None], 0)
    total = tl.sum(sums * weights, 0)
    if SINKS:
        logit = tl.load(sinks + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, logit)
        base = tl.where(new_top == NOTHING, 0.0, new_top)
        shrink = tl.exp2(top - base)
        acc = acc * shrink
        total = total * shrink + tl.exp2(logit - base)
    result = acc / tl.where(total > 0, total, 1.0)
    at_out = (query_start + token).to(tl.int64) * out_token + head.to(tl.int64) * out_head
    tl.store(out + at_out + dv, result.to(out.dtype.element_ty), mask=dv < V_HEAD_DIM)
