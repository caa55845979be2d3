"""What a plan may be asked for."""

from __future__ import annotations

from collections.abc import Sequence

from pagedkv.control.strategies import strategy_names
from pagedkv.errors import InvalidOperation
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_search import OPTIMAL
from pagedkv.sim.plan_types import Load
from pagedkv.sim.plan_verdict import format_bytes
from pagedkv.sim.replaying import MAX_BLOCKS
from pagedkv.sim.trace import Trace
from pagedkv.spec import require_int

__all__ = ["LRU", "blocks_in", "check_sizes", "checked_names", "checked_share", "default_strategies"]

LRU = "lru"
_MAX_MEMORY = 2**62
# They need arguments that only the operator knows, or look at something else than reuse.
_NOT_BY_DEFAULT = {"longestfirst", "priority", "streamingllm", "ttl"}


def default_strategies() -> tuple[str, ...]:
    """Return the registered strategies that are compared where none are named, LRU first."""
    return (LRU, *(name for name in strategy_names() if name not in _NOT_BY_DEFAULT | {LRU}))


def checked_share(target: object) -> float:
    """Return the share of the attainable hit ratio that is wanted."""
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise InvalidOperation(
            f"target expects a share of the attainable hit ratio above 0 and at most 1, got {target!r}"
        )
    return float(target)


def checked_names(strategies: Sequence[str] | None) -> tuple[str, ...]:
    """Return the strategies to compare, LRU first, the optimum left out."""
    if strategies is None:
        return default_strategies()
    if isinstance(strategies, str) or not all(isinstance(name, str) and name.strip() for name in strategies):
        raise InvalidOperation(f"strategies expects a sequence of names, got {strategies!r}")
    named = [LRU if name.strip().lower() == LRU else name.strip() for name in strategies]
    return tuple(dict.fromkeys([LRU, *(name for name in named if name.lower() != OPTIMAL)]))


def blocks_in(memory: int, trace: Trace, model: ModelShape, load: Load) -> int:
    """Return how many blocks fit a memory beside the windows of running requests."""
    memory = require_int("memory", memory, 1, _MAX_MEMORY - 1)
    block = trace.block_tokens * model.bytes_per_token
    least = load.window_bytes + block
    if memory < least:
        windows = f" and {format_bytes(load.window_bytes)} for windowed layers" if load.window_bytes else ""
        raise InvalidOperation(
            f"memory expects at least {format_bytes(least)}: {format_bytes(block)} for one block of "
            f"{trace.block_tokens} tokens{windows}; got {format_bytes(memory)}"
        )
    return min((memory - load.window_bytes) // block, MAX_BLOCKS)


def check_sizes(trace: Trace, model: ModelShape, load: Load) -> None:
    """Refuse a model whose cache of this trace would be larger than any memory."""
    if (trace.num_distinct + 1) * trace.block_tokens * model.bytes_per_token + load.window_bytes >= _MAX_MEMORY:
        raise InvalidOperation(f"model expects sizes that fit a memory, got {model.bytes_per_token} bytes per token")
