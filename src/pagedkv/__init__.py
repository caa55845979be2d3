"""pagedkv: the paged KV cache for LLM inference.

Every public name is loaded when it is first used, so that ``import pagedkv`` is quick and needs neither torch nor a
compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.cache import PagedKvCache
    from pagedkv.control.events import AllBlocksCleared, BlockRemoved, BlockStored, CacheSnapshot
    from pagedkv.control.manager import BlockManager
    from pagedkv.control.plan import BatchPlan
    from pagedkv.control.protocol import EvictionStrategy, StrategyHooks
    from pagedkv.control.strategies import (
        FIFO,
        GDSF,
        LFU,
        LRU,
        S3FIFO,
        SIEVE,
        TTL,
        Adaptive,
        LongestFirst,
        Priority,
        StreamingLLM,
        parse_strategy,
        register_strategy,
    )
    from pagedkv.control.types import BlockId, CacheStats, KvBlock, SeqId, SequenceInfo
    from pagedkv.data.attention import paged_attention
    from pagedkv.data.storage import KvStorage
    from pagedkv.errors import (
        BlockNotFound,
        CorruptedState,
        EngineDead,
        InvalidLogits,
        InvalidOperation,
        MissingExtra,
        ModelConfigError,
        OutOfMemory,
        PagedKvError,
        ReplayFailed,
        RequestRefused,
        SequenceNotFound,
        TraceError,
    )
    from pagedkv.spec import KvCacheSpec, LayerSpec

__version__ = "0.1.0"

__all__ = [
    "Adaptive",
    "AllBlocksCleared",
    "BatchPlan",
    "BlockId",
    "BlockManager",
    "BlockNotFound",
    "BlockRemoved",
    "BlockStored",
    "CacheSnapshot",
    "CacheStats",
    "CorruptedState",
    "EngineDead",
    "EvictionStrategy",
    "FIFO",
    "GDSF",
    "InvalidLogits",
    "InvalidOperation",
    "KvBlock",
    "KvCacheSpec",
    "KvStorage",
    "LFU",
    "LRU",
    "LayerSpec",
    "LongestFirst",
    "MissingExtra",
    "ModelConfigError",
    "OutOfMemory",
    "PagedKvCache",
    "PagedKvError",
    "Priority",
    "ReplayFailed",
    "RequestRefused",
    "S3FIFO",
    "SIEVE",
    "SeqId",
    "SequenceInfo",
    "SequenceNotFound",
    "StrategyHooks",
    "StreamingLLM",
    "TTL",
    "TraceError",
    "paged_attention",
    "parse_strategy",
    "register_strategy",
]

_HOMES = {
    "pagedkv.cache": ("PagedKvCache",),
    "pagedkv.control.events": ("AllBlocksCleared", "BlockRemoved", "BlockStored", "CacheSnapshot"),
    "pagedkv.control.manager": ("BlockManager",),
    "pagedkv.control.plan": ("BatchPlan",),
    "pagedkv.control.protocol": ("EvictionStrategy", "StrategyHooks"),
    "pagedkv.control.strategies": (
        "Adaptive",
        "FIFO",
        "GDSF",
        "LFU",
        "LRU",
        "LongestFirst",
        "Priority",
        "S3FIFO",
        "SIEVE",
        "StreamingLLM",
        "TTL",
        "parse_strategy",
        "register_strategy",
    ),
    "pagedkv.control.types": ("BlockId", "CacheStats", "KvBlock", "SeqId", "SequenceInfo"),
    "pagedkv.data.attention": ("paged_attention",),
    "pagedkv.data.storage": ("KvStorage",),
    "pagedkv.errors": (
        "BlockNotFound",
        "CorruptedState",
        "EngineDead",
        "InvalidLogits",
        "InvalidOperation",
        "MissingExtra",
        "ModelConfigError",
        "OutOfMemory",
        "PagedKvError",
        "ReplayFailed",
        "RequestRefused",
        "SequenceNotFound",
        "TraceError",
    ),
    "pagedkv.spec": ("KvCacheSpec", "LayerSpec"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pagedkv' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOME_OF[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from pagedkv.errors import MissingExtra

        raise MissingExtra("torch", "torch") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
