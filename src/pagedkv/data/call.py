"""What an attention call is made of, checked once: every backend can trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.data.batch_arrays import Int32Array, first_fault, int32_array, require_shape
from pagedkv.data.quantised import GREATEST, checked_scales
from pagedkv.errors import InvalidOperation
from pagedkv.spec import MAX_COUNT, require_int

__all__ = ["AttentionCall", "checked_call", "checked_tensors", "first_fault"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_POOL_DTYPES = (*_DTYPES, *GREATEST)
_LAYOUTS = ("NHD", "HND")


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One checked call of ``paged_attention``; a backend fills ``out``.

    The same names and meanings as there, made uniform: ``keys`` and ``values`` are always shown as
    ``[num_blocks, block_size, num_kv_heads, dim]`` whatever their layout, the arrays are C-contiguous int32 NumPy
    arrays, ``holes`` is always an array, no tensor carries a gradient, and nothing that a backend reads through
    the tables lies outside of the pool.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Int32Array
    seq_lens: Int32Array
    cu_seqlens_q: Int32Array
    holes: Int32Array
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    out: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences the batch has."""
        return len(self.seq_lens)


def checked_call(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    block_tables: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    holes: Any,
    layout: str,
    out: Tensor | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> AttentionCall:
    """Return the call, or raise ``InvalidOperation`` that names the argument, what was expected and what came."""
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
    num_blocks, block_size, _, _ = call.keys.shape
    tables = int32_array("block_tables", block_tables, 2)
    lens = int32_array("seq_lens", seq_lens, 1)
    cu_seqlens = int32_array("cu_seqlens_q", cu_seqlens_q, 1)
    count = len(lens)
    hole_rows = np.zeros((count, 2), np.int32) if holes is None else int32_array("holes", holes, 2)
    require_shape("block_tables", tables, (count, tables.shape[1]), "[n, max_blocks]")
    require_shape("cu_seqlens_q", cu_seqlens, (count + 1,), "[n + 1]")
    require_shape("holes", hole_rows, (count, 2), "[n, 2]")
    fault = first_fault(tables, lens, cu_seqlens, hole_rows, block_size, num_blocks, call.queries.shape[0])
    if fault:
        raise InvalidOperation(fault)
    call.block_tables, call.seq_lens, call.cu_seqlens_q, call.holes = tables, lens, cu_seqlens, hole_rows
    return call


_NO_TABLES = np.zeros((0, 1), np.int32)
_NO_LENS = np.zeros(0, np.int32)
_NO_CUTS = np.zeros(1, np.int32)
_NO_HOLES = np.zeros((0, 2), np.int32)


def checked_tensors(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    layout: str,
    out: Tensor | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> AttentionCall:
    """Return a call of no sequences yet, all of it checked but the arrays of the batch."""
    if layout not in _LAYOUTS:
        raise InvalidOperation(f"layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}")
    keys, values = _checked_pool(queries, keys, values, layout)
    scales = checked_scales(keys, values, key_scales, value_scales, layout)
    queries = queries.detach() if queries.requires_grad else queries
    return AttentionCall(
        queries,
        keys,
        values,
        _NO_TABLES,
        _NO_LENS,
        _NO_CUTS,
        _NO_HOLES,
        _positive_or_finite("scale", scale, positive=False),
        _checked_flag("causal", causal),
        None if window is None else require_int("window", window, 1, MAX_COUNT),
        None if softcap is None else _positive_or_finite("softcap", softcap, positive=True),
        None if sinks is None else _checked_sinks(sinks, queries),
        _checked_out(out, queries, values.shape[3]),
        *scales,
    )


def _checked_pool(queries: Tensor, keys: Tensor, values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return keys and values as ``[num_blocks, block_size, num_kv_heads, dim]`` views without gradients."""
    _require_tensor("queries", queries, 3, "[total_tokens, num_q_heads, head_dim]")
    middle = "block_size, num_kv_heads" if layout == "NHD" else "num_kv_heads, block_size"
    shape = f"[num_blocks, {middle}, dim]"
    for name, tensor in (("keys", keys), ("values", values)):
        _require_tensor(name, tensor, 4, shape, _POOL_DTYPES)
        if tensor.device != queries.device:
            raise InvalidOperation(f"{name}: expected a tensor on {queries.device} as queries, got {tensor.device}")
    if values.shape[:3] != keys.shape[:3]:
        raise InvalidOperation(f"values: expected shape {[*keys.shape[:3], 'v_head_dim']}, got {list(values.shape)}")
    if values.dtype != keys.dtype:
        raise InvalidOperation(f"values: expected {keys.dtype} as keys, got {values.dtype}")
    if layout == "HND":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    _, _, num_kv_heads, head_dim = keys.shape
    _, num_q_heads, q_head_dim = queries.shape
    if q_head_dim != head_dim:
        raise InvalidOperation(f"queries: expected head_dim {head_dim} as keys, got {q_head_dim}")
    if num_q_heads == 0 or num_q_heads % num_kv_heads:
        raise InvalidOperation(f"queries: expected a multiple of {num_kv_heads} kv heads, got {num_q_heads} heads")
    return (keys.detach(), values.detach()) if keys.requires_grad or values.requires_grad else (keys, values)


def _require_tensor(
    name: str, tensor: Tensor, dims: int, shape: str, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidOperation(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != dims:
        raise InvalidOperation(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        raise InvalidOperation(f"{name}: expected {', '.join(names[:-1])} or {names[-1]}, got {tensor.dtype}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise InvalidOperation(f"{name}: expected a contiguous last dimension, got stride {tensor.stride(-1)}")
    if 0 in tensor.shape[1:]:
        raise InvalidOperation(f"{name}: expected nothing empty but the first dimension, got {list(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InvalidOperation(
            f"{name}: expected no gradients, got a tensor that requires grad (detach it, or use torch.no_grad())"
        )


def _positive_or_finite(name: str, value: float, *, positive: bool) -> float:
    words = "a positive finite number" if positive else "a finite number"
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidOperation(f"{name}: expected {words}, got {value!r}") from None
    if not math.isfinite(number) or (positive and number <= 0):
        raise InvalidOperation(f"{name}: expected {words}, got {value!r}")
    return number


def _checked_flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidOperation(f"{name}: expected a bool, got {value!r}")
    return bool(value)


def _checked_sinks(sinks: Tensor, queries: Tensor) -> Tensor:
    heads = queries.shape[1]
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        kind = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise InvalidOperation(f"sinks: expected a floating torch.Tensor, got {kind}")
    if sinks.shape != (heads,):
        raise InvalidOperation(f"sinks: expected shape [num_q_heads] = [{heads}], got {list(sinks.shape)}")
    if sinks.device != queries.device:
        raise InvalidOperation(f"sinks: expected a tensor on {queries.device} as queries, got {sinks.device}")
    if sinks.requires_grad and torch.is_grad_enabled():
        raise InvalidOperation("sinks: expected no gradients, got a tensor that requires grad (detach it)")
    return sinks.detach()


def _checked_out(out: Tensor | None, queries: Tensor, v_head_dim: int) -> Tensor:
    shape = (*queries.shape[:2], v_head_dim)
    if out is None:
        return torch.empty(shape, dtype=queries.dtype, device=queries.device)
    _require_tensor("out", out, 3, "[total_tokens, num_q_heads, v_head_dim]")
    if out.shape != shape or out.dtype != queries.dtype or out.device != queries.device:
        raise InvalidOperation(
            f"out: expected {queries.dtype} {list(shape)} on {queries.device}, "
            f"got {out.dtype} {list(out.shape)} on {out.device}"
        )
    return out.detach()
