"""Batches for benchmarks/gpu.py and every way there is to attend over them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pagedkv import paged_attention
from pagedkv.data.attention import attend
from pagedkv.data.call import AttentionCall
from pagedkv.data.gpu_flashinfer import csr_arrays
from pagedkv.data.gpu_plan import DevicePlan

BLOCK_SIZE, KV_HEADS, GROUP, HEAD_DIM = 16, 8, 4, 128
DTYPE = torch.bfloat16
SCALE = HEAD_DIM**-0.5
MOST_FLEX_SLOTS = 1 << 17
"""FlexAttention's mask grows with queries times slots."""

Way = Callable[[], Any]


class Batch:
    """Sequences of one length over scattered blocks, and the same keys and values in one piece."""

    def __init__(
        self, count: int, q_len: int, length: int, device: str, dtype: torch.dtype = DTYPE, layout: str = "NHD"
    ) -> None:
        per_sequence = -(-length // BLOCK_SIZE)
        rng = np.random.default_rng(0)
        self.count, self.q_len, self.length, self.layout = count, q_len, length, layout
        self.tables = rng.permutation(count * per_sequence).astype(np.int32).reshape(count, per_sequence)
        shape = (count * per_sequence, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        shape = shape if layout == "NHD" else (shape[0], shape[2], shape[1], shape[3])
        self.keys, self.values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self.queries = torch.randn(count * q_len, KV_HEADS * GROUP, HEAD_DIM, device=device, dtype=dtype)
        self.options: dict[str, Any] = {
            "block_tables": self.tables,
            "seq_lens": np.full(count, length, np.int32),
            "cu_seqlens_q": np.arange(count + 1, dtype=np.int32) * q_len,
            "scale": SCALE,
            "layout": layout,
        }
        self.on_device = torch.from_numpy(self.tables).to(device).long()

    @property
    def key_bytes(self) -> int:
        """Bytes that have to be read at least: every visible key and value once."""
        return 2 * self.count * self.length * KV_HEADS * HEAD_DIM * self.keys.element_size()

    @property
    def flops(self) -> int:
        """Operations of both products, of the pairs that a causal mask leaves."""
        pairs = self.q_len * self.length - self.q_len * (self.q_len - 1) // 2
        return 4 * self.count * pairs * KV_HEADS * GROUP * HEAD_DIM

    def ours(self, backend: str) -> Any:
        return paged_attention(self.queries, self.keys, self.values, **self.options, backend=backend)

    def planned(self) -> Way:
        """Return our attention by a plan that is on the device, as inside a CUDA graph."""
        total = len(self.queries)
        plan = DevicePlan(
            self.count,
            self.tables.shape[1],
            total,
            block_size=BLOCK_SIZE,
            num_blocks=len(self.keys),
            max_query_tokens=self.q_len,
            device=self.queries.device,
        )
        arrays = {name: self.options[name] for name in ("block_tables", "seq_lens", "cu_seqlens_q")}
        nowhere = np.zeros(total, np.int64)
        no_holes = np.zeros((self.count, 2), np.int32)
        plan.load(SimpleNamespace(**arrays, slot_mapping=nowhere, positions=nowhere, holes=no_holes))
        out = torch.zeros_like(self.queries)
        inputs = self.queries, self.keys, self.values, plan.batch
        return lambda: attend(AttentionCall(*inputs, scale=SCALE, layout=self.layout, into=out))

    def graph(self) -> Way:
        """Return the same, captured: the host only replays it."""
        way = self.planned()
        out = way()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            way()

        def replay(reads: Way = way) -> torch.Tensor:  # a graph does not keep the plan that it reads
            graph.replay()
            return out

        return replay

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values ``[count, kv heads, length, dim]``; a copy."""
        pools = (x if self.layout == "NHD" else x.transpose(1, 2) for x in (self.keys, self.values))
        keys, values = (x[self.on_device].flatten(1, 2)[:, : self.length].transpose(1, 2) for x in pools)
        return keys, values

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.gathered()
        return keys.contiguous(), values.contiguous()

    def sdpa(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        queries = self.queries.view(self.count, self.q_len, -1, HEAD_DIM).transpose(1, 2)
        is_causal, mask = self.q_len > 1 and self.q_len == self.length, None
        if 1 < self.q_len < self.length:
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(self.q_len, self.length)
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal, scale=SCALE, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    def flex(self, is_compiled: bool = True) -> Way:
        """Return FlexAttention over the whole pool as one row of slots, masked to each query's own."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        slots = len(self.keys) * BLOCK_SIZE
        device = self.queries.device
        owner = torch.zeros(len(self.keys), dtype=torch.long, device=device)
        place = torch.zeros_like(owner)
        columns = torch.arange(self.tables.shape[1], device=device)
        owner[self.on_device] = torch.arange(self.count, device=device)[:, None]
        place[self.on_device] = columns.expand_as(self.on_device)
        first = self.length - self.q_len

        def sees(b: Any, h: Any, q: Any, slot: Any) -> Any:
            block = slot // BLOCK_SIZE
            position = place[block] * BLOCK_SIZE + slot % BLOCK_SIZE
            return (owner[block] == q // self.q_len) & (position <= first + q % self.q_len)

        mask = create_block_mask(sees, None, None, len(self.queries), slots, device=str(device))
        attention = torch.compile(flex_attention) if is_compiled else flex_attention
        queries = self.queries.transpose(0, 1)[None]
        pools = (x if self.layout == "NHD" else x.transpose(1, 2) for x in (self.keys, self.values))
        keys, values = (x.flatten(0, 1).transpose(0, 1)[None] for x in pools)
        return lambda: attention(queries, keys, values, block_mask=mask, scale=SCALE, enable_gqa=True)[0].transpose(
            0, 1
        )

    def flashinfer(self, kind: str) -> Way:
        """Return FlashInfer's own wrapper for "prefill" or "decode", planned once as for all layers of a step."""
        import flashinfer

        device = self.queries.device
        plan = csr_arrays(self.tables, self.options["seq_lens"], BLOCK_SIZE)
        arrays = [torch.from_numpy(x).to(device) for x in plan]
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        sizes = KV_HEADS * GROUP, KV_HEADS, HEAD_DIM, BLOCK_SIZE
        rules: dict[str, Any] = {"sm_scale": SCALE, "q_data_type": self.queries.dtype, "kv_data_type": self.keys.dtype}
        if kind == "decode":
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, self.layout, use_tensor_cores=True)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, self.layout)
            arrays.insert(0, torch.from_numpy(self.options["cu_seqlens_q"]).to(device))
            rules["causal"] = True
        wrapper.plan(*arrays, *sizes, **rules)
        out = torch.empty_like(self.queries)
        return lambda: wrapper.run(self.queries, (self.keys, self.values), out=out)


def ways_of(batch: Batch, backend: str = "triton") -> dict[str, Callable[[], Way]]:
    """Return what makes each way to attend over a batch that there is here; making one may fail."""
    on_gpu = batch.queries.device.type == "cuda"

    def contiguous() -> Way:
        dense = batch.contiguous()
        return lambda: batch.sdpa(*dense)

    makers: dict[str, Callable[[], Way]] = {
        "pagedkv": lambda: lambda: batch.ours(backend),
        "SDPA, contiguous": contiguous,
        "gather + SDPA": lambda: lambda: batch.sdpa(*batch.contiguous()),
    }
    if on_gpu:
        makers["pagedkv, CUDA graph"] = batch.graph
    if len(batch.keys) * BLOCK_SIZE <= MOST_FLEX_SLOTS:
        makers["FlexAttention, paged mask"] = lambda: batch.flex(is_compiled=on_gpu)
    if on_gpu and find_spec("flashinfer"):
        makers["pagedkv, by FlashInfer"] = lambda: lambda: batch.ours("flashinfer")
        makers["FlashInfer, prefill"] = lambda: batch.flashinfer("prefill")
        if batch.q_len == 1:
            makers["FlashInfer, decode"] = lambda: batch.flashinfer("decode")
    return makers
