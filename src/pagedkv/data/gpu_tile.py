"""What happens in one tile of keys, as functions that the compiler puts into the kernels.

Running maximum and sum as in "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018) and
"FlashAttention-2" (Dao, 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LOG2_E", "NOTHING", "blocks_of_tile", "one_tile", "with_sink"]

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
    KEY_BLOCK: tl.constexpr,
    KEY_TOKEN: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_TOKEN: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    SCALE_TOKEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_DV: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return accumulator, running maximum and sum after one more tile of keys, which are in these blocks.

    With MASKED only slots in [low, high) are keys, and rows see what their ``position`` allows; without it every row
    sees every key of the tile. A key's position is its slot less ``shift``. ``scale`` is not negative.
    """
    slot = tile * TILE_N + tl.arange(0, TILE_N)
    is_key = (slot >= low) & (slot < high)
    offset = (slot.to(tl.uint32, bitcast=True) % BLOCK_SIZE).to(tl.int64)
    block = block.to(tl.int64)

    key = _rows(keys + (block * KEY_BLOCK + offset * KEY_TOKEN), is_key, HEAD_DIM, TILE_D, MASKED)
    value = _rows(values + (block * VALUE_BLOCK + offset * VALUE_TOKEN), is_key, V_HEAD_DIM, TILE_DV, MASKED)
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
    if SCALED:
        at_scale = block * SCALE_BLOCK + offset * SCALE_TOKEN
        scores *= tl.load(key_scales + at_scale, mask=is_key, other=0.0)[None, :]
    unit = scale * LOG2_E
    if SOFTCAP:
        scores = _capped(scores, scale, softcap)
        unit = 1.0
    if MASKED:
        seen = is_key[None, :]
        if CAUSAL:
            seen = seen & (slot[None, :] - shift <= position[:, None])
        if WINDOW:
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
    if SCALED:
        weights *= tl.load(value_scales + at_scale, mask=is_key, other=0.0)[None, :]

    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def with_sink(acc, top, total, sink):
    """Return accumulator and sum after one more logit that has no value."""
    logit = sink.to(tl.float32) * LOG2_E
    new_top = tl.maximum(top, logit)
    base = tl.where(new_top == NOTHING, 0.0, new_top)
    shrink = tl.exp2(top - base)
    return acc * shrink[:, None], total * shrink + tl.exp2(logit - base)
