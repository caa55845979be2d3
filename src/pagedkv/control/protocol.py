"""The protocol of eviction strategies: two scoring methods and optional hooks, and how they are called."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.control.reclaim import evict_leaf, lowest_leaf, offer, rescore, withdraw
from pagedkv.control.state import MAIN, State
from pagedkv.control.types import BlockView, SequenceView
from pagedkv.errors import InvalidOperation
from pagedkv.validate import require_int

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


# The hooks of a strategy, called around the compiled calls.

Blocks = npt.NDArray[np.int32]

# A strategy that keeps every leaf this often while one block is needed will keep them for ever.
MOST_CHANCES = 8
SOME_CHANCES = 1000


class Hooks:
    """The hooks that a strategy has; without any, every call is a no-op."""

    def __init__(self, strategy: EvictionStrategy) -> None:
        self._strategy: Any = strategy
        names = hooks_of(strategy)
        # Plain attributes: every call of a cache asks for them.
        self.see_hits = "on_hit" in names
        self.see_stores = "on_store" in names
        self.decide_reclaims = "on_reclaim" in names

    def hit(self, state: State, blocks: Blocks) -> None:
        """Tell of blocks that a new sequence found."""
        if self.see_hits and len(blocks):
            self._strategy.on_hit(block_view(state, blocks), int(state.counters[0].tick))

    def stored(self, state: State, blocks: Blocks) -> None:
        """Tell of blocks that became findable."""
        if self.see_stores and len(blocks):
            self._strategy.on_store(block_view(state, blocks), int(state.counters[0].tick))

    def make_room(self, state: State, needed: int, spared: int = -1) -> None:
        """Evict cached blocks as the strategy decides, so that `needed` can be taken; never `spared`."""
        if not self.decide_reclaims:
            return
        counters = state.counters[0]
        missing = needed - int(counters.free_top) - int(counters.num_blocks - counters.fresh)
        # A pin, as the block may have cached children now and become a leaf when they go.
        is_pinned_here = spared >= 0 and state.blocks[spared].pins == 0
        if is_pinned_here:
            withdraw(state.packed, spared)
            state.blocks[spared].pins = 1
        try:
            for _ in range(missing):
                self._evict_one(state)
        finally:
            if is_pinned_here:
                state.blocks[spared].pins = 0
                offer(state.packed, spared)

    def _evict_one(self, state: State) -> None:
        name = type(self._strategy).__name__
        most = SOME_CHANCES + MOST_CHANCES * int(state.counters[0].heap_size)
        for _ in range(most):
            block = int(lowest_leaf(state.packed))
            if block < 0:
                return
            view = block_view(state, np.array([block], np.int32))
            answer = self._strategy.on_reclaim(view, int(state.counters[0].tick))
            if answer is None:
                self._free(state, block)
                return
            rescore(state.packed, block, require_int(f"{name}.on_reclaim's score", answer, -(2**63), 2**63 - 1), MAIN)
        raise InvalidOperation(f"{name}.on_reclaim: expected to evict some block, kept {most} in a row")

    @staticmethod
    def _free(state: State, block: int) -> None:
        evict_leaf(state.packed, block)
        counters = state.counters[0]
        state.blocks[block].num_tokens = 0
        state.free_stack[counters.free_top] = block
        counters.free_top += 1


def block_view(state: State, blocks: Blocks) -> BlockView:
    """Return the view of `blocks` that strategies are shown."""
    hashes = state.prefix_hashes[blocks] if len(state.prefix_hashes) else None
    return BlockView(state.blocks[blocks], blocks, hashes)
