"""What the built-in strategies mean, in plain NumPy: the oracles of the compiled policies."""

from __future__ import annotations

import numpy as np

from pagedkv import FIFO, GDSF, LFU, LRU, TTL, LongestFirst, Priority, StreamingLLM


def with_ties_by_recency(rank, last_access):
    return rank.astype(np.int64) * 2**40 + last_access


BLOCK_SCORES = {
    LRU: lambda strategy, blocks: blocks.last_access,
    LFU: lambda strategy, blocks: with_ties_by_recency(blocks.access_count, blocks.last_access),
    LongestFirst: lambda strategy, blocks: with_ties_by_recency(-blocks.depth, blocks.last_access),
    Priority: lambda strategy, blocks: with_ties_by_recency(blocks.priority, blocks.last_access),
    StreamingLLM: lambda strategy, blocks: blocks.last_access,
    FIFO: lambda strategy, blocks: blocks.created,
    GDSF: lambda strategy, blocks: blocks.access_count.astype(np.int64) * (256 + blocks.depth.astype(np.int64)),
    TTL: lambda strategy, blocks: blocks.last_access + strategy.ticks * blocks.priority.astype(np.int64),
}


class InNumpy:
    """A strategy of a user that scores blocks by the oracle of a built-in one"""

    def __init__(self, built_in):
        self.built_in = built_in
        self.score_sequences = built_in.score_sequences

    def score_blocks(self, blocks, now):
        return BLOCK_SCORES[type(self.built_in)](self.built_in, blocks)
