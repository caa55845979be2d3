"""The GPU backend: Triton kernels over device blocks.

Everything that is wrong with a call is found before anything is launched, and nothing here waits for the device, unless
``PAGEDKV_DEBUG=1`` asks to check what is on the device too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall, checked_tensors
from pagedkv.data.gpu_device import (
    MOST_SPLITS,
    TILES_PER_SPLIT,
    Config,
    Heads,
    device_of,
    is_capturing,
    is_debugging,
    is_interpreted,
    num_splits,
    require_runnable,
    tl_dtype,
)
from pagedkv.data.gpu_kernels import attend_tiles, combine_splits
from pagedkv.data.gpu_plan import DeviceBatch
from pagedkv.data.gpu_tuning import run_best
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.spec import MAX_COUNT

if TYPE_CHECKING:
    from pagedkv.data.gpu_plan import DevicePlan


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``; the arrays of the batch are copied to the device once for all layers.

    Raises
    ------
    InvalidOperation
        The tensors are on no CUDA device, the device lacks the dtype, or a CUDA graph is being captured.
    MissingExtra
        Triton is not installed.
    """
    _require_kernels("queries", call)
    pass
    from pagedkv.data.gpu_plan import uploaded

    if len(call.queries):
        launch(call, uploaded(call))


def attend_plan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: DevicePlan,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    layout: str = "NHD",
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Let every query token attend over its own sequence's blocks, by the plan that is in the device's buffers.

    May be captured in a CUDA graph; replayed, it reads the plan that was loaded last.

    Parameters
    ----------
    queries : Tensor [max_tokens, num_q_heads, head_dim]
        Those behind the plan's tokens are ignored.
    keys, values, scale, causal, window, softcap, sinks, layout, key_scales, value_scales
        As in :func:`pagedkv.paged_attention`.
    plan : DevicePlan
    out : Tensor [max_tokens, num_q_heads, v_head_dim], optional
        Left as it is behind the plan's tokens; zeros stand there if it is not given.

    Returns
    -------
    Tensor [max_tokens, num_q_heads, v_head_dim]

    Raises
    ------
    InvalidOperation
        An argument does not fit; the text names it.
    MissingExtra
        Triton is not installed.
    """
    if out is None and isinstance(queries, Tensor) and isinstance(values, Tensor) and queries.dim() == 3:
        out = torch.zeros((*queries.shape[:2], values.shape[-1]), dtype=queries.dtype, device=queries.device)
    call = checked_tensors(
        queries,
        keys,
        values,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        layout=layout,
        out=out,
        key_scales=key_scales,
        value_scales=value_scales,
    )
    require_plan_of(plan, call.keys.shape[0], call.keys.shape[1], queries.device)
    if len(queries) != plan.max_tokens:
        raise bad_argument("queries", f"{plan.max_tokens} tokens as the DevicePlan", f"{len(queries)}")
    _require_kernels("queries", call)
    pass

    with torch.no_grad():
        launch(call, plan.batch)
    return call.out


def require_plan_of(plan: Any, num_blocks: int, block_size: int, device: torch.device) -> None:
    """Refuse what is no plan on this device for a pool of this shape; in debug mode look into its buffers too."""
    from pagedkv.data.gpu_plan import DevicePlan

    if not isinstance(plan, DevicePlan):
        raise bad_argument("plan", "a DevicePlan", f"{type(plan).__name__}")
    if plan.device != device:
        raise bad_argument("plan", f"a DevicePlan on {device}", f"one on {plan.device}")
    if plan.block_size != block_size or plan.num_blocks > num_blocks:
        raise bad_argument(
            "plan",
            f"one for {num_blocks} blocks of {block_size} tokens",
            f"one for {plan.num_blocks} of {plan.block_size}",
        )
    if is_debugging() and not is_capturing(device):
        plan.check_device_arrays()


def write_tokens(
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    slots: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write checked tokens into their slots; see :func:`pagedkv.data.gpu_kernels.write_tokens`."""
    require_runnable("keys", keys.device)
    from pagedkv.data import gpu_kernels

    gpu_kernels.write_tokens(keys, values, new_keys, new_values, slots, key_scales, value_scales)


def copy_blocks(tensors: tuple[Tensor, ...], pairs: Any) -> None:
    """Copy blocks over all layers; see :func:`pagedkv.data.gpu_kernels.copy_blocks`."""
    require_runnable("copies", tensors[0].device)
    from pagedkv.data import gpu_kernels

    gpu_kernels.copy_blocks(tensors, pairs)


def _require_kernels(name: str, call: AttentionCall) -> None:
    """Refuse a device that the kernels cannot run on, and a dtype that the device does not know."""
    device = call.queries.device
    require_runnable(name, device)
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0) and torch.bfloat16 in (call.queries.dtype, call.keys.dtype):
        raise InvalidOperation(f"{name}: bfloat16 needs compute capability 8.0, {device} has {major}.{minor}")
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

    # A tile has 64 rows or so.
    work = 0 if batch.is_static else batch.longest * batch.total_tokens * heads.group // 64
    run_best(heads, call, run, work)


def _launch_few(call: AttentionCall, batch: DeviceBatch, most: int) -> None:
    heads = _heads(call, most)
    longest = batch.longest if call.window is None else min(batch.longest, call.window + most)
    even = batch.num_sequences * call.keys.shape[2]
    if not batch.is_static and longest:
        even = int(np.minimum(call.seq_lens, longest).sum()) * call.keys.shape[2] // longest

    def run(config: Config) -> None:
        programs, num_heads = batch.num_sequences * call.keys.shape[2], call.queries.shape[1]
        splits = num_splits(even, longest, config, heads, device_of(call.queries.device))
        size = (batch.num_sequences * most, num_heads, splits) if splits > 1 else (0, 0, 0)
        partial = torch.empty((*size, heads.v_head_dim), dtype=torch.float32, device=call.out.device)
        sums = torch.empty((*size, 2), dtype=torch.float32, device=call.out.device)
        _attend(call, batch, heads, config, (programs, splits), (1, most), (partial, sums), search=False)
        if splits > 1:
            _combine(call, batch, heads, partial, sums)

    work = 0 if batch.is_static else batch.longest * batch.num_sequences
    run_best(heads, call, run, work)


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
    key_scales, value_scales = call.key_scales, call.value_scales
    meta: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    with _on(call.queries):
        attend_tiles[grid](
            call.out,
            *partials,
            call.queries,
            call.keys,
            call.values,
            key_scales,
            value_scales,
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
            *call.keys.stride()[:3],
            *call.values.stride()[:3],
            *((0, 0, 0) if key_scales is None else key_scales.stride()),
            KV_HEADS=call.keys.shape[2],
            BLOCK_SIZE=call.keys.shape[1],
            GROUP=heads.group,
            HEAD_DIM=heads.head_dim,
            V_HEAD_DIM=heads.v_head_dim,
            TILE_M=config.tile_m,
            TILE_N=config.tile_n,
            TILE_D=heads.tile_d,
            TILE_DV=heads.tile_dv,
            SPLIT=grid[1] > 1,
            SEARCH=search,
            CAUSAL=call.causal,
            WINDOW=call.window is not None,
            SOFTCAP=call.softcap is not None,
            SINKS=call.sinks is not None,
            SCALED=key_scales is not None,
            COMPUTE=tl_dtype(compute_dtype(call)),
            PRECISION=_precision(call.queries.device),
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
