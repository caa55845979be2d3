"""Moving keys and values on the device: new tokens into their slots, whole blocks to other blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedkv.data.gpu_device import is_interpreted
from pagedkv.data.gpu_shapes import power_of_two

__all__ = ["QUANTISED_MAX", "copy_blocks", "write_tokens"]

QUANTISED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The greatest number of a quantised dtype: what a token's greatest element in a head becomes."""
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
    pool_block,
    pool_token,
    pool_head,
    scale_block,
    scale_token,
    scale_head,
    new_token,
    new_head,
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
    at_new = tl.program_id(0).to(tl.int64) * new_token + head * new_head
    numbers = tl.load(tokens + at_new[:, None] + d[None, :], mask=mask, other=0.0)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    if LIMIT > 0:
        numbers = numbers.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(numbers), 1), LIMIT)
        tl.store(scales + block * scale_block + offset * scale_token + head * scale_head, scale, mask=is_head)
        numbers = tl.div_rn(numbers, tl.where(scale > 0, scale, 1.0)[:, None])
        numbers = tl.where((scale > 0)[:, None], numbers, 0.0)
        if IS_INTEGER:
            numbers = (numbers + _TO_INTEGER) - _TO_INTEGER
        else:
            numbers = _to_three_bits(numbers)
        numbers = tl.minimum(tl.maximum(numbers, -LIMIT), LIMIT)
    at_pool = block * pool_block + offset * pool_token + head * pool_head
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
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    scale_block,
    scale_token,
    scale_head,
    new_key_token,
    new_key_head,
    new_value_token,
    new_value_head,
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
            keys, key_scales, new_keys, slot, num_heads, key_block, key_token, key_head,
            scale_block, scale_token, scale_head, new_key_token, new_key_head,
            BLOCK_SIZE, HEAD_DIM, TILE_H, TILE_D, LIMIT, IS_INTEGER,
        )
    else:
        _write_side(
            values, value_scales, new_values, slot, num_heads, value_block, value_token, value_head,
            scale_block, scale_token, scale_head, new_value_token, new_value_head,
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

    Everything is on one device and was checked before.

    Parameters
    ----------
    keys, values : Tensor [num_blocks, block_size, num_kv_heads, dim]
        Of any strides but the last, which is 1: an HND pool is shown transposed.
    new_keys, new_values : Tensor [n, num_kv_heads, dim]
        Floating; cast, or quantised where the pool is int8 or float8_e4m3fn.
    slots : int64 [n]
        ``block_id * block_size + offset``; negative ones are left out.
    key_scales, value_scales : float32 [num_blocks, block_size, num_kv_heads], optional
        Receive what the quantised numbers have to be multiplied by.
    """
    if not len(slots):
        return
    if is_interpreted():  # it cuts numbers off where a device rounds
        dtype = torch.float32 if keys.dtype in QUANTISED_MAX else keys.dtype
        new_keys, new_values = new_keys.to(dtype), new_values.to(dtype)
    _, block_size, num_heads, head_dim = keys.shape
    v_head_dim = values.shape[3]
    tile_d, tile_dv = power_of_two(head_dim), power_of_two(v_head_dim)
    tile_h = min(power_of_two(num_heads), max(1, _TILE // max(tile_d, tile_dv)))
    no_strides = (0, 0, 0)
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
            *keys.stride()[:3],
            *values.stride()[:3],
            *(no_strides if key_scales is None else key_scales.stride()),
            *new_keys.stride()[:2],
            *new_values.stride()[:2],
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            TILE_H=tile_h,
            TILE_D=tile_d,
            TILE_DV=tile_dv,
            LIMIT=QUANTISED_MAX.get(keys.dtype, 0.0),
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

    Parameters
    ----------
    tensors : tuple of Tensor [layers, sides, num_blocks, …]
        Contiguous.
    pairs : int64 [k, 2]
        (source, destination), checked; on the host, so that it is known whether a block is both.
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
