"""The GPU backend: Triton kernels over device blocks.

Everything that is wrong with a call is found before anything is launched, and nothing here waits for the device, unless
``PAGEDKV_DEBUG=1`` asks to check what is on the device too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall, checked_tensors
from pagedkv.data.gpu_device import is_capturing, is_debugging, require_runnable
from pagedkv.errors import InvalidOperation

if TYPE_CHECKING:
    from pagedkv.data.gpu_plan import DevicePlan

__all__ = ["attend", "attend_plan", "copy_blocks", "require_plan_of", "write_tokens"]


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
    from pagedkv.data.gpu_launch import launch
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
        raise InvalidOperation(f"queries: expected {plan.max_tokens} tokens as the DevicePlan, got {len(queries)}")
    _require_kernels("queries", call)
    from pagedkv.data.gpu_launch import launch

    with torch.no_grad():
        launch(call, plan.batch)
    return call.out


def require_plan_of(plan: Any, num_blocks: int, block_size: int, device: torch.device) -> None:
    """Refuse what is no plan on this device for a pool of this shape; in debug mode look into its buffers too."""
    from pagedkv.data.gpu_plan import DevicePlan

    if not isinstance(plan, DevicePlan):
        raise InvalidOperation(f"plan: expected a DevicePlan, got {type(plan).__name__}")
    if plan.device != device:
        raise InvalidOperation(f"plan: expected a DevicePlan on {device}, got one on {plan.device}")
    if plan.block_size != block_size or plan.num_blocks > num_blocks:
        raise InvalidOperation(
            f"plan: expected one for {num_blocks} blocks of {block_size} tokens, "
            f"got one for {plan.num_blocks} of {plan.block_size}"
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
    """Write checked tokens into their slots; see :func:`pagedkv.data.gpu_move.write_tokens`."""
    require_runnable("keys", keys.device)
    from pagedkv.data import gpu_move

    gpu_move.write_tokens(keys, values, new_keys, new_values, slots, key_scales, value_scales)


def copy_blocks(tensors: tuple[Tensor, ...], pairs: Any) -> None:
    """Copy blocks over all layers; see :func:`pagedkv.data.gpu_move.copy_blocks`."""
    require_runnable("copies", tensors[0].device)
    from pagedkv.data import gpu_move

    gpu_move.copy_blocks(tensors, pairs)


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
