"""The protocol of eviction strategies: two scoring methods and optional hooks, and how they are called."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.control.pool import available_blocks
from pagedkv.control.sequence_table import OK
from pagedkv.control.sequences import blocks_to_grow, matching_blocks
from pagedkv.control.state import RECLAIM, RESCORE, State
from pagedkv.control.types import BlockView, SequenceView
from pagedkv.errors import InvalidOperation
from pagedkv.typing import StrategyName
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


Strategy: TypeAlias = StrategyName | EvictionStrategy
"""What ``strategy=`` takes: the name of a built-in one, or an object."""


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
            f"got {array.dtype} of shape {array.shape}",
            hint="make the scores int64, one for each record",
        )
    return array.astype(np.int64, copy=False)


def block_scores(strategy: EvictionStrategy, view: BlockView, now: int) -> Scores:
    """Return what a strategy says of these blocks."""
    return checked_scores(strategy, "score_blocks", strategy.score_blocks(view, now), len(view))


# The hooks of a strategy, called around the compiled calls.

Blocks = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Order = tuple[int, int, int]
"""What is to happen to make room, a row of ``State.orders``."""

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
        self.exist = bool(names)

    def hit(self, state: State, blocks: Blocks) -> None:
        """Tell of blocks that a new sequence found."""
        if self.see_hits and len(blocks):
            self._strategy.on_hit(block_view(state, blocks), state.counter("tick"))

    def about_to_hit(self, state: State, namespace: int, ids: Ids, reuse: bool) -> None:
        """Tell of blocks that a new sequence is about to share, as they will be then."""
        if not self.see_hits:
            return
        blocks = shared_blocks(state, namespace, ids, reuse)
        if len(blocks):
            view, now = block_view(state, blocks), state.counter("tick") + 1
            view.records["ref_count"] += 1
            view.records["access_count"] += 1
            view.records["last_access"] = now
            self._strategy.on_hit(view, now)

    def stored(self, state: State, blocks: Blocks) -> None:
        """Tell of blocks that became findable."""
        if self.see_stores and len(blocks):
            self._strategy.on_store(block_view(state, blocks), state.counter("tick"))

    def orders_for(self, state: State, needed: int, spared: int = -1) -> list[Order]:
        """Let the strategy decide which cached blocks are evicted, so that `needed` can be taken; never `spared`.

        Nothing is changed: a strategy that fails while it decides leaves everything as it was.
        """
        counters = state.counters[0]
        missing = needed - int(counters.free_top) - int(counters.num_blocks - counters.fresh)
        orders: list[Order] = []
        if missing <= 0:
            return orders
        leaves, chances = _Leaves(state, spared), 0
        most = SOME_CHANCES + MOST_CHANCES * int(counters.heap_size)
        name = type(self._strategy).__name__
        for block in leaves:
            answer = self._strategy.on_reclaim(leaves.view(block), int(counters.tick))
            if answer is None:
                orders.append((RECLAIM, block, 0))
                leaves.drop(block)
                missing, chances = missing - 1, 0
                if not missing:
                    break
                continue
            score = require_int(f"{name}.on_reclaim's score", answer, -(2**63), 2**63 - 1)
            orders.append((RESCORE, block, score))
            leaves.keep(block, score)
            chances += 1
            if chances == most:
                raise InvalidOperation(f"{name}.on_reclaim: expected to evict some block, kept {most} in a row")
        return orders

    def orders_to_allocate(self, state: State, namespace: int, count: int, ids: Ids, reuse: bool) -> list[Order] | None:
        """Return the orders that make room for an allocation; None if it does not fit."""
        matched, needed, available = room_for(state, namespace, count, ids, reuse)
        if needed > available:
            return None
        return self.orders_for(state, needed, int(matched[-1]) if len(matched) else -1) if self.decide_reclaims else []

    def orders_to_grow(self, state: State, keys: Ids, counts: Ids) -> list[Order] | None:
        """Return the orders that make room for more tokens; None if they do not fit."""
        status, needed = blocks_to_grow(state.packed, keys, counts)
        return self.orders_for(state, needed) if status == OK else None


def shared_blocks(state: State, namespace: int | None, ids: Ids, reuse: bool) -> Blocks:
    """Return the cached blocks that an allocation would share, if it may `reuse` any."""
    if namespace is None or not reuse or not state.counter("prefix_caching"):
        return np.empty(0, np.int32)
    return matching_blocks(state.packed, namespace, ids)


def room_for(state: State, namespace: int, count: int, ids: Ids, reuse: bool) -> tuple[Blocks, int, int]:
    """Return the blocks that an allocation would share, how many more it needs, and how many it can have."""
    matched = shared_blocks(state, namespace, ids, reuse)
    idle = (state.blocks["ref_count"][matched] == 0) & (state.blocks["pins"][matched] == 0)
    needed = -(-count // state.counter("block_size")) - len(matched)
    return matched, needed, int(available_blocks(state.packed)) - int(idle.sum())


class _Leaves:
    """The cached leaves in the order of their heap, of which some are evicted or scored anew for a trial."""

    def __init__(self, state: State, spared: int) -> None:
        self._state = state
        self._spared = spared
        self._children: dict[int, int] = {}  # of parents that lost some
        self._frontier: list[tuple[int, int, int]] = []  # score, block, place in the heap or -1
        self._add_place(0)

    def __iter__(self) -> Iterator[int]:
        while self._frontier:
            _, block, place = heapq.heappop(self._frontier)
            if place >= 0:
                self._add_place(2 * place + 1)
                self._add_place(2 * place + 2)
            if block != self._spared:
                yield block

    def view(self, block: int) -> BlockView:
        """Return the view that the strategy is asked with."""
        view = block_view(self._state, np.array([block], np.int32))
        view.records["num_children"] = 0
        return view

    def keep(self, block: int, score: int) -> None:
        heapq.heappush(self._frontier, (score, block, -1))

    def drop(self, block: int) -> None:
        """Take a leaf away; its parent may be the next one."""
        parent = int(self._state.blocks[block].parent)
        if parent < 0:
            return
        above = self._state.blocks[parent]
        self._children[parent] = self._children.get(parent, int(above.num_children)) - 1
        if self._children[parent] == 0 and above.ref_count == 0 and above.pins == 0:
            self.keep(parent, int(above.score))

    def _add_place(self, place: int) -> None:
        if place < self._state.counter("heap_size"):
            block = self._state.heap.item(place)
            heapq.heappush(self._frontier, (self._state.blocks["score"].item(block), block, place))


def block_view(state: State, blocks: Blocks) -> BlockView:
    """Return the view of `blocks` that strategies are shown."""
    hashes = state.prefix_hashes[blocks] if len(state.prefix_hashes) else None
    return BlockView(state.blocks[blocks], blocks, hashes)
