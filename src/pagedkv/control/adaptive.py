"""The adaptive strategy: a time to live for each class of block, learned from the traffic; else recency."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.control.protocol import Scores
from pagedkv.control.registry import register_strategy
from pagedkv.control.views import BlockView, SequenceView

__all__ = ["Adaptive"]


@register_strategy("adaptive")
@dataclass(frozen=True)
class Adaptive:
    """What will be used again within the time that room lasts is kept; there is nothing to tune.

    Blocks fall into classes by how often they were used and by whether they end a prefix. For each class the ages at
    which blocks are used again are counted, and from them follows how long such a block is worth keeping: the block
    whose time is up first goes first. As long as that is not clearly better than least recently used, judged by two
    small shadow caches over a sample of the content, this is LRU. What it learns lies with the cache, not with the
    object. See ``docs/strategies.md``.
    """

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the last access."""
        return sequences.last_access

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the last use: the order before anything is learned."""
        return blocks.last_access

    def __str__(self) -> str:
        return "Adaptive"
