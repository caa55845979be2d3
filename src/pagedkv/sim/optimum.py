"""Belady's optimum over prefixes: the most hits that any cache of a given size can have.

After a request the cache may keep what it likes of what it held and what the request brought, up to its capacity
(nothing has to be kept). MIN keeps what is used again first (Belady 1966, "A study of replacement algorithms for a
virtual-storage computer"). A descendant is never used again before its ancestor, so with the deeper block evicted
first on ties the cached blocks stay closed under prefixes, and the optimum over blocks is one over prefixes too.

The blocks of a request that come back with the same later request are interchangeable: a **run**. So the cache is a
count of kept blocks for every coming request. "Evict" takes from the latest of them, and what is left of a count when
its request comes is the hits of that request. A replay of r runs takes O(r log r), whatever the number of blocks.

One cache of the size of several bounds all of them: the pools of a fleet, the tiers beneath them, shared or not. Let
K be the blocks that any of them holds when a request is begun. K is no larger than all of them together; the request
finds no more than its prefix in K; and when the next one is begun, K has lost some of its blocks and gained none but
those of the request. So what is found is found by one cache of that size which keeps K, whatever the routing, the
strategies and the writes to tiers are, and the optimum finds no less.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.errors import bad_argument
from pagedkv.jit import compiled
from pagedkv.sim.baselines import OPTIMAL
from pagedkv.sim.curves import HitCurve
from pagedkv.sim.replayer import ReplayResult, as_tiers
from pagedkv.sim.tiered import Tiers, TierSpec
from pagedkv.sim.trace import MAX_BLOCKS, Int32s, Int64s, Trace, require_content
from pagedkv.validate import require_int, shown

_NEVER = -1


class _Runs(NamedTuple):
    """The blocks of every request that are used again, in runs; request i has ``[offsets[i], offsets[i + 1])``."""

    offsets: Int64s
    comeback: Int32s  # the request that uses the run again
    blocks: Int32s  # how long it is


@compiled
def _find_runs(
    ids: Int32s, offsets: Int64s, next_use: Int32s, run_offsets: Int64s, comeback: Int32s, blocks: Int32s
) -> None:
    """Fill `comeback` and `blocks` from their ends, walking backwards in time."""
    place = len(comeback)
    run_offsets[len(offsets) - 1] = place
    for request in range(len(offsets) - 2, -1, -1):
        run = _NEVER
        for i in range(offsets[request], offsets[request + 1]):
            following = next_use[ids[i]]
            next_use[ids[i]] = request
            if following == _NEVER:
                continue
            if following != run:
                run = following
                place -= 1
                comeback[place] = following
                blocks[place] = 0
            blocks[place] += 1
        run_offsets[request] = place


@compiled
def _push(heap: Int32s, size: int, value: int) -> None:
    """Put `value` into the max-heap ``heap[:size]``, which grows by one."""
    place = size
    while place > 0 and heap[(place - 1) >> 1] < value:
        heap[place] = heap[(place - 1) >> 1]
        place = (place - 1) >> 1
    heap[place] = value


@compiled
def _drop_top(heap: Int32s, size: int) -> None:
    """Take the greatest value out of the max-heap ``heap[:size]``, which shrinks by one."""
    value = heap[size - 1]
    place, child = 0, 1
    while child < size - 1:
        if child + 1 < size - 1 and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= value:
            break
        heap[place] = heap[child]
        place, child = child, 2 * child + 1
    heap[place] = value


@compiled
def _keep_best(run_offsets: Int64s, comeback: Int32s, blocks: Int32s, capacity: int, kept: Int32s, heap: Int32s) -> int:
    """Replay the runs; ``kept[i]``, zero at first, becomes the hits of request i. Returns the most blocks held at once.

    The heap holds the coming requests that blocks are kept for. Requests that have passed sink in it, and never rise
    above a coming one.
    """
    size, total, most = 0, 0, 0
    for request in range(len(kept)):
        total -= kept[request]
        for run in range(run_offsets[request], run_offsets[request + 1]):
            following = comeback[run]
            if kept[following] == 0:
                _push(heap, size, following)
                size += 1
            kept[following] += blocks[run]
            total += blocks[run]
        while total > capacity:
            latest = heap[0]
            given_up = min(kept[latest], total - capacity)
            kept[latest] -= given_up
            total -= given_up
            if kept[latest] == 0:
                _drop_top(heap, size)
                size -= 1
        most = max(most, total)
    return most


def _runs_of(trace: Trace, order: Int64s | None = None) -> _Runs:
    ids, offsets = np.asarray(trace.ids), np.asarray(trace.offsets)
    if order is not None:
        parts = [ids[start:stop] for start, stop in np.stack([offsets[order], offsets[order + 1]], axis=1).tolist()]
        ids = np.concatenate([ids[:0], *parts])
        offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])]).astype(np.int64)
    run_offsets = np.zeros(len(offsets), np.int64)
    # As long as the worst case, but memory that is never touched is never taken.
    comeback, blocks = np.empty(len(ids), np.int32), np.empty(len(ids), np.int32)
    _find_runs(ids, offsets, np.full(trace.num_distinct, _NEVER, np.int32), run_offsets, comeback, blocks)
    first = int(run_offsets[0])
    return _Runs(run_offsets - first, comeback[first:].copy(), blocks[first:].copy())


def _replay(runs: _Runs, capacity: int) -> tuple[Int32s, int]:
    """Return the hits of every request, and the most blocks that were worth holding at once."""
    kept, heap = np.zeros((2, len(runs.offsets) - 1), np.int32)
    most = _keep_best(runs.offsets, runs.comeback, runs.blocks, capacity, kept, heap)
    return kept, most


def optimal(
    trace: Trace,
    blocks: int,
    *,
    tiers: Tiers | Sequence[TierSpec] | None = None,
    order: Int64s | None = None,
) -> ReplayResult:
    """Replay a trace with a cache that knows the future: no strategy finds more blocks.

    It bounds fleets and tiers, too: no routing of the requests to replicas that share `blocks` and `tiers` finds more.

    Parameters
    ----------
    trace : Trace
    blocks : int
        Capacity, 1 … 2³¹−2.
    tiers : Tiers or sequence of TierSpec, optional
        The optimum may use their blocks, too.
    order : int64 [served requests], optional
        In which order requests were served; those that are left out find nothing. `ReplayResult.order` of a replay in
        time: the bound is one for that order.

    Returns
    -------
    ReplayResult
        With the strategy ``"optimal"``. `hit_tokens` are those of the blocks found; the most blocks need not be the
        most tokens. `reclaimed` counts as for other strategies, as if every block that fits were cached first.

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only, `blocks` is out of range, or `order` names no requests, each once.
    """
    require_content(trace)
    blocks = require_int("blocks", blocks, 1, MAX_BLOCKS)
    beneath = as_tiers(tiers, None)
    capacity = min(MAX_BLOCKS, blocks + sum(tier.blocks for tier in beneath.levels)) if beneath else blocks
    served = np.arange(trace.num_requests) if order is None else _checked_order(trace, order)
    started = time.perf_counter()
    hits = np.zeros(trace.num_requests, np.int32)
    hits[served], _ = _replay(_runs_of(trace, None if order is None else served), capacity)
    seconds = time.perf_counter() - started
    brought = int(np.minimum(np.diff(trace.offsets)[served], capacity).sum()) - int(hits.sum(dtype=np.int64))
    reclaimed = max(0, brought - min(capacity, trace.num_distinct))
    return ReplayResult.of(trace, OPTIMAL, blocks, hits, reclaimed=reclaimed, seconds=seconds)


def _checked_order(trace: Trace, order: Int64s) -> Int64s:
    served = np.asarray(order)
    is_one = served.ndim == 1 and (served.dtype.kind in "iu" or not len(served))
    if not is_one or not np.isin(served, np.arange(trace.num_requests)).all() or len(np.unique(served)) < len(served):
        raise bad_argument("order", f"numbers of requests, 0 … {trace.num_requests - 1}, each once", shown(order))
    return served.astype(np.int64)


def optimal_curve(trace: Trace, capacities: Iterable[int]) -> HitCurve:
    """Return the hits of the optimum at many capacities; the trace is read once for all of them.

    Parameters
    ----------
    trace : Trace
    capacities : iterable of int
        In any order, 0 … 2³¹−2.

    Returns
    -------
    HitCurve
        A point for each of them, for 0, and for the least capacity that finds all there is to find. Between two points
        the true optimum lies anywhere from the lower to the upper.

    Raises
    ------
    InvalidOperation
        If the trace carries lengths only, or a capacity is out of range.
    """
    require_content(trace)
    asked = {require_int("capacities", capacity, 0, MAX_BLOCKS) for capacity in capacities}
    runs = _runs_of(trace)
    _, most = _replay(runs, MAX_BLOCKS)
    points = sorted(asked | {0, most})
    hits = [_replay(runs, capacity)[0] for capacity in points]
    return HitCurve(
        np.array(points, np.int64),
        np.array([each.sum(dtype=np.int64) for each in hits], np.int64),
        np.array([trace.hit_tokens(each) for each in hits], np.int64),
        trace.num_accesses,
        trace.num_tokens,
    )
