"""The CPU backend: Numba kernels over the blocks for decode, matrix products for prefill, per sequence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.arguments import AttentionCall
from pagedkv.data.cpu_decode import Rules, Shape, Strides, attend_items, partial_size, plan_items
from pagedkv.data.cpu_prefill import attend_sequence
from pagedkv.data.threads import num_threads, run_in_threads

__all__ = ["attend"]

MANY_QUERIES = 32
"""From this many query tokens of a sequence on, gathering its blocks and multiplying matrices wins."""
PARALLEL_BYTES = 1 << 18
"""Keys and values that are worth a second thread."""
_LOG2_E = math.log2(math.e)
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""How a tensor is shown to the kernels, which tell the half-width types apart by it."""


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``."""
    by_products = np.diff(call.cu_seqlens_q) >= MANY_QUERIES
    if not by_products.all():
        _attend_by_blocks(call, ~by_products)
    for i in np.flatnonzero(by_products):
        attend_sequence(call, int(i))


def _attend_by_blocks(call: AttentionCall, chosen: npt.NDArray[np.bool_]) -> None:
    """Fill the rows of the chosen sequences."""
    shape, strides = _shape(call), _strides(call)
    window = call.window if call.window is not None else int(call.seq_lens.max()) + 1
    items, first_item, num_partials, most_quads = plan_items(chosen, call.seq_lens, call.cu_seqlens_q, window, shape)
    if not len(items):
        return
    threads = num_threads()
    positions = int((items[:, 2] - items[:, 1]).sum())
    num_bytes = positions * shape.num_kv_heads * (shape.head_dim + shape.v_head_dim) * shape.item_bytes
    threads = threads if num_bytes >= PARALLEL_BYTES else 1
    # Few long items are cut by heads as well, which changes no result.
    num_parts = min(shape.num_kv_heads, -(-4 * threads // len(items))) if threads > 1 else 1
    sinks = np.zeros(0, np.float32) if call.sinks is None else (call.sinks.float() * _LOG2_E).contiguous().numpy()
    arguments = (
        np.zeros(1 + call.num_sequences, np.int64),
        num_parts,
        items,
        first_item,
        most_quads,
        np.empty(num_partials * partial_size(shape.v_head_dim), np.float32),
        _flat(call.queries),
        _flat(call.keys),
        _flat(call.values),
        _flat(call.out),
        sinks,
        call.block_tables,
        call.seq_lens,
        call.cu_seqlens_q,
        call.holes,
        shape,
        strides,
        _rules(call, window),
    )
    run_in_threads(attend_items, arguments, threads)


def _shape(call: AttentionCall) -> Shape:
    _, block_size, num_kv_heads, head_dim = call.keys.shape
    group = call.queries.shape[1] // num_kv_heads
    return Shape(block_size, num_kv_heads, group, head_dim, call.values.shape[3], call.keys.element_size())


def _strides(call: AttentionCall) -> Strides:
    return Strides(
        *call.queries.stride()[:2], *call.keys.stride()[:3], *call.values.stride()[:3], *call.out.stride()[:2]
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
