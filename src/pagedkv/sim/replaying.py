"""One replay: the requests of a trace through the control plane that serves models."""

from __future__ import annotations

import dataclasses
import time

from pagedkv.control.content_cache import ContentCache
from pagedkv.control.protocol import EvictionStrategy
from pagedkv.errors import InvalidOperation
from pagedkv.sim.replayer import most_blocks, replay_timed
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.timing import Timing
from pagedkv.sim.trace import Trace
from pagedkv.spec import require_int

__all__ = ["Timing", "replay"]

MAX_BLOCKS = 2**31 - 2


def replay(
    trace: Trace, blocks: int, strategy: str | EvictionStrategy = "lru", *, timing: Timing | None = None
) -> ReplayResult:
    """Replay a trace and count the hits.

    Parameters
    ----------
    trace : Trace
    blocks : int
        Capacity, 1 … 2³¹−2; more than the trace ever fills is fine.
    strategy : str or EvictionStrategy
        A registered name with its arguments, or an object.
    timing : Timing, optional
        Without it a request comes and goes at once. With it a request holds its blocks from its arrival until it is
        served, so concurrency takes room, and running requests may be preempted.

    Returns
    -------
    ReplayResult

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only, `blocks` is out of range, or the strategy is unknown or returns something
        else than scores.
    """
    if not trace.has_content:
        raise InvalidOperation(f"trace {trace.name!r} ({trace.format}) carries lengths only: hits need content ids")
    blocks = require_int("blocks", blocks, 1, MAX_BLOCKS)
    # A pool larger than the trace ever fills finds the same hits in less memory.
    most = trace.num_distinct if timing is None else most_blocks(trace)
    cache = ContentCache(min(blocks, max(1, most)), strategy)
    if timing is not None:
        return dataclasses.replace(replay_timed(trace, cache, str(strategy), timing), blocks=blocks)
    started = time.perf_counter()
    hits = cache.run(trace.ids, trace.offsets)
    seconds = time.perf_counter() - started
    reclaimed = cache.stats.blocks_reclaimed
    return ReplayResult.of(trace, str(strategy), blocks, hits, reclaimed=reclaimed, seconds=seconds)
