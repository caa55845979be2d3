"""GPU backend of attention: launches of the Triton kernels over the blocks on the device.

Everything that is wrong with a call is found before anything is launched, and nothing here waits for the device, unless
``PAGEDKV_DEBUG=1`` asks to check what is on the device too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from pagedkv.data.call import AttentionCall, Batch, DeviceBatch
from pagedkv.data.gpu_device import (
    MOST_SPLITS,
    TILES_PER_SPLIT,
    Config,
    Heads,
    candidates,
    device_of,
    is_interpreted,
    num_splits,
    tl_dtype,
)
from pagedkv.data.gpu_kernels import Memory, Rules, Sizes, Strides, attend_tiles, combine_splits
from pagedkv.data.gpu_plan import uploaded
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.spec import MAX_COUNT


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``; the arrays of a batch that is on the host are copied to the device once for all layers.

    With the batch of a ``DevicePlan`` the call may be captured in a CUDA graph; replayed, it reads the plan that was
    loaded last.
    """
    _require_dtypes(call)
    if len(call.queries):
        launch(call, call.batch if isinstance(call.batch, DeviceBatch) else uploaded(call))


def _require_dtypes(call: AttentionCall) -> None:
    """Refuse a dtype that the device does not know."""
    device = call.queries.device
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0) and torch.bfloat16 in (call.queries.dtype, call.keys.dtype):
        raise InvalidOperation(f"queries: bfloat16 needs compute capability 8.0, {device} has {major}.{minor}")
    if (major, minor) < (8, 9) and call.keys.dtype == torch.float8_e4m3fn:
        raise InvalidOperation(f"keys: float8_e4m3fn needs compute capability 8.9, {device} has {major}.{minor}")


# Launching the attention kernels: grids, strides, compile-time choices. Nothing here waits for the device.


def launch(call: AttentionCall, batch: DeviceBatch) -> None:
    """Fill ``call.out``: sequences with few query tokens by split keys, those with more by large tiles."""
    out = call.out
    if is_interpreted() and out.dtype == torch.bfloat16:
        # The interpreter cuts float32 off to bfloat16 where a device rounds.
        call.out = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    scale, queries = call.scale, call.queries
    if scale < 0:
        call.scale, call.queries = -scale, -queries  # the kernels know no other sign
    few = _heads(call, 1).few
    most = batch.most_up_to(few)
    if batch.has_more_than(few):
        _launch_many(call, batch, few)
    if most:
        _launch_few(call, batch, most)
    call.scale, call.queries = scale, queries
    if call.out is not out:
        out.copy_(call.out)
        call.out = out


def compute_dtype(call: AttentionCall) -> torch.dtype:
    """Return the dtype of the dot products: that of the tensor cores where keys fit into the queries' dtype."""
    dtype: torch.dtype = call.queries.dtype
    if call.keys.dtype != dtype and call.keys.dtype.itemsize > 1:
        return torch.float32
    if is_interpreted() and dtype == torch.bfloat16:
        return torch.float32  # the interpreter multiplies bfloat16 as if it were integers
    return dtype


def _heads(call: AttentionCall, most: int) -> Heads:
    group = call.queries.shape[1] // call.keys.shape[2]
    sizes = compute_dtype(call).itemsize, call.keys.element_size()
    return Heads(group, call.keys.shape[3], call.values.shape[3], *sizes, most)


def _launch_many(call: AttentionCall, batch: DeviceBatch, few: int) -> None:
    heads = _heads(call, 0)

    def run(config: Config) -> None:
        tiles = batch.total_tokens // (config.tile_m // heads.group) + batch.num_sequences
        grid = (tiles * call.keys.shape[2], 1)
        _attend(call, batch, heads, config, grid, (few + 1, MAX_COUNT), (call.out, call.out), search=True)

    _run_fitting(heads, call, run)


def _launch_few(call: AttentionCall, batch: DeviceBatch, most: int) -> None:
    heads = _heads(call, most)
    longest = batch.longest if call.window is None else min(batch.longest, call.window + most)
    even = batch.num_sequences * call.keys.shape[2]
    if isinstance(call.batch, Batch) and longest:
        even = int(np.minimum(call.batch.seq_lens, longest).sum()) * call.keys.shape[2] // longest

    def run(config: Config) -> None:
        programs, num_heads = batch.num_sequences * call.keys.shape[2], call.queries.shape[1]
        splits = num_splits(even, longest, config, device_of(call.queries.device))
        size = (batch.num_sequences * most, num_heads, splits) if splits > 1 else (0, 0, 0)
        partial = torch.empty((*size, heads.v_head_dim), dtype=torch.float32, device=call.out.device)
        sums = torch.empty((*size, 2), dtype=torch.float32, device=call.out.device)
        _attend(call, batch, heads, config, (programs, splits), (1, most), (partial, sums), search=False)
        if splits > 1:
            _combine(call, batch, heads, partial, sums)

    _run_fitting(heads, call, run)


_refused: set[tuple[Any, ...]] = set()
"""Configurations, of which heads and rules, that had no room on the device after all."""


def _run_fitting(heads: Heads, call: AttentionCall, run: Callable[[Config], None]) -> None:
    """Launch a call with the first configuration that the device has the registers and the shared memory for."""
    device = device_of(call.queries.device)
    rules = (call.causal, call.window is None, call.softcap is None, call.queries.dtype, call.keys.dtype)
    for config in candidates(heads, device):
        key = (device, heads, rules, config)
        if key in _refused:
            continue
        with contextlib.suppress(OutOfResources):
            return run(config)
        _refused.add(key)
    raise bad_argument(
        "queries",
        f"heads that {device.name} has the memory for",
        f"heads of {heads.head_dim} and {heads.v_head_dim} in groups of {heads.group} (backend='reference' takes any)",
    )


def _attend(
    call: AttentionCall,
    batch: DeviceBatch,
    heads: Heads,
    config: Config,
    grid: tuple[int, int],
    served: tuple[int, int],
    partials: tuple[Tensor, Tensor],
    search: bool,
) -> None:
    pool = Memory(call.keys, call.values, call.key_scales, call.value_scales)
    scale_strides = (0, 0, 0) if pool.key_scales is None else pool.key_scales.stride()
    strides = Strides(*pool.key_blocks.stride()[:3], *pool.value_blocks.stride()[:3], *scale_strides)
    tiles = config.tile_m, config.tile_n, heads.tile_d, heads.tile_dv
    _, block_size, kv_heads, _ = pool.key_blocks.shape
    sizes = Sizes(kv_heads, block_size, heads.group, heads.head_dim, heads.v_head_dim, *tiles)
    rules = Rules(
        split=grid[1] > 1,
        search=search,
        causal=call.causal,
        window=call.window is not None,
        softcap=call.softcap is not None,
        sinks=call.sinks is not None,
        scaled=pool.key_scales is not None,
        compute=tl_dtype(compute_dtype(call)),
        precision=_precision(call.queries.device),
    )
    meta: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    with _on(call.queries):
        attend_tiles[grid](
            call.out,
            *partials,
            call.queries,
            pool,
            call.sinks,
            batch.block_tables,
            batch.seq_lens,
            batch.cu_seqlens_q,
            batch.holes,
            batch.num_sequences,
            *served,
            TILES_PER_SPLIT,
            call.scale,
            call.softcap or 0.0,
            call.window or 0,
            batch.block_tables.shape[1],
            *call.queries.stride()[:2],
            *call.out.stride()[:2],
            STRIDES=strides,
            SIZES=sizes,
            RULES=rules,
            **meta,
        )


def _combine(call: AttentionCall, batch: DeviceBatch, heads: Heads, partial: Tensor, sums: Tensor) -> None:
    rows, num_heads, splits, v_head_dim = partial.shape
    with _on(call.queries):
        combine_splits[(rows, num_heads)](
            call.out,
            partial,
            sums,
            call.sinks,
            batch.cu_seqlens_q,
            1,
            heads.most,
            splits,
            *call.out.stride()[:2],
            V_HEAD_DIM=v_head_dim,
            TILE_DV=heads.tile_dv,
            TILE_S=MOST_SPLITS,
            CHUNK=8,
            SINKS=call.sinks is not None,
            enable_fp_fusion=True,
        )


@functools.cache
def _precision(device: torch.device) -> str:
    """Return how float32 is multiplied: by tensor cores, in three parts that add up to nearly all of its digits."""
    return "tf32x3" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8 else "ieee"


def _on(tensor: Tensor) -> Any:
    """Return a context in which kernels go to the tensor's device."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
