"""The CPU backend: Numba kernels over the blocks for decode, matrix products for prefill, per sequence."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall
from pagedkv.data.cpu_kernels import attend_items, plan_items
from pagedkv.data.cpu_prefill import attend_sequence
from pagedkv.data.cpu_shapes import Rules, Shape, Strides, partial_size
from pagedkv.data.threads import num_threads, run_in_threads
from pagedkv.errors import InvalidOperation

__all__ = ["attend"]

FEW_QUERIES = 32
"""Up to this many query tokens of a sequence are served from the blocks in place. With more, gathering the blocks and
multiplying matrices wins: measured on one core over 512 and 4,096 keys, the two are even at 16 queries for 8 query
heads of 32, at 32 to 64 for 12 of 64, and beyond 64 for 32 of 128."""
PARALLEL_BYTES = 1 << 18
"""Keys and values that are worth a second thread."""
_NO_WINDOW = 1 << 40
_LOG2_E = math.log2(math.e)
_BITS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.uint8,
}
"""How a tensor is shown to the kernels, which tell the narrow types apart by it."""
_NO_FLOATS = np.zeros(0, np.float32)
_workspace = threading.local()


def attend(call: AttentionCall, few_queries: int = FEW_QUERIES) -> None:
    """Fill ``call.out``; sequences of up to ``few_queries`` query tokens are served from the blocks in place."""
    if call.queries.device.type != "cpu":
        raise InvalidOperation(f"queries: backend 'cpu' expects a tensor on the CPU, got one on {call.queries.device}")
    shape = _shape(call)
    window = call.window or _NO_WINDOW
    items, first_item, num_positions, num_partials, most_quads = plan_items(
        call.seq_lens, call.cu_seqlens_q, few_queries, window, shape
    )
    if len(items):
        num_bytes = num_positions * shape.num_kv_heads * (shape.head_dim + shape.v_head_dim) * shape.item_bytes
        threads = num_threads() if num_bytes >= PARALLEL_BYTES else 1
        # Few long items are cut by heads as well, which changes no result.
        num_parts = min(shape.num_kv_heads, -(-4 * threads // len(items))) if threads > 1 else 1
        arguments = (
            np.zeros(1 + call.num_sequences, np.int64),
            num_parts,
            items,
            first_item,
            most_quads,
            _scratch(num_partials * partial_size(shape.v_head_dim)),
            _flat(call.queries),
            _flat(call.keys),
            _flat(call.values),
            _NO_FLOATS if call.key_scales is None else _flat(call.key_scales),
            _NO_FLOATS if call.value_scales is None else _flat(call.value_scales),
            _flat(call.out),
            _NO_FLOATS if call.sinks is None else (call.sinks.float() * _LOG2_E).contiguous().numpy(),
            call.block_tables,
            call.seq_lens,
            call.cu_seqlens_q,
            call.holes,
            shape,
            _strides(call),
            _rules(call, window),
        )
        run_in_threads(attend_items, arguments, threads)
    if len(call.queries) > few_queries:
        for i in np.flatnonzero(np.diff(call.cu_seqlens_q) > few_queries):
            attend_sequence(call, int(i))


def _scratch(size: int) -> npt.NDArray[np.float32]:
    """Return this thread's floats, at least ``size`` of them; kept, as fresh memory costs a fault per page."""
    kept: npt.NDArray[np.float32] | None = getattr(_workspace, "floats", None)
    if kept is None or len(kept) < size:
        kept = _workspace.floats = np.empty(size, np.float32)
    return kept


def _shape(call: AttentionCall) -> Shape:
    _, block_size, num_kv_heads, head_dim = call.keys.shape
    group = call.queries.shape[1] // num_kv_heads
    return Shape(block_size, num_kv_heads, group, head_dim, call.values.shape[3], call.keys.element_size())


def _strides(call: AttentionCall) -> Strides:
    return Strides(
        *call.queries.stride()[:2],
        *call.keys.stride()[:3],
        *call.values.stride()[:3],
        *call.out.stride()[:2],
        *((0, 0, 0) if call.key_scales is None else call.key_scales.stride()),
    )


def _rules(call: AttentionCall, window: int) -> Rules:
    if call.softcap is None:
        return Rules(np.float32(call.scale * _LOG2_E), np.float32(0), call.causal, window)
    return Rules(np.float32(call.scale / call.softcap), np.float32(call.softcap * _LOG2_E), call.causal, window)


def _flat(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the memory from the tensor's first element to its last one as one array."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    array: npt.NDArray[Any] = tensor.as_strided((extent,), (1,)).view(_BITS[tensor.dtype]).numpy()
    return array
