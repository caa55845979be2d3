"""CPU backend of attention: what the kernels are called with, and the threads that they run in."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall, Batch
from pagedkv.data.cpu_kernels import Bases, Rows, attend_items
from pagedkv.data.cpu_plan import Plan, Rules, Shape, partial_size, plan_items
from pagedkv.data.cpu_tiles import Strides
from pagedkv.data.simd_llvm import has_bfloat16_products
from pagedkv.data.team import num_threads, run_in_threads
from pagedkv.errors import InvalidOperation

PARALLEL_BYTES = 1 << 18
"""Keys and values that are worth a second thread."""
NO_WINDOW = 1 << 40
LOG2_E = math.log2(math.e)
_BITS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.int8: torch.int8,
    torch.float8_e4m3fn: torch.uint8,
}
"""How a tensor is shown to the kernels, which tell the narrow types apart by it."""
_AT_ONCE = Bases(0, 0, 0, 0, 0, 0)
_NO_FLOATS, _NO_BFLOATS = np.zeros(0, np.float32), np.zeros(0, np.uint16)
_workspace = threading.local()


def attend(call: AttentionCall) -> None:
    """Fill ``call.out``."""
    if call.queries.device.type != "cpu":
        raise InvalidOperation(
            f"queries: backend 'cpu': expected a tensor on the CPU, got one on {call.queries.device}"
        )
    batch, shape = call.host_batch, _shape(call)
    window = call.window or NO_WINDOW
    rules = _rules(call, window)
    plan = _planned(batch, rules, shape)
    if len(plan.items):
        num_bytes = plan.num_positions * shape.num_kv_heads * (shape.head_dim + shape.v_head_dim) * shape.item_bytes
        threads = num_threads() if num_bytes >= PARALLEL_BYTES else 1
        # Few long items are cut by heads as well, which changes no result.
        num_parts = min(shape.num_kv_heads, -(-4 * threads // len(plan.items))) if threads > 1 else 1
        arguments = (
            np.zeros(plan.num_counters, np.int64),
            num_parts,
            plan,
            _scratch(plan.num_partials * partial_size(shape.v_head_dim)),
            rows_of(flat_bits(call.queries)),
            flat_bits(call.keys),
            flat_bits(call.values),
            None if call.key_scales is None else flat_bits(call.key_scales),
            None if call.value_scales is None else flat_bits(call.value_scales),
            rows_of(flat_bits(call.out)),
            _multiplied(call),
            _NO_FLOATS if call.sinks is None else (call.sinks.float() * LOG2_E).contiguous().numpy(),
            batch.block_tables,
            batch.holes,
            _AT_ONCE,
            shape,
            _strides(call),
            rules,
        )
        run_in_threads(attend_items, arguments, threads)


def rows_of(bits: npt.NDArray[Any]) -> Rows:
    """Return an array as what attention reads or writes."""
    return Rows(bits, _NO_BFLOATS) if bits.dtype == np.float32 else Rows(_NO_FLOATS, bits)


def _multiplied(call: AttentionCall) -> npt.NDArray[Any]:
    """Return an array of what is multiplied: bfloat16 where all are, and the processor multiplies it."""
    dtypes = {each.dtype for each in (call.queries, call.keys, call.values, call.out)}
    return _NO_BFLOATS if dtypes == {torch.bfloat16} and has_bfloat16_products() else _NO_FLOATS


def _planned(batch: Batch, rules: Rules, shape: Shape) -> Plan:
    """Return the batch's plan, made once for all layers that are alike."""
    kind = rules.causal, rules.window, shape
    plan: Plan | None = batch.plans.get(kind)
    if plan is None:
        plan = batch.plans[kind] = plan_items(*batch.arrays, rules, shape)
    return plan


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
        return Rules(np.float32(call.scale * LOG2_E), np.float32(0), call.causal, window)
    return Rules(np.float32(call.scale / call.softcap), np.float32(call.softcap * LOG2_E), call.causal, window)


def flat_bits(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the memory from the tensor's first element to its last one as one array."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    array: npt.NDArray[Any] = tensor.as_strided((extent,), (1,)).view(_BITS[tensor.dtype]).numpy()
    return array
