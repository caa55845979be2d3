"""Eviction strategies: how much is this worth keeping? The lowest score goes first.

A strategy is a class with two pure methods; register it and it works everywhere::

    @register_strategy("smallest_first")
    class SmallestFirst:
        def score_sequences(self, sequences, now):
            return sequences.num_tokens
        def score_blocks(self, blocks, now):
            return blocks.last_access
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.adaptive import Adaptive
from pagedkv.control.protocol import EvictionStrategy, Scores, StrategyHooks
from pagedkv.control.queue_strategies import GDSF, S3FIFO, SIEVE, TTL
from pagedkv.control.registry import as_strategy, parse_strategy, register_strategy
from pagedkv.control.rules import RECENCY_BITS
from pagedkv.control.views import BlockView, SequenceView
from pagedkv.errors import InvalidOperation

__all__ = [
    "FIFO",
    "GDSF",
    "LFU",
    "LRU",
    "S3FIFO",
    "SIEVE",
    "TTL",
    "Adaptive",
    "EvictionStrategy",
    "LongestFirst",
    "Priority",
    "StrategyHooks",
    "StreamingLLM",
    "as_strategy",
    "parse_strategy",
    "register_strategy",
]

MAX_PRIORITY = 2 ** (63 - RECENCY_BITS) - 1


def _then_recency(rank: npt.NDArray[Any], last_access: npt.NDArray[Any]) -> Scores:
    scores: Scores = (rank.astype(np.int64) << RECENCY_BITS) + last_access
    return scores


@dataclass(frozen=True)
class LRU:
    """Least recently used goes first."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the last access."""
        return sequences.last_access

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the last use."""
        return blocks.last_access

    def __str__(self) -> str:
        return "LRU"


@dataclass(frozen=True)
class LFU:
    """Least frequently used goes first; among blocks of equal use the oldest."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the number of accesses."""
        return sequences.access_count

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the number of sequences that used the block, then by recency."""
        return _then_recency(blocks.access_count, blocks.last_access)

    def __str__(self) -> str:
        return "LFU"


@dataclass(frozen=True)
class LongestFirst:
    """The longest sequence goes first; of blocks the deepest, among equals the oldest."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the number of tokens, negated."""
        scores: Scores = -sequences.num_tokens
        return scores

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by depth, negated, then by recency."""
        return _then_recency(-blocks.depth, blocks.last_access)

    def __str__(self) -> str:
        return "LongestFirst"


@dataclass(frozen=True)
class Priority:
    """The lowest priority goes first, among equals the least recently used.

    Parameters
    ----------
    levels : int
        Sequences may have the priorities 0 … levels−1.
    """

    levels: int

    def __post_init__(self) -> None:
        _require_int("levels", self.levels, 1, MAX_PRIORITY + 1)

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by priority, then by the last access."""
        return _then_recency(sequences.priority, sequences.last_access)

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the highest priority that used the block, then by recency."""
        return _then_recency(blocks.priority, blocks.last_access)

    def __str__(self) -> str:
        return f"Priority({self.levels})"


@dataclass(frozen=True)
class StreamingLLM:
    """Least recently used goes first; sequences keep sinks and a window (Xiao et al. 2023, section 3.2).

    Parameters
    ----------
    sink_tokens : int
        First tokens of a sequence that are always kept.
    window_tokens : int
        Last tokens of a sequence that are kept.
    """

    sink_tokens: int
    window_tokens: int

    def __post_init__(self) -> None:
        _require_int("sink_tokens", self.sink_tokens, 0, 2**62)
        _require_int("window_tokens", self.window_tokens, 0, 2**62)

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the last access."""
        return sequences.last_access

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the last use."""
        return blocks.last_access

    def __str__(self) -> str:
        return f"StreamingLLM(sink={self.sink_tokens}, window={self.window_tokens})"


@dataclass(frozen=True)
class FIFO:
    """First in, first out: use does not matter."""

    def score_sequences(self, sequences: SequenceView, now: int) -> Scores:
        """Score by the tick of the allocation."""
        return sequences.created

    def score_blocks(self, blocks: BlockView, now: int) -> Scores:
        """Score by the tick at which the block was filled."""
        return blocks.created

    def __str__(self) -> str:
        return "FIFO"


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise InvalidOperation(f"{name} expects an int in {low} … {high}, got {value!r}")


for _builtin in (LRU, LFU, LongestFirst, Priority, StreamingLLM, FIFO):
    register_strategy(_builtin.__name__, _builtin)
