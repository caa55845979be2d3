"""Which prefixes are worth the most to the cache right now."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedkv.control.inspection import Inspection
from pagedkv.control.state import State

__all__ = ["HotPrefix", "hottest_prefixes"]


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A findable prefix that several sequences have used.

    Attributes
    ----------
    block_id : int
        Its last block.
    num_blocks, num_tokens : int
    uses : int
        Sequences that have held its last block since it was stored.
    ref_count : int
        Sequences that hold it now.
    last_access : int
        Tick.
    token_ids : tuple of int
        The prefix itself, or the head of it; empty where it was not asked for.
    """

    block_id: int
    num_blocks: int
    num_tokens: int
    uses: int
    ref_count: int
    last_access: int
    token_ids: tuple[int, ...] = ()


def hottest_prefixes(cache: Inspection, limit: int = 8, max_tokens: int = 0) -> tuple[HotPrefix, ...]:
    """Rank the prefixes of the index by the tokens that their reuse saved.

    A prefix ends where its uses do: at a block that was used more often than each block that continues it. What it
    saved is its length times its uses beyond the first.

    Parameters
    ----------
    cache : Inspection
        A manager or a cache.
    limit : int
        The most prefixes.
    max_tokens : int
        The first so many token ids of each prefix are returned with it; 0 for none.

    Returns
    -------
    tuple of HotPrefix
        The best first; ties go to the lower block id.
    """
    with cache._lock:
        state = cache._state
        blocks = state.blocks
        nodes = np.flatnonzero((blocks["indexed"] != 0) & (blocks["access_count"] > 1))
        uses = blocks["access_count"][nodes].astype(np.int64)
        parents = blocks["parent"][nodes]
        follow = np.zeros(len(blocks), np.int64)
        inner = parents >= 0
        np.maximum.at(follow, parents[inner], uses[inner])
        is_end = uses > follow[nodes]
        ends, uses = nodes[is_end], uses[is_end]
        saved = (uses - 1) * (blocks["depth"][ends].astype(np.int64) + 1)
        best = np.argsort(-saved, kind="stable")[:limit]
        return tuple(_prefix(state, int(ends[place]), max_tokens) for place in best)


def _prefix(state: State, block: int, max_tokens: int) -> HotPrefix:
    record, size = state.blocks[block], int(state.counters[0].block_size)
    num_blocks = int(record.depth) + 1
    return HotPrefix(
        block_id=block,
        num_blocks=num_blocks,
        num_tokens=num_blocks * size,
        uses=int(record.access_count),
        ref_count=int(record.ref_count),
        last_access=int(record.last_access),
        token_ids=_head(state, block, size)[:max_tokens] if max_tokens else (),
    )


def _head(state: State, block: int, size: int) -> tuple[int, ...]:
    chain = []
    while block >= 0:
        chain.append(block)
        block = int(state.blocks[block].parent)
    return tuple(token for b in reversed(chain) for token in state.contents[b * size : (b + 1) * size].tolist())
