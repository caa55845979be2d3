"""What a type checker must let pass. Never run."""

from __future__ import annotations

import numpy as np
import torch

from pagedkv import LFU, BlockManager, PagedKvCache, Priority, paged_attention, parse_strategy, register_strategy
from pagedkv.control.protocol import Scores
from pagedkv.control.types import BlockView, SequenceView
from pagedkv.tiers import DiskTier, HostTier, Tier


@register_strategy("by_length")
class ByLength:
    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        return sequences.num_tokens

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        return blocks.last_access


def books() -> None:
    for manager in (
        BlockManager(8, strategy="s3fifo", on_full="evict"),
        BlockManager(8, strategy=Priority(3)),
        BlockManager(8, strategy=ByLength()),
        BlockManager(8, strategy=parse_strategy("priority:3")),
    ):
        manager.allocate(1, 12)
        manager.allocate(2, [1, 2, 3])
        manager.allocate(3, range(9), cache_salt="a", reuse=False)
        manager.allocate(4, np.arange(9, dtype=np.int32))
        manager.append(4, torch.arange(9))
        manager.append_batch([1, 2], [5, 6])
        manager.append_batch(np.array([1, 2]), [[5], [6, 7]])
        manager.append_batch((1, 2), np.zeros((2, 3), np.int64))
        plan = manager.append_batch([1, 2], counts=[1, 2])
        manager.commit(plan, upto=[3, 4])
        manager.commit(1)
        manager.commit([1, 2], upto=3)
        manager.plan([1, 2], num_query_tokens=1)


def tensors(cache: PagedKvCache, queries: torch.Tensor) -> torch.Tensor:
    PagedKvCache(8, dtype=torch.bfloat16, device=torch.device("cpu"), strategy=LFU())
    plan = cache.plan([1])
    cache.write(0, queries, queries, plan)
    cache.attend(0, queries, plan, window=4)
    return paged_attention(
        queries,
        cache.storage.keys(0),
        cache.storage.values(0),
        block_tables=plan.block_tables,
        seq_lens=plan.seq_lens,
        cu_seqlens_q=plan.cu_seqlens_q,
        scale=0.1,
    )


def tiers() -> list[Tier]:
    return [HostTier("1GB"), DiskTier("chats", 10**9, strategy=ByLength())]
