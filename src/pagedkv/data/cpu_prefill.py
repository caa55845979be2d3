"""Attention of many queries over a sequence's keys: its blocks are gathered once, and matrix products do the rest.

Where torch's fused attention knows the case it is called; soft-capped scores and sink logits it does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pagedkv.data.call import AttentionCall
from pagedkv.data.quantised import dequantised

__all__ = ["attend_sequence"]

MASKED_QUERIES = 512
"""Queries that share a mask: at 32k keys it takes 64 MB in float32."""
SCORES = 1 << 24
"""Scores that are held at once where torch has no fused attention, 64 MB."""
SMALLEST_FUSED_SCALE = torch.finfo(torch.float32).tiny


def attend_sequence(call: AttentionCall, i: int) -> None:
    """Fill the rows of sequence ``i``."""
    first, last = int(call.cu_seqlens_q[i]), int(call.cu_seqlens_q[i + 1])
    q_len, seq_len = last - first, int(call.seq_lens[i])
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
    block_size, seq_len = pool.shape[1], int(call.seq_lens[i])
    start, end = (int(x) for x in call.holes[i])
    runs = [(oldest, min(start, seq_len)), (max(oldest, start) + end - start, seq_len + end - start)]
    parts = []
    for low, high in runs:
        if low < high:
            blocks = torch.from_numpy(call.block_tables[i, low // block_size : -(-high // block_size)])
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
