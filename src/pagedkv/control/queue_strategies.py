"""Strategies from the literature that keep a queue, a clock or a price: each is a compiled rule of the control plane.

What they remember lies with the cache, not with the object, so one object may serve many caches. Their ``score_blocks``
is the order before any second chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedkv.control.protocol import Scores
from pagedkv.control.registry import register_strategy
from pagedkv.control.rules import COST_OF_FIRST
from pagedkv.control.views import BlockView, SequenceView
from pagedkv.errors import InvalidOperation

__all__ = ["GDSF", "S3FIFO", "SIEVE", "TTL"]


class _RecentSequences:
    """Whole sequences go least recently used first."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the last access."""
        return sequences.last_access

    def __str__(self) -> str:
        return type(self).__name__


@register_strategy("s3fifo")
@dataclass(frozen=True)
class S3FIFO(_RecentSequences):
    """Three FIFO queues: a tenth for newcomers, the rest for what proved itself, and a memory of what was given up.

    A newcomer with two hits is promoted, one without goes; if it comes back soon, it enters as proven. A proven block
    is given up when it comes first without a hit since. Source: Yang et al., SOSP 2023, algorithm 1.
    """

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the tick at which the block was filled."""
        return blocks.created


@register_strategy("sieve")
@dataclass(frozen=True)
class SIEVE(_RecentSequences):
    """FIFO in which a block that was hit is passed over once. Source: Zhang et al., NSDI 2024, algorithm 1."""

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the tick at which the block was filled."""
        return blocks.created


@register_strategy("gdsf")
@dataclass(frozen=True)
class GDSF(_RecentSequences):
    """Greedy-Dual: uses times the cost of computing a block again, above a price that rises with what was given up.

    The cost grows with the depth of the block in its prefix: attention reads all that precedes it. Source: Cherkasova,
    HPL-98-69R1, 1998, with equal sizes.
    """

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by uses times cost, without the price."""
        scores: Scores = blocks.access_count.astype(np.int64) * (COST_OF_FIRST + blocks.depth.astype(np.int64))
        return scores


@register_strategy("ttl")
@dataclass(frozen=True)
class TTL(_RecentSequences):
    """Least recently used goes first, but what a sequence with a priority used lives longer: a pin that expires.

    Parameters
    ----------
    ticks : int
        Calls of the cache that a block of priority 1 is kept longer for; priority 2 counts twice, and so on.
    """

    ticks: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.ticks, bool) or not isinstance(self.ticks, int) or not 0 <= self.ticks < 2**32:
            raise InvalidOperation(f"ticks expects an int in 0 … 2**32 - 1, got {self.ticks!r}")

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the tick at which the block expires."""
        scores: Scores = blocks.last_access + self.ticks * blocks.priority.astype(np.int64)
        return scores

    def __str__(self) -> str:
        return f"TTL(ticks={self.ticks})"
