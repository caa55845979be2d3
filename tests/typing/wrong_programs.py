"""Programs that an engine's author might write, each with what a type checker says of it. Never run."""

from __future__ import annotations

import numpy as np
import torch

from pagedkv import BlockManager, KvCacheSpec, PagedKvCache, paged_attention, register_strategy
from pagedkv.engine import LLM, SamplingParams
from pagedkv.sim import Trace, replay
from pagedkv.tiers import DiskTier, Tier


def names(trace: Trace) -> None:
    BlockManager(8, strategy="lfru")  # E: incompatible type "Literal['lfru']"
    BlockManager(8, on_full="evit")  # E: incompatible type "Literal['evit']"
    PagedKvCache(8, dtype="fp16")  # E: incompatible type "Literal['fp16']"
    PagedKvCache(8, layout="nhd")  # E: incompatible type "Literal['nhd']"
    KvCacheSpec(8, dtype=np.float16)  # E: "KvCacheSpec" has incompatible type "type[
    LLM("model", mode="fast")  # E: incompatible type "Literal['fast']"
    LLM("model", weights="int4")  # E: incompatible type "Literal['int4']"
    replay(trace, 100, "lruu")  # E: incompatible type "Literal['lruu']"
    DiskTier("chats", "50GB", strategy="lru:")  # E: incompatible type "Literal['lru:']"


def sizes() -> None:
    BlockManager(8, 16.0)  # E: incompatible type "float"; expected "int"
    BlockManager("8")  # E: incompatible type "str"; expected "int"
    SamplingParams(temperature="0.7")  # E: incompatible type "str"; expected "float"


def tokens(books: BlockManager) -> None:
    books.allocate(1, "hello")  # E: incompatible type "str"
    books.allocate(1, ["hel", "lo"])  # E: has incompatible type "str"; expected "SupportsIndex"
    books.allocate(1, [1.0, 2.0])  # E: has incompatible type "float"; expected "SupportsIndex"
    floats, mask = np.zeros(3, np.float32), np.ones(3, np.bool_)
    books.allocate(1, floats)  # E: incompatible type "ndarray
    books.append(1, mask)  # E: incompatible type "ndarray
    books.allocate("chat-1", [1])  # E: incompatible type "str"; expected "int"
    books.match_prefix(6)  # E: incompatible type "int"
    books.commit(1, upto=2.0)  # E: incompatible type "float"


def batches(books: BlockManager, cache: PagedKvCache) -> None:
    books.append_batch(1, [5])  # E: incompatible type "int"
    books.append_batch([1], 5)  # E: incompatible type "int"
    books.plan(1)  # E: incompatible type "int"
    plan = books.plan([1])
    print(plan.slots)  # E: "BatchPlan" has no attribute "slots"
    keys = np.zeros((6, 8, 64))
    cache.write(0, keys, torch.zeros(6, 8, 64), plan)  # E: incompatible type "ndarray
    cache.write(0, torch.zeros(6, 8, 64), torch.zeros(6, 8, 64), 1)  # E: incompatible type "int"
    cache.attend(0, torch.zeros(6, 8, 64), plan, backend="tritn")  # E: incompatible type "Literal['tritn']"
    print(cache.attend(0, torch.zeros(6, 8, 64), plan).token_ids)  # E: "Tensor" has no attribute "token_ids"


def attention(queries: torch.Tensor, pool: torch.Tensor) -> None:
    paged_attention(
        queries,
        pool,
        pool,
        block_tables=np.zeros((1, 1)),  # E: incompatible type "ndarray
        seq_lens=3,  # E: incompatible type "int"
        cu_seqlens_q=[0, 1],
        scale=0.1,
    )


async def engine(llm: LLM, tier: Tier) -> None:
    await llm.generate("hello")  # E: Incompatible types in "await"
    llm.generate("hello", {"max_tokens": 3})  # E: incompatible type "dict[str, int]"
    llm.request("hello", salt="a")  # E: Unexpected keyword argument "salt"
    LLM("model", tiers=tier)  # E: incompatible type "Tier"; expected "Sequence[Tier]"
    tier.match("hello")  # E: incompatible type "str"


@register_strategy("half")
class HalfAStrategy:  # E: Value of type variable "Factory"
    def score_blocks(self, blocks: object, now: int) -> int:
        return 0


def half() -> None:
    BlockManager(8, strategy=HalfAStrategy())  # E: incompatible type "HalfAStrategy"
