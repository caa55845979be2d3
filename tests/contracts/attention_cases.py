"""Ragged batches over a poisoned pool, and what attention over them has to give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pagedkv.data import reference
from pagedkv.data.call import AttentionCall, Batch
from pagedkv.data.quantised import GREATEST, quantised

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# The oracle reads the same quantised numbers, so they add no error of their own.
TOLERANCE |= {dtype: 1e-5 for dtype in GREATEST}


@dataclass
class Case:
    """The arguments of a call. Whatever no sequence owns, or a hole covers, is NaN in the pool, or its scale is."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    options: dict[str, Any]

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values on a device, strides as they are."""
        return self.queries.to(device), _moved(self.keys, device), _moved(self.values, device)

    def options_on(self, device: str) -> dict[str, Any]:
        """Return the options with their tensors on a device."""
        moved = dict(self.options)
        for name in {"sinks", "key_scales", "value_scales"} & moved.keys():
            moved[name] = _moved(moved[name], device)
        return moved

    def call(self) -> AttentionCall:
        """Return the checked call."""
        options = dict(self.options)
        arrays = [options.pop(name, None) for name in ("block_tables", "seq_lens", "cu_seqlens_q", "holes")]
        return AttentionCall(self.queries, self.keys, self.values, Batch(*arrays), **options)

    def expected(self) -> torch.Tensor:
        """Return the oracle's answer in float64."""
        call = self.call()
        call.out = torch.full(call.out.shape, torch.nan, dtype=torch.float64)
        reference.attend(call, torch.float64)
        return call.out


def _moved(pool: torch.Tensor, device: str) -> torch.Tensor:
    """Return the pool on a device as the same view of the same memory: torch would pack it."""
    memory = pool if pool._base is None else pool._base
    return memory.to(device).as_strided(pool.shape, pool.stride(), pool.storage_offset())


@dataclass
class Shape:
    """What a case looks like; ``sequences`` holds (seq_len, q_len, hole_start, hole_len)."""

    sequences: list[tuple[int, int, int, int]]
    block_size: int = 16
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    v_head_dim: int = 32
    dtype: torch.dtype = torch.float32
    query_dtype: torch.dtype | None = None
    layout: str = "NHD"
    sinks: bool = False
    strided: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def make_case(shape: Shape) -> Case:
    """Build the batch: blocks drawn at random, garbage behind each row of the tables."""
    rng = torch.Generator().manual_seed(shape.seed)
    tables, slots = _place(shape)
    num_blocks = sum(len(blocks) for blocks in tables) + 3
    keys = _pool(shape, num_blocks, shape.head_dim)
    values = _pool(shape, num_blocks, shape.v_head_dim)
    scales = [_scales(shape, num_blocks) for _ in range(2)] if shape.dtype in GREATEST else [None, None]
    where = slots // shape.block_size, slots % shape.block_size
    for pool, dim, pool_scales in ((keys, shape.head_dim, scales[0]), (values, shape.v_head_dim, scales[1])):
        fresh = torch.randn(len(slots), shape.num_kv_heads, dim, generator=rng)
        if pool_scales is not None:
            fresh, fresh_scales = quantised("fresh", fresh, shape.dtype)
            _nhd(shape, pool_scales)[where] = fresh_scales
        _nhd(shape, pool)[where] = fresh.to(shape.dtype)

    width = max((len(blocks) for blocks in tables), default=0) + 1
    block_tables = np.full((len(tables), width), 2**31 - 1, np.int32)
    for row, blocks in zip(block_tables, tables, strict=True):
        row[: len(blocks)] = blocks
    num_queries = [q_len for _, q_len, _, _ in shape.sequences]
    num_q_heads = shape.num_kv_heads * shape.group
    queries = torch.randn(sum(num_queries), num_q_heads, shape.head_dim, generator=rng)
    options = {
        "block_tables": block_tables,
        "seq_lens": np.array([seq_len for seq_len, _, _, _ in shape.sequences], np.int32),
        "cu_seqlens_q": np.cumsum([0, *num_queries], dtype=np.int32),
        "holes": np.array([(s, s + n) for _, _, s, n in shape.sequences], np.int32).reshape(-1, 2),
        "scale": shape.head_dim**-0.5,
        "layout": shape.layout,
        **shape.options,
    }
    if shape.dtype in GREATEST:
        options["key_scales"], options["value_scales"] = scales
    if shape.sinks:
        options["sinks"] = torch.randn(num_q_heads, generator=rng)
    plain = torch.float32 if shape.dtype in GREATEST else shape.dtype
    return Case(queries.to(shape.query_dtype or plain), keys, values, options)


def _nhd(shape: Shape, pool: torch.Tensor) -> torch.Tensor:
    return pool if shape.layout == "NHD" else pool.transpose(1, 2)


def _place(shape: Shape) -> tuple[list[np.ndarray], torch.Tensor]:
    """Return the blocks of each sequence and every visible slot of the pool."""
    lengths = [seq_len + hole for seq_len, _, _, hole in shape.sequences]
    counts = [-(-length // shape.block_size) for length in lengths]
    order = np.random.default_rng(shape.seed).permutation(sum(counts) + 3)
    tables = np.split(order[: sum(counts)], np.cumsum(counts)[:-1]) if counts else []
    visible = [np.zeros(0, np.int64)]
    for blocks, length, (_, _, start, hole) in zip(tables, lengths, shape.sequences, strict=True):
        slots = np.concatenate([np.arange(start), np.arange(start + hole, length)])
        visible.append(blocks[slots // shape.block_size] * shape.block_size + slots % shape.block_size)
    return tables, torch.from_numpy(np.concatenate(visible))


def _pool(shape: Shape, num_blocks: int, dim: int) -> torch.Tensor:
    middle = (shape.block_size, shape.num_kv_heads)
    middle = middle if shape.layout == "NHD" else middle[::-1]
    poison = 127 if shape.dtype == torch.int8 else torch.nan
    if not shape.strided:
        return torch.full((num_blocks, *middle, dim), poison, dtype=shape.dtype)
    # One layer of several, in rows wider than a head, as a storage with a common allocation might hold it.
    return torch.full((num_blocks, 3, *middle, dim + 5), poison, dtype=shape.dtype)[:, 1, ..., 2 : dim + 2]


def _scales(shape: Shape, num_blocks: int) -> torch.Tensor:
    middle = (shape.block_size, shape.num_kv_heads)
    middle = middle if shape.layout == "NHD" else middle[::-1]
    return torch.full((num_blocks, 3 if shape.strided else 1, *middle), torch.nan)[:, -1]
