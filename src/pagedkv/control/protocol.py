"""The protocol of eviction strategies: two scoring methods, and optional hooks."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.control.types import BlockView, SequenceView
from pagedkv.errors import InvalidOperation

Scores = npt.NDArray[np.int64]


@runtime_checkable
class EvictionStrategy(Protocol):
    """How much a sequence, or a cached block, is worth keeping."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Return int64 ``[len(sequences)]``; of all live sequences the lowest is evicted first, ties by id.

        A sequence is scored anew when it was accessed or changed since.
        """
        ...

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Return int64 ``[len(blocks)]``; of all cached leaves the lowest is reclaimed first, ties by id.

        A block is scored when its last owner releases it, and the score is kept with it.
        """
        ...


class StrategyHooks(Protocol):
    """What a strategy may define besides; each hook is optional and is found by its name.

    The hooks are called under the cache's lock and must not call the cache. A strategy with hooks belongs to one cache.
    ``blocks.prefix_hash`` names content for good: it is the same number when the same tokens behind the same prefix
    come back.
    """

    def on_hit(self, blocks: BlockView, now: int) -> None:
        """Blocks were found by a new sequence."""

    def on_store(self, blocks: BlockView, now: int) -> None:
        """Blocks became findable: what they hold was missing and had to be computed."""

    def on_reclaim(self, block: BlockView, now: int) -> int | None:
        """Of all cached leaves this one comes first: return None to evict it, or a new score to keep it once more.

        It is asked again when the block comes first again; a strategy that keeps them all is an error.
        """


def hooks_of(strategy: EvictionStrategy) -> frozenset[str]:
    """Return the names of the hooks that `strategy` has."""
    return frozenset(name for name in ("on_hit", "on_store", "on_reclaim") if callable(getattr(strategy, name, None)))


def checked_scores(strategy: EvictionStrategy, method: str, scores: object, count: int) -> Scores:
    """Return the scores as int64; InvalidOperation if they are no integers or not one for each record."""
    array = np.asarray(scores)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise InvalidOperation(
            f"{type(strategy).__name__}.{method}: expected to return integers of shape ({count},), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return array.astype(np.int64, copy=False)
