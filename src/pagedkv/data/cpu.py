"""CPU backend of attention: Numba kernels over the blocks for decode, matrix products for prefill."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pagedkv.data.call import AttentionCall
from pagedkv.data.cpu_kernels import Bases, Strides, attend_items
from pagedkv.data.cpu_plan import Rules, Shape, partial_size, plan_items
from pagedkv.data.quantised import dequantised
from pagedkv.data.team import num_threads, run_in_threads
from pagedkv.errors import InvalidOperation
from pagedkv.spec import MAX_COUNT

FEW_QUERIES = 32
"""Up to this many query tokens of a sequence are served from the blocks in place. With more, gathering the blocks and
multiplying matrices wins: measured on one core over 512 and 4,096 keys, the two are even at 16 queries for 8 query
heads of 32, at 32 to 64 for 12 of 64, and beyond 64 for 32 of 128."""
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
_NO_FLOATS = np.zeros(0, np.float32)
_workspace = threading.local()


def attend(call: AttentionCall, few_queries: int = FEW_QUERIES) -> None:
    """Fill ``call.out``; sequences of up to ``few_queries`` query tokens are served from the blocks in place."""
    if call.queries.device.type != "cpu":
        raise InvalidOperation(
            f"queries: backend 'cpu': expected a tensor on the CPU, got one on {call.queries.device}"
        )
    batch, shape = call.host_batch, _shape(call)
    window = call.window or NO_WINDOW
    rules = _rules(call, window)
    plan = plan_items(*batch.arrays, few_queries, rules, shape)
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
            flat_bits(call.queries),
            flat_bits(call.keys),
            flat_bits(call.values),
            None if call.key_scales is None else flat_bits(call.key_scales),
            None if call.value_scales is None else flat_bits(call.value_scales),
            flat_bits(call.out),
            _NO_FLOATS if call.sinks is None else (call.sinks.float() * LOG2_E).contiguous().numpy(),
            batch.block_tables,
            batch.holes,
            _AT_ONCE,
            shape,
            _strides(call),
            rules,
        )
        run_in_threads(attend_items, arguments, threads)
    if len(call.queries) > few_queries:
        for i in np.flatnonzero(np.diff(batch.cu_seqlens_q) > few_queries):
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
        return Rules(np.float32(call.scale * LOG2_E), np.float32(0), call.causal, window)
    return Rules(np.float32(call.scale / call.softcap), np.float32(call.softcap * LOG2_E), call.causal, window)


def flat_bits(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the memory from the tensor's first element to its last one as one array."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    array: npt.NDArray[Any] = tensor.as_strided((extent,), (1,)).view(_BITS[tensor.dtype]).numpy()
    return array


# Prefill: the blocks of a sequence are gathered once, and matrix products do the rest.
#
# Torch's fused attention is called for all that it can do; it has no soft-capped scores and no sink logits.

MASKED_QUERIES = 512
"""Queries that share a mask: at 32k keys it takes 64 MB in float32."""
SCORES = 1 << 24
"""Scores that are held at once where torch has no fused attention, 64 MB."""
SMALLEST_FUSED_SCALE = torch.finfo(torch.float32).tiny


def attend_sequence(call: AttentionCall, i: int) -> None:
    """Fill the rows of sequence ``i``."""
    batch = call.host_batch
    first, last = int(batch.cu_seqlens_q[i]), int(batch.cu_seqlens_q[i + 1])
    q_len, seq_len = last - first, int(batch.seq_lens[i])
    window = call.window or seq_len
    oldest = max(0, seq_len - q_len - window + 1)
    # torch multiplies bfloat16 faster than float32, float16 slower. Quantised keys times their scales would be rounded.
    is_bfloat16 = call.queries.dtype == call.keys.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    keys = _gather(call, call.keys, call.key_scales, i, oldest).to(dtype)
    values = _gather(call, call.values, call.value_scales, i, oldest).to(dtype)
    queries = call.queries[first:last].to(dtype)
    # With a scale that is not positive in float32, torch's own masking gives NaN.
    fused = call.softcap is None and call.sinks is None and call.scale >= SMALLEST_FUSED_SCALE
    # Positions from here on are counted from the oldest visible one.
    seq_len -= oldest
    step = _queries_at_once(call, q_len, seq_len, fused)
    for begin in range(0, q_len, step):
        end = min(q_len, begin + step)
        position = seq_len - q_len + begin
        low = max(0, position - window + 1)
        high = position + end - begin if call.causal else seq_len
        # torch makes the mask of a whole causal prompt itself, faster.
        whole = fused and call.causal and end - begin == high - low <= window
        hidden = None if whole else _hidden(call, end - begin, position - low, high - low)
        attention = _fused if fused else _products
        result = attention(call, queries[begin:end], keys[:, low:high], values[:, low:high], hidden)
        call.out[first + begin : first + end] = result


def _gather(call: AttentionCall, pool: Tensor, scales: Tensor | None, i: int, oldest: int) -> Tensor:
    """Return ``[num_kv_heads, seq_len - oldest, dim]``: what the sequence sees from position ``oldest`` on."""
    batch, block_size = call.host_batch, pool.shape[1]
    seq_len = int(batch.seq_lens[i])
    start, end = (int(x) for x in batch.holes[i])
    runs = [(oldest, min(start, seq_len)), (max(oldest, start) + end - start, seq_len + end - start)]
    parts = []
    for low, high in runs:
        if low < high:
            blocks = torch.from_numpy(batch.block_tables[i, low // block_size : -(-high // block_size)])
            skipped = low % block_size
            factors = None if scales is None else scales.index_select(0, blocks)
            tokens = dequantised(pool.index_select(0, blocks), factors).flatten(0, 1)
            parts.append(tokens[skipped : skipped + high - low])
    # In one piece per head, products run a little faster than over a strided view.
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1).contiguous()


def _queries_at_once(call: AttentionCall, q_len: int, seq_len: int, fused: bool) -> int:
    if not fused:
        return max(1, SCORES // (call.queries.shape[1] * seq_len))
    needs_mask = (call.causal and q_len < seq_len) or (call.window is not None and call.window < seq_len)
    return MASKED_QUERIES if needs_mask else q_len


def _hidden(call: AttentionCall, q_len: int, position: int, seq_len: int) -> Tensor | None:
    """Return which keys each query does not see, ``[q_len, seq_len]``; the first query is at ``position``."""
    window = call.window if call.window is not None and call.window < position + q_len else None
    if not call.causal and window is None:
        return None
    queries = torch.arange(position, position + q_len, dtype=torch.int32)
    distances = queries[:, None] - torch.arange(seq_len, dtype=torch.int32)
    hidden = distances < 0 if call.causal else torch.zeros_like(distances, dtype=torch.bool)
    return hidden if window is None else hidden | (distances >= window)


def _fused(call: AttentionCall, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Return ``[q_len, num_q_heads, v_head_dim]`` from torch's fused attention; keys and values are by head."""
    head_dim, v_head_dim = keys.shape[2], values.shape[2]
    width = max(head_dim, v_head_dim)  # it is fused only where keys and values are of one size
    queries, keys = (functional.pad(x, (0, width - head_dim)) if width > head_dim else x for x in (queries, keys))
    values = functional.pad(values, (0, width - v_head_dim)) if width > v_head_dim else values
    mask = None
    if hidden is not None:
        mask = torch.zeros(hidden.shape, dtype=queries.dtype).masked_fill_(hidden, -torch.inf)
    result = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=call.causal and hidden is None,
        scale=call.scale,
        enable_gqa=queries.shape[1] != keys.shape[0],
    )
    return result[0].transpose(0, 1)[..., :v_head_dim]


def _products(call: AttentionCall, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Return ``[q_len, num_q_heads, v_head_dim]`` in float32 from two matrix products, with soft-cap and sinks."""
    (q_len, num_q_heads, head_dim), (num_kv_heads, seq_len, v_head_dim) = queries.shape, values.shape
    group = num_q_heads // num_kv_heads
    rows = (queries.float() * call.scale).view(q_len, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    scores = rows.reshape(num_kv_heads, group * q_len, head_dim) @ keys.float().transpose(1, 2)
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    by_query = scores.view(num_kv_heads, group, q_len, seq_len)
    if hidden is not None:
        by_query.masked_fill_(hidden, -torch.inf)
    top = by_query.amax(dim=3, keepdim=True)
    if call.sinks is not None:
        sinks = call.sinks.float().view(num_kv_heads, group, 1, 1)
        top = torch.maximum(top, sinks)
    total = by_query.sub_(top).exp_().sum(dim=3, keepdim=True)
    if call.sinks is not None:
        total += torch.exp(sinks - top)
    result = (scores @ values.float()).view(num_kv_heads, group, q_len, v_head_dim) / total
    return result.permute(2, 0, 1, 3).reshape(q_len, num_q_heads, v_head_dim)


# Batch-invariant attention: a result depends on a query and what it sees alone, to the last bit.
#
# Torch's matrix products change their order of additions with the number of rows, the kernels do not.


def attend_batch_invariant(call: AttentionCall) -> None:
    """Fill ``call.out``."""
    attend(call, few_queries=MAX_COUNT)
