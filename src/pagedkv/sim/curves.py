"""The LRU curve of a trace: its hits at every capacity, exact or from a sample."""

from __future__ import annotations

import numpy as np

from pagedkv.sim.hit_curve import HitCurve, knee, require_content
from pagedkv.sim.mattson import NEVER, stack_gains
from pagedkv.sim.shards import shards_curve
from pagedkv.sim.trace import Trace

__all__ = ["HitCurve", "knee", "lru_curve", "shards_curve"]


def lru_curve(trace: Trace) -> HitCurve:
    """Return the hits of LRU at every capacity, exact to the count.

    Leaf LRU, which is what the cache does, and LRU that touches the tail of a request first find the same blocks, also
    where a request is larger than the cache.

    Parameters
    ----------
    trace : Trace

    Returns
    -------
    HitCurve
        A point for every capacity that has more hits than the one below it.

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only.
    """
    require_content(trace)
    count = trace.num_distinct
    gains, _ = stack_gains(trace, np.full(count, NEVER, np.int32), count)
    gains = np.cumsum(gains, axis=1, out=gains)  # of each capacity over the one below it
    points = np.concatenate([[0], np.flatnonzero(gains[0])])
    hits = np.cumsum(gains, axis=1, out=gains)
    return HitCurve(points, hits[0][points], hits[1][points], trace.num_accesses, trace.num_tokens)
