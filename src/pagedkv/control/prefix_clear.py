"""Forgetting the whole prefix index at once, over the arrays."""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import forget_ghosts
from pagedkv.control.learning import forget_content
from pagedkv.control.state import LIVE, OPAQUE, State


def clear(state: State) -> int:
    """Make every block unfindable and free the cached ones; returns how many those were."""
    counters = state.counters[0]
    blocks = state.blocks[: int(counters.fresh)]
    cached = np.flatnonzero((blocks["ref_count"] == 0) & (blocks["indexed"] != 0)).astype(np.int32)
    top = int(counters.free_top)
    state.free_stack[top : top + len(cached)] = cached[::-1]
    blocks["num_tokens"][cached] = 0
    for field in ("indexed", "recent_hits", "num_children", "pins", "heap_pos", "hash_next"):
        blocks[field] = 0
    state.buckets.fill(0)
    state.siblings.fill(0)
    state.roots[:, :2] = 0
    live = (state.sequences["marks"] & LIVE) != 0
    state.sequences["marks"][live] |= OPAQUE
    state.sequences["num_indexed"][live] = 0
    counters.free_top = top + len(cached)
    counters.cached = counters.pinned = counters.heap_size = counters.probation_heap_size = counters.probation = 0
    forget_ghosts(state)
    forget_content(state)
    counters.log_len = 0
    return len(cached)
