"""Triton kernels of paged attention: tiles of query rows over tiles of keys, and the sum of the splits.

A row of a tile is one query head of one query token; all heads of a group share a tile, so that a key is read once for
all of them. A sequence's keys are split among programs as in "Flash-Decoding" (Dao et al., 2023). A hole is stepped
over: the tiles before it come first, then those behind it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedkv.data.gpu_device import is_interpreted, power_of_two
from pagedkv.data.quantised import GREATEST

# What happens in one tile of keys, as functions that the compiler puts into the kernels.
#
# Running maximum and sum as in "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018) and
# "FlashAttention-2" (Dao, 2023).


class Memory(NamedTuple):
    """The memory of keys and values, and their scales where they are quantised."""

    key_blocks: Tensor
    value_blocks: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


class Strides(NamedTuple):
    """Distances in the pool, in elements."""

    key_block: int
    key_token: int
    key_head: int
    value_block: int
    value_token: int
    value_head: int
    scale_block: int
    scale_token: int
    scale_head: int


class Sizes(NamedTuple):
    """Sizes of the pool, of the heads and of the tiles."""

    kv_heads: int
    block_size: int
    group: int
    head_dim: int
    v_head_dim: int
    tile_m: int
    tile_n: int
    tile_d: int
    tile_dv: int


class Rules(NamedTuple):
    """What a kernel is compiled to do, and how it multiplies."""

    split: bool
    search: bool
    causal: bool
    window: bool
    softcap: bool
    sinks: bool
    scaled: bool
    compute: Any
    precision: str


LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def blocks_of_tile(tile, table, low, high, BLOCK_SIZE: tl.constexpr, TILE_N: tl.constexpr):
    """Return the block of each slot of a tile, 0 for slots outside of [low, high)."""
    slot = tile * TILE_N + tl.arange(0, TILE_N)
    # Unsigned, so that dividing is a shift.
    block = slot.to(tl.uint32, bitcast=True) // BLOCK_SIZE
    return tl.load(table + block, mask=(slot >= low) & (slot < high), other=0)


@triton.jit
def _rows(at, is_key, DIM: tl.constexpr, TILE_D: tl.constexpr, MASKED: tl.constexpr):
    """Return the rows that begin at these addresses, zeros for what is no key or no element of one."""
    d = tl.arange(0, TILE_D)
    address = at[:, None] + d[None, :]
    if MASKED and TILE_D != DIM:
        return tl.load(address, mask=is_key[:, None] & (d < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(address, mask=is_key[:, None], other=0.0)
    elif TILE_D != DIM:
        return tl.load(address, mask=(d < DIM)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def _capped(scores, scale, softcap):
    """Return ``softcap * tanh(scores * scale / softcap)`` in units of log 2."""
    scaled = scores * (scale / softcap)
    shrunk = tl.exp2(tl.abs(scaled) * (-2.0 * LOG2_E))
    capped = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(scaled < 0, -capped, capped) * (softcap * LOG2_E)


@triton.jit
def one_tile(
    acc,
    top,
    total,
    tile,
    block,
    query,
    position,
    keys,
    values,
    key_scales,
    value_scales,
    low,
    high,
    shift,
    scale,
    softcap,
    window,
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    RULES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return accumulator, running maximum and sum after one more tile of keys, which are in these blocks.

    With MASKED only slots in [low, high) are keys, and rows see what their ``position`` allows; without it every row
    sees every key of the tile. A key's position is its slot less ``shift``. ``scale`` is not negative.
    """
    slot = tile * SIZES.tile_n + tl.arange(0, SIZES.tile_n)
    is_key = (slot >= low) & (slot < high)
    offset = (slot.to(tl.uint32, bitcast=True) % SIZES.block_size).to(tl.int64)
    block = block.to(tl.int64)

    key = _rows(
        keys + (block * STRIDES.key_block + offset * STRIDES.key_token), is_key, SIZES.head_dim, SIZES.tile_d, MASKED
    )
    value = _rows(
        values + (block * STRIDES.value_block + offset * STRIDES.value_token),
        is_key,
        SIZES.v_head_dim,
        SIZES.tile_dv,
        MASKED,
    )
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=RULES.precision)
    if RULES.scaled:
        at_scale = block * STRIDES.scale_block + offset * STRIDES.scale_token
        scores *= tl.load(key_scales + at_scale, mask=is_key, other=0.0)[None, :]
    unit = scale * LOG2_E
    if RULES.softcap:
        scores = _capped(scores, scale, softcap)
        unit = 1.0
    if MASKED:
        seen = is_key[None, :]
        if RULES.causal:
            seen = seen & (slot[None, :] - shift <= position[:, None])
        if RULES.window:
            seen = seen & (position[:, None] - (slot[None, :] - shift) < window)
        scores = tl.where(seen, scores * unit, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(new_top == NOTHING, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
    else:
        # The greatest product is that of the greatest score: one multiplication less, the other is fused.
        new_top = tl.maximum(top, tl.max(scores, 1) * unit)
        base = new_top
        weights = tl.exp2(scores * unit - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if RULES.scaled:
        weights *= tl.load(value_scales + at_scale, mask=is_key, other=0.0)[None, :]

    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc, input_precision=RULES.precision)
    return acc, new_top, total


@triton.jit
def with_sink(acc, top, total, sink):
    """Return accumulator and sum after one more logit that has no value."""
    logit = sink.to(tl.float32) * LOG2_E
    new_top = tl.maximum(top, logit)
    base = tl.where(new_top == NOTHING, 0.0, new_top)
    shrink = tl.exp2(top - base)
    return acc * shrink[:, None], total * shrink + tl.exp2(logit - base)


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
    pool,
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
    STRIDES: tl.constexpr,
    SIZES: tl.constexpr,
    RULES: tl.constexpr,
):
    """Attend for one tile of query rows of one kv head, over one split of the sequence's keys.

    Serves the sequences that have ``fewest`` to ``most`` query tokens and leaves the others alone. Grid: (tiles * kv
    heads, splits); by the rule ``search`` the tiles are counted over all sequences, else every sequence has one. The
    heads of a tile follow each other, as their keys do in memory. A split has ``least_tiles`` of keys at least.

    Strides of the pool are compiled in: without them, finding the keys takes more instructions than the products do.
    """
    TILE_M: tl.constexpr = SIZES.tile_m
    TILE_DV: tl.constexpr = SIZES.tile_dv
    TILE_Q: tl.constexpr = TILE_M // SIZES.group
    tile = tl.program_id(0) // SIZES.kv_heads
    kv_head = tl.program_id(0) % SIZES.kv_heads
    if RULES.search:
        tile = tl.num_programs(0) // SIZES.kv_heads - 1 - tile  # the tiles with the most keys begin first
        sequence = _sequence_of_tile(cu_seqlens_q, num_sequences, tile, TILE_Q)
    else:
        sequence = tile
    query_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - query_start
    first = (tile - query_start // TILE_Q - sequence) * TILE_Q if RULES.search else 0
    if (first >= q_len) | (q_len < fewest) | (q_len > most):
        return
    seq_len = tl.load(seq_lens + sequence)
    hole_start = tl.load(holes + 2 * sequence)
    hole_length = tl.load(holes + 2 * sequence + 1) - hole_start
    hole_start = tl.where(hole_length > 0, hole_start, seq_len)

    scale = tl.full([], scale, tl.float32)  # the interpreter would take tiny ones for float64
    softcap = tl.full([], softcap, tl.float32)

    rows = tl.arange(0, TILE_M)
    token = first + rows // SIZES.group
    is_row = (rows < TILE_Q * SIZES.group) & (token < q_len)
    head = kv_head * SIZES.group + rows % SIZES.group
    position = seq_len - q_len + token
    d = tl.arange(0, SIZES.tile_d)
    at_query = (query_start + token).to(tl.int64) * query_token + head.to(tl.int64) * query_head
    query = tl.load(
        queries + at_query[:, None] + d[None, :], mask=is_row[:, None] & (d < SIZES.head_dim)[None, :], other=0.0
    ).to(RULES.compute)

    # Keys that any row sees, [low, high), and keys that every row sees.
    first_position = seq_len - q_len + first
    last_position = seq_len - q_len + tl.minimum(first + TILE_Q, q_len) - 1
    high = last_position + 1 if RULES.causal else seq_len
    whole_high = first_position + 1 if RULES.causal else seq_len
    low = tl.maximum(first_position - window + 1, 0) if RULES.window else 0
    whole_low = tl.maximum(last_position - window + 1, 0) if RULES.window else 0

    # Tiles are counted by slot: those of the keys before the hole, then those of the keys behind it.
    before = _num_tiles(low, tl.minimum(high, hole_start), SIZES.tile_n)
    behind = _num_tiles(tl.maximum(low, hole_start) + hole_length, high + hole_length, SIZES.tile_n)
    start = 0
    stop = before + behind
    if RULES.split:
        share = tl.maximum(tl.cdiv(stop, tl.num_programs(1)), least_tiles)
        start = tl.minimum(tl.program_id(1) * share, stop)
        stop = tl.minimum(start + share, stop)

    table = block_tables + sequence.to(tl.int64) * table_row
    keys = pool.key_blocks + kv_head.to(tl.int64) * STRIDES.key_head
    values = pool.value_blocks + kv_head.to(tl.int64) * STRIDES.value_head
    key_scales = pool.key_scales
    value_scales = pool.value_scales
    if RULES.scaled:
        key_scales += kv_head.to(tl.int64) * STRIDES.scale_head
        value_scales += kv_head.to(tl.int64) * STRIDES.scale_head
    acc = tl.zeros([TILE_M, TILE_DV], tl.float32)
    top = tl.full([TILE_M], NOTHING, tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    # fmt: off
    for side in range(0, 1 + (behind > 0).to(tl.int32)):
        shift = hole_length if side else 0
        low_slot = tl.maximum(low, hole_start) + hole_length if side else low
        high_slot = high + hole_length if side else tl.minimum(high, hole_start)
        origin = low_slot // SIZES.tile_n - (before if side else 0)
        begin = origin + (tl.maximum(start, before) if side else tl.minimum(start, before))
        end = origin + (tl.maximum(stop, before) if side else tl.minimum(stop, before))
        whole_begin = tl.cdiv(tl.maximum(low_slot, whole_low + shift), SIZES.tile_n)
        whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
        whole_end = tl.minimum(high_slot, whole_high + shift) // SIZES.tile_n
        whole_end = tl.maximum(tl.minimum(whole_end, end), whole_begin)

        # Blocks are looked up one tile ahead of the keys: else every copy of keys would wait for its table first.
        whole_high_slot = whole_end * SIZES.tile_n
        ahead = blocks_of_tile(whole_begin, table, 0, whole_high_slot, SIZES.block_size, SIZES.tile_n)
        for i in range(whole_begin, whole_end):
            block = ahead
            ahead = blocks_of_tile(i + 1, table, 0, whole_high_slot, SIZES.block_size, SIZES.tile_n)
            acc, top, total = one_tile(
                acc, top, total, i, block, query, position, keys, values, key_scales, value_scales,
                low_slot, high_slot, shift, scale, softcap, window,
                STRIDES, SIZES, RULES, False,
            )
        num_before = whole_begin - begin
        for j in tl.range(0, num_before + end - whole_end, num_stages=1):
            i = tl.where(j < num_before, begin + j, whole_end + j - num_before)
            block = blocks_of_tile(i, table, low_slot, high_slot, SIZES.block_size, SIZES.tile_n)
            acc, top, total = one_tile(
                acc, top, total, i, block, query, position, keys, values, key_scales, value_scales,
                low_slot, high_slot, shift, scale, softcap, window,
                STRIDES, SIZES, RULES, True,
            )
    # fmt: on

    dv = tl.arange(0, TILE_DV)
    is_cell = is_row[:, None] & (dv < SIZES.v_head_dim)[None, :]
    if RULES.split:
        row = (sequence.to(tl.int64) * most + token) * (SIZES.kv_heads * SIZES.group) + head
        row = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_sums + row * 2, top, mask=is_row)
        tl.store(partial_sums + row * 2 + 1, total, mask=is_row)
        tl.store(partial + row[:, None] * SIZES.v_head_dim + dv[None, :], acc, mask=is_cell & (start < stop))
    else:
        if RULES.sinks:
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


# Moving keys and values on the device: new tokens into their slots, whole blocks to other blocks.

_TILE = 2048
_CHUNK = 2048
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
# Adding them leaves room for no smaller digit than 1, or than 2⁻⁹: float32 rounds to it, half to even.
_TO_INTEGER = tl.constexpr(1.5 * 2**23)
_TO_SUBNORMAL = tl.constexpr(1.5 * 2**14)


@triton.jit
def _to_three_bits(numbers):
    """Return float32 rounded to what e4m3 can hold, half to even, so that every cast to it is exact."""
    bits = numbers.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = (numbers + _TO_SUBNORMAL) - _TO_SUBNORMAL
    return tl.where(tl.abs(numbers) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def _write_side(
    pool,
    scales,
    tokens,
    slot,
    num_heads,
    pool_strides,
    scale_strides,
    token_strides,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_INTEGER: tl.constexpr,
):
    """Write some heads of one token into its slot; with a LIMIT divided by a scale of each head."""
    head = (tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)).to(tl.int64)
    d = tl.arange(0, TILE_D)
    is_head = head < num_heads
    mask = is_head[:, None] & (d < HEAD_DIM)[None, :]
    at_new = tl.program_id(0).to(tl.int64) * token_strides[0] + head * token_strides[1]
    numbers = tl.load(tokens + at_new[:, None] + d[None, :], mask=mask, other=0.0)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    if LIMIT > 0:
        numbers = numbers.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(numbers), 1), LIMIT)
        at_scale = block * scale_strides[0] + offset * scale_strides[1] + head * scale_strides[2]
        tl.store(scales + at_scale, scale, mask=is_head)
        numbers = tl.div_rn(numbers, tl.where(scale > 0, scale, 1.0)[:, None])
        numbers = tl.where((scale > 0)[:, None], numbers, 0.0)
        if IS_INTEGER:
            numbers = (numbers + _TO_INTEGER) - _TO_INTEGER
        else:
            numbers = _to_three_bits(numbers)
        numbers = tl.minimum(tl.maximum(numbers, -LIMIT), LIMIT)
    at_pool = block * pool_strides[0] + offset * pool_strides[1] + head * pool_strides[2]
    tl.store(pool + at_pool[:, None] + d[None, :], numbers.to(pool.dtype.element_ty), mask=mask)


@triton.jit
def _write_tokens(
    keys,
    values,
    key_scales,
    value_scales,
    new_keys,
    new_values,
    slots,
    num_heads,
    key_strides,
    value_strides,
    scale_strides,
    new_key_strides,
    new_value_strides,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_DV: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_INTEGER: tl.constexpr,
):
    """Write the keys (third grid index 0) or values (1) of a token. Grid: (tokens, tiles of heads, 2)."""
    slot = tl.load(slots + tl.program_id(0))
    if slot < 0:
        return
    # fmt: off
    if tl.program_id(2) == 0:
        _write_side(
            keys, key_scales, new_keys, slot, num_heads, key_strides, scale_strides, new_key_strides,
            BLOCK_SIZE, HEAD_DIM, TILE_H, TILE_D, LIMIT, IS_INTEGER,
        )
    else:
        _write_side(
            values, value_scales, new_values, slot, num_heads, value_strides, scale_strides, new_value_strides,
            BLOCK_SIZE, V_HEAD_DIM, TILE_H, TILE_DV, LIMIT, IS_INTEGER,
        )
    # fmt: on


def write_tokens(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    slots: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write the keys and values of tokens into their slots, in one launch and without waiting for the device.

    Everything is on one device and was checked before: pools ``[num_blocks, block_size, num_kv_heads, dim]`` of any
    strides but the last, which is 1 (an HND pool is shown transposed), scales without the last dimension, tokens ``[n,
    num_kv_heads, dim]``, which are cast or quantised, and int64 slots, of which negative ones are left out.
    """
    if not len(slots):
        return
    if is_interpreted():  # it cuts numbers off where a device rounds
        dtype = torch.float32 if keys.dtype in GREATEST else keys.dtype
        new_keys, new_values = new_keys.to(dtype), new_values.to(dtype)
    _, block_size, num_heads, head_dim = keys.shape
    v_head_dim = values.shape[3]
    tile_d, tile_dv = power_of_two(head_dim), power_of_two(v_head_dim)
    tile_h = min(power_of_two(num_heads), max(1, _TILE // max(tile_d, tile_dv)))
    with torch.cuda.device_of(keys):
        _write_tokens[(len(slots), triton.cdiv(num_heads, tile_h), 2)](
            keys,
            values,
            key_scales,
            value_scales,
            new_keys,
            new_values,
            slots,
            num_heads,
            keys.stride()[:3],
            values.stride()[:3],
            (0, 0, 0) if key_scales is None else key_scales.stride(),
            new_keys.stride()[:2],
            new_values.stride()[:2],
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            TILE_H=tile_h,
            TILE_D=tile_d,
            TILE_DV=tile_dv,
            LIMIT=GREATEST.get(keys.dtype, 0.0),
            IS_INTEGER=keys.dtype == torch.int8,
            enable_fp_fusion=False,  # what is added to round must not be fused
        )


@triton.jit
def _copy_words(
    target,
    source,
    targets,
    sources,
    target_row,
    target_block,
    source_row,
    source_block,
    words,
    CHUNK: tl.constexpr,
):
    """Copy a piece of a block. Without indices block i is place i. Grid: (pairs * pieces of a block, rows)."""
    pieces = tl.cdiv(words, CHUNK)
    pair = (tl.program_id(0) // pieces).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    to = pair if targets is None else tl.load(targets + pair)
    come_from = pair if sources is None else tl.load(sources + pair)
    at = (tl.program_id(0) % pieces).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    numbers = tl.load(source + row * source_row + come_from * source_block + at, mask=at < words)
    tl.store(target + row * target_row + to * target_block + at, numbers, mask=at < words)


def copy_blocks(tensors: tuple[Tensor, ...], pairs: np.ndarray[Any, Any]) -> None:
    """Copy blocks over all layers as if all at once: every source is read before any block is written.

    The tensors are contiguous, ``[layers, sides, num_blocks, …]``. The pairs (source, destination), int64 ``[k, 2]``,
    were checked and are on the host, so that it is known whether a block is both.
    """
    if not len(pairs):
        return
    is_staged = bool(np.isin(pairs[:, 0], pairs[:, 1]).any())
    device = tensors[0].device
    columns = torch.from_numpy(np.ascontiguousarray(pairs.T))
    if device.type == "cuda":
        columns = columns.pin_memory().to(device, non_blocking=True)
    sources, targets = columns[0], columns[1]
    for tensor in tensors:
        words = _as_words(tensor)
        if is_staged:
            staging = words.new_empty(words.shape[0], len(pairs), words.shape[2])
            _copy(staging, words, None, sources, len(pairs))
            _copy(words, staging, targets, None, len(pairs))
        else:
            _copy(words, words, targets, sources, len(pairs))


def _as_words(tensor: Tensor) -> Tensor:
    """Return ``[rows, num_blocks, words]`` with the widest words that a block divides into."""
    flat = tensor.flatten(0, 1).flatten(2)
    block_bytes = flat.shape[2] * flat.element_size()
    return flat.view(next(dtype for size, dtype in _WORDS.items() if block_bytes % size == 0))


def _copy(target: Tensor, source: Tensor, targets: Tensor | None, sources: Tensor | None, count: int) -> None:
    rows, _, words = source.shape
    with torch.cuda.device_of(target):
        _copy_words[(count * triton.cdiv(words, _CHUNK), rows)](
            target,
            source,
            targets,
            sources,
            *target.stride()[:2],
            *source.stride()[:2],
            words,
            CHUNK=_CHUNK,
            enable_fp_fusion=False,
        )
