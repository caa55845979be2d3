"""What happens in one tile of keys, as functions that the compiler puts into the kernels.

Running maximum and sum as in "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018) and
"FlashAttention-2" (Dao, 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LOG2_E", "NOTHING", "one_tile", "with_sink"]

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _scored(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """Return the logits in units of log 2."""
    if SOFTCAP:
        scaled = scores * (scale / softcap)
        shrunk = tl.exp2(tl.abs(scaled) * (-2.0 * LOG2_E))
        capped = (1.0 - shrunk) / (1.0 + shrunk)
        return tl.where(scaled < 0, -capped, capped) * (softcap * LOG2_E)
    else:
        return scores * (scale * LOG2_E)


@triton.jit
def one_tile(
    acc,
    top,
    total,
    tile,
    query,
    position,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    low,
    high,
    hole_start,
    hole_length,
    scale,
    softcap,
    window,
    key_block,
    key_token,
    value_block,
    value_token,
    scale_block,
    scale_token,
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
    """Return accumulator, running maximum and sum after one more tile of keys.

    Without MASKED every row sees every key of the tile.
    """
    place = tile * TILE_N + tl.arange(0, TILE_N)
    is_key = (place >= low) & (place < high)
    slot = tl.where(place < hole_start, place, place + hole_length)
    offset = (slot % BLOCK_SIZE).to(tl.int64)
    if MASKED:
        block = tl.load(table + slot // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    else:
        block = tl.load(table + slot // BLOCK_SIZE).to(tl.int64)

    d = tl.arange(0, TILE_D)
    at_key = keys + (block * key_block + offset * key_token)[:, None] + d[None, :]
    if MASKED and TILE_D != HEAD_DIM:
        key = tl.load(at_key, mask=is_key[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        key = tl.load(at_key, mask=is_key[:, None], other=0.0)
    elif TILE_D != HEAD_DIM:
        key = tl.load(at_key, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        key = tl.load(at_key)
    scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
    if SCALED:
        at_scale = block * scale_block + offset * scale_token
        scores *= tl.load(key_scales + at_scale, mask=is_key, other=0.0)[None, :]
    scores = _scored(scores, scale, softcap, SOFTCAP)
    if MASKED:
        seen = is_key[None, :]
        if CAUSAL:
            seen = seen & (place[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (position[:, None] - place[None, :] < window)
        scores = tl.where(seen, scores, NOTHING)

    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum to subtract.
    base = tl.where(new_top == NOTHING, 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        weights *= tl.load(value_scales + at_scale, mask=is_key, other=0.0)[None, :]

    dv = tl.arange(0, TILE_DV)
    at_value = values + (block * value_block + offset * value_token)[:, None] + dv[None, :]
    if MASKED and TILE_DV != V_HEAD_DIM:
        value = tl.load(at_value, mask=is_key[:, None] & (dv < V_HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        value = tl.load(at_value, mask=is_key[:, None], other=0.0)
    elif TILE_DV != V_HEAD_DIM:
        value = tl.load(at_value, mask=(dv < V_HEAD_DIM)[None, :], other=0.0)
    else:
        value = tl.load(at_value)
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
