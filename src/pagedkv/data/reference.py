"""Reference of paged attention, in plain torch: slow and readable, the oracle of every kernel test.

One sequence after the other, its visible keys and values gathered in order, the whole score matrix at once, as in
"Attention Is All You Need" (Vaswani et al., 2017), section 3.2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pagedkv.data.call import AttentionCall


def attend(call: AttentionCall, dtype: torch.dtype = torch.float32) -> None:
    """Fill ``call.out``, computing in ``dtype`` (float32 or float64)."""
    cuts = call.host_batch.cu_seqlens_q
    for i in range(len(cuts) - 1):
        first, last = int(cuts[i]), int(cuts[i + 1])
        call.out[first:last] = _attend_sequence(call, i, call.queries[first:last].to(dtype)).to(call.out.dtype)


def _attend_sequence(call: AttentionCall, i: int, queries: Tensor) -> Tensor:
    """Return ``[q_len, num_q_heads, v_head_dim]`` of one sequence."""
    blocks, offsets = _visible_slots(call, i)
    num_kv_heads = call.keys.shape[2]
    group = queries.shape[1] // num_kv_heads
    keys = call.keys[blocks, offsets].to(queries.dtype)
    values = call.values[blocks, offsets].to(queries.dtype)
    if call.key_scales is not None and call.value_scales is not None:
        keys *= call.key_scales[blocks, offsets, :, None]
        values *= call.value_scales[blocks, offsets, :, None]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)

    scores = torch.einsum("qhd,khd->hqk", queries, keys) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = _mask(call, len(queries), len(keys), queries.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.to(queries.dtype)[:, None, None].expand(-1, len(queries), 1)
        scores = torch.cat([scores, sinks], dim=2)
    weights = torch.softmax(scores, dim=2).masked_fill(~seen.any(dim=1)[:, None], 0.0)  # -inf alone would give NaN
    return torch.einsum("hqk,khd->qhd", weights[:, :, : len(keys)], values)


def _visible_slots(call: AttentionCall, i: int) -> tuple[Tensor, Tensor]:
    """Return block ids and offsets of the sequence's visible tokens, in order of their positions."""
    device, batch = call.keys.device, call.host_batch
    positions = torch.arange(int(batch.seq_lens[i]), device=device)
    start, end = (int(x) for x in batch.holes[i])
    slots = torch.where(positions < start, positions, positions + (end - start))
    block_size = call.keys.shape[1]
    table = torch.as_tensor(batch.block_tables[i], device=device)
    return table[slots // block_size], slots % block_size


def _mask(call: AttentionCall, q_len: int, seq_len: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, ``[q_len, seq_len]``."""
    query_positions = torch.arange(seq_len - q_len, seq_len, device=device)[:, None]
    key_positions = torch.arange(seq_len, device=device)[None, :]
    seen = torch.ones(q_len, seq_len, dtype=torch.bool, device=device)
    if call.causal:
        seen &= key_positions <= query_positions
    if call.window is not None:
        seen &= query_positions - key_positions < call.window
    return seen
