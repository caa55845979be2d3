"""One pass over the blocks of a trace: what was seen before, how long ago, and how many blocks a window touches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled
from pagedkv.sim.trace import NO_PARENT, Trace

__all__ = ["Passage", "heavy_chains", "walk_through"]

NOT_YET = -1


class Passage(NamedTuple):
    """What the pass found.

    Attributes
    ----------
    hits : int32 [num_requests]
        Blocks of each request that a cache without a limit would have found.
    uses : int32 [num_distinct]
        How often each block is accessed.
    gap_accesses : int64 [num_gaps]
        From each use of a block to its next: accesses, 1 where the next access is to the same block.
    gap_seconds : float64 [num_gaps]
        The same in seconds.
    window_sums, window_peaks : int64 [num_windows]
        Distinct blocks per window: their sum over the windows that the trace fills wholly, and the most in any.
    """

    hits: npt.NDArray[np.int32]
    uses: npt.NDArray[np.int32]
    gap_accesses: npt.NDArray[np.int64]
    gap_seconds: npt.NDArray[np.float64]
    window_sums: npt.NDArray[np.int64]
    window_peaks: npt.NDArray[np.int64]


def walk_through(trace: Trace, windows: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> Passage:
    """Walk through a trace once, in O(num_accesses) time and memory.

    Parameters
    ----------
    trace : Trace
    windows : float64 [num_windows]
        Lengths of tumbling windows in seconds; the first begins with the first request.
    whole : float64 [num_windows]
        How many windows of each length count for the sum.
    """
    uses = np.bincount(trace.ids, minlength=trace.num_distinct).astype(np.int32)
    num_gaps = trace.num_accesses - int(np.count_nonzero(uses))
    found = Passage(
        np.zeros(trace.num_requests, np.int32),
        uses,
        np.empty(num_gaps, np.int64),
        np.empty(num_gaps, np.float64),
        np.zeros(len(windows), np.int64),
        np.zeros(len(windows), np.int64),
    )
    last_place = np.full(trace.num_distinct, NOT_YET, np.int64)
    last_request = np.full(trace.num_distinct, NOT_YET, np.int64)
    _walk(trace.ids, trace.offsets, trace.times, windows, whole, last_place, last_request, found)
    return found


@compiled
def _walk(
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    times: npt.NDArray[np.float64],
    windows: npt.NDArray[np.float64],
    whole: npt.NDArray[np.float64],
    last_place: npt.NDArray[np.int64],
    last_request: npt.NDArray[np.int64],
    found: Passage,
) -> None:
    number = np.zeros(len(windows))  # of the window that lasts
    opened = np.zeros(len(windows), np.int64)  # by which request
    distinct = np.zeros(len(windows), np.int64)
    gap = 0
    for request in range(len(times)):
        for w in range(len(windows)):
            now = np.floor(times[request] / windows[w])
            if now != number[w]:
                _close_window(w, number[w], whole, distinct, found)
                number[w] = now
                opened[w] = request
        unbroken = True
        for place in range(offsets[request], offsets[request + 1]):
            block = ids[place]
            before, by = last_place[block], last_request[block]
            if before == NOT_YET:
                unbroken = False
            else:
                found.gap_accesses[gap] = place - before
                found.gap_seconds[gap] = times[request] - times[by]
                gap += 1
                if unbroken:
                    found.hits[request] += 1
            for w in range(len(windows)):
                if by < opened[w] or by == NOT_YET:
                    distinct[w] += 1
            last_place[block] = place
            last_request[block] = request
    for w in range(len(windows)):
        _close_window(w, number[w], whole, distinct, found)


@compiled
def _close_window(
    w: int, number: float, whole: npt.NDArray[np.float64], distinct: npt.NDArray[np.int64], found: Passage
) -> None:
    if number < whole[w]:
        found.window_sums[w] += distinct[w]
    found.window_peaks[w] = max(found.window_peaks[w], distinct[w])
    distinct[w] = 0


def heavy_chains(
    parents: npt.NDArray[np.int32], uses: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Cut the tree of prefixes into chains: a chain goes on as long as more than half of its requests share it.

    Returns
    -------
    last : int32 [num_chains]
        The deepest block of each chain. Chains come in the order of their first blocks.
    depths : int32 [num_chains]
        Blocks from the root to there.
    """
    depths = np.empty(len(parents), np.int32)
    heads = np.empty(len(parents), np.int32)
    last = np.empty(len(parents), np.int32)
    _cut(parents, uses, depths, heads, last)
    ends = last[heads == np.arange(len(parents), dtype=np.int32)]
    return ends, depths[ends]


@compiled
def _cut(
    parents: npt.NDArray[np.int32],
    uses: npt.NDArray[np.int32],
    depths: npt.NDArray[np.int32],
    heads: npt.NDArray[np.int32],
    last: npt.NDArray[np.int32],
) -> None:
    # A parent's id is smaller than its children's, and at most one child has more than half of a head's uses.
    for block in range(len(parents)):
        parent = parents[block]
        depths[block] = 1 if parent == NO_PARENT else depths[parent] + 1
        heads[block] = block
        if parent != NO_PARENT and 2 * uses[block] > uses[heads[parent]] and last[heads[parent]] == parent:
            heads[block] = heads[parent]
        last[heads[block]] = block
