"""pagedkv: the paged KV cache for LLM inference.

Every public name is loaded when it is first used, so that ``import pagedkv`` is quick and needs neither torch nor a
compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.cache import PagedKvCache as PagedKvCache
    from pagedkv.control.events import AllBlocksCleared as AllBlocksCleared
    from pagedkv.control.events import BlockRemoved as BlockRemoved
    from pagedkv.control.events import BlockStored as BlockStored
    from pagedkv.control.events import CacheSnapshot as CacheSnapshot
    from pagedkv.control.manager import BlockManager as BlockManager
    from pagedkv.control.plan import BatchPlan as BatchPlan
    from pagedkv.control.protocol import EvictionStrategy as EvictionStrategy
    from pagedkv.control.protocol import StrategyHooks as StrategyHooks
    from pagedkv.control.strategies import FIFO as FIFO
    from pagedkv.control.strategies import GDSF as GDSF
    from pagedkv.control.strategies import LFU as LFU
    from pagedkv.control.strategies import LRU as LRU
    from pagedkv.control.strategies import S3FIFO as S3FIFO
    from pagedkv.control.strategies import SIEVE as SIEVE
    from pagedkv.control.strategies import TTL as TTL
    from pagedkv.control.strategies import Adaptive as Adaptive
    from pagedkv.control.strategies import LongestFirst as LongestFirst
    from pagedkv.control.strategies import Priority as Priority
    from pagedkv.control.strategies import StreamingLLM as StreamingLLM
    from pagedkv.control.strategies import parse_strategy as parse_strategy
    from pagedkv.control.strategies import register_strategy as register_strategy
    from pagedkv.control.types import BlockId as BlockId
    from pagedkv.control.types import CacheStats as CacheStats
    from pagedkv.control.types import KvBlock as KvBlock
    from pagedkv.control.types import SeqId as SeqId
    from pagedkv.control.types import SequenceInfo as SequenceInfo
    from pagedkv.data.attention import paged_attention as paged_attention
    from pagedkv.data.storage import KvStorage as KvStorage
    from pagedkv.errors import BlockNotFound as BlockNotFound
    from pagedkv.errors import CorruptedState as CorruptedState
    from pagedkv.errors import EngineDead as EngineDead
    from pagedkv.errors import InvalidLogits as InvalidLogits
    from pagedkv.errors import InvalidOperation as InvalidOperation
    from pagedkv.errors import MissingExtra as MissingExtra
    from pagedkv.errors import ModelConfigError as ModelConfigError
    from pagedkv.errors import OutOfMemory as OutOfMemory
    from pagedkv.errors import PagedKvError as PagedKvError
    from pagedkv.errors import ReplayFailed as ReplayFailed
    from pagedkv.errors import RequestRefused as RequestRefused
    from pagedkv.errors import SequenceNotFound as SequenceNotFound
    from pagedkv.errors import TierError as TierError
    from pagedkv.errors import TraceError as TraceError
    from pagedkv.spec import KvCacheSpec as KvCacheSpec
    from pagedkv.spec import LayerSpec as LayerSpec

__version__ = "0.1.0"

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
        "TierError",
        "TraceError",
    ),
    "pagedkv.spec": ("KvCacheSpec", "LayerSpec"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


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
