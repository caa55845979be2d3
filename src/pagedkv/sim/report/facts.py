"""Histograms behind the charts: hits by time, depth and session, and reuse gaps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.sim.trace import Floats, Int64s, Trace
from pagedkv.sim.trace_stats import longer_than

_WIDTHS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
_CHUNK = 1 << 22
"""Accesses that `reuse_gaps` looks at together, so that its memory does not grow with the trace."""


class Windows(NamedTuple):
    """Requests, blocks touched and blocks found in windows of time; window w begins at ``w * seconds``."""

    seconds: float
    requests: Int64s
    accesses: Int64s
    hit_blocks: Int64s


class Hits(NamedTuple):
    """Blocks touched and found at every depth (0 is the first block of a prompt), or by every session or request."""

    accesses: Int64s
    hit_blocks: Int64s

    @property
    def ratios(self) -> Floats:
        """Of every one the blocks found over the blocks touched."""
        return self.hit_blocks / self.accesses


class Gaps(NamedTuple):
    """A histogram of the time between two uses of one block."""

    edges: Floats  # [num_bins + 1], seconds; the first bin also takes what is shorter, the last what is longer
    counts: Int64s

    @property
    def total(self) -> int:
        """Uses of a block that was used before: the hits of a cache without a limit."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Return the upper edge, in seconds, of the first bin by which `share` of the reuses came; 0.0 if none did."""
        if not self.total:
            return 0.0
        return float(self.edges[1 + np.searchsorted(self.counts.cumsum(), share * self.total)])


def window_seconds(span: float, most: int = 60) -> float:
    """Return the smallest round width, in seconds, that cuts `span` into at most `most` windows."""
    days = 86400 * (int(span / (86400 * most)) + 1)
    return float(next((width for width in _WIDTHS if span < width * most), days))


def per_window(trace: Trace, hits: npt.NDArray[Any], seconds: float | None = None) -> Windows:
    """Count blocks touched and found in windows of `seconds`: by default a round number, for at most 60 windows."""
    width = seconds or window_seconds(float(trace.times.max(initial=0.0)))
    window = (np.asarray(trace.times) / width).astype(np.int64)
    num_windows = int(window.max(initial=-1)) + 1
    return Windows(
        width,
        np.bincount(window, minlength=num_windows),
        _sums(window, np.diff(trace.offsets), num_windows),
        _sums(window, hits, num_windows),
    )


def per_depth(trace: Trace, hits: npt.NDArray[Any]) -> Hits:
    """Count by depth how often a block was touched, and found; a request finds its first ``hits[i]`` blocks."""
    lengths = np.diff(trace.offsets)
    deepest = int(lengths.max(initial=0))
    return Hits(longer_than(lengths, deepest), longer_than(hits, deepest))


def per_session(trace: Trace, hits: npt.NDArray[Any]) -> Hits:
    """Count blocks touched and found by every session; requests outside of any session do not count."""
    inside = np.asarray(trace.sessions) >= 0
    numbers = trace.sessions[inside]
    num_sessions = int(numbers.max(initial=-1)) + 1
    accesses = _sums(numbers, np.diff(trace.offsets)[inside], num_sessions)
    return _touched(accesses, _sums(numbers, hits[inside], num_sessions))


def per_request(trace: Trace, hits: npt.NDArray[Any]) -> Hits:
    """Take every request for itself."""
    return _touched(np.diff(trace.offsets).astype(np.int64), hits.astype(np.int64))


def reuse_gaps(trace: Trace, edges: Floats) -> Gaps:
    """Count how long after its last use a block is used again; gap g is in the bin ``edges[b] <= g < edges[b + 1]``."""
    counts = np.zeros(len(edges) - 1, np.int64)
    last_use = np.full(trace.num_distinct, np.nan)
    for first, last in _chunks(trace):
        ids = np.asarray(trace.ids[trace.offsets[first] : trace.offsets[last]])
        times = np.repeat(trace.times[first:last], np.diff(trace.offsets[first : last + 1]))
        gaps = _gaps_of_chunk(ids, times, last_use)
        bins = np.clip(np.searchsorted(edges, gaps, side="right") - 1, 0, len(counts) - 1)
        counts += np.bincount(bins, minlength=len(counts))
    return Gaps(edges, counts)


def _chunks(trace: Trace) -> Iterator[tuple[int, int]]:
    """Cut the requests into runs ``[first, last)`` of about `_CHUNK` accesses, at least one request each."""
    first = 0
    while first < trace.num_requests:
        last = max(int(np.searchsorted(trace.offsets, trace.offsets[first] + _CHUNK, side="right")) - 1, first + 1)
        yield first, last
        first = last


def _gaps_of_chunk(ids: npt.NDArray[Any], times: Floats, last_use: Floats) -> Floats:
    """Return the gaps that end in this chunk, and note the last use of every id in it."""
    # By id, then by place: one sort of whole numbers is several times faster than a stable argsort.
    shift = len(ids).bit_length()
    keys = np.sort((ids.astype(np.int64) << shift) | np.arange(len(ids)))
    ids, times = keys >> shift, times[keys & ((1 << shift) - 1)]
    if not len(ids):
        return times
    is_first = np.r_[True, ids[1:] != ids[:-1]]
    is_last = np.r_[is_first[1:], True]
    before = np.r_[np.nan, times[:-1]]
    before[is_first] = last_use[ids[is_first]]
    last_use[ids[is_last]] = times[is_last]
    gaps = times - before
    again: Floats = gaps[~np.isnan(gaps)]
    return again


def _sums(groups: npt.NDArray[Any], values: npt.NDArray[Any], num_groups: int) -> Int64s:
    # bincount adds float64: exact below 2**53, far beyond any count of blocks.
    return np.bincount(groups, weights=values, minlength=num_groups).astype(np.int64)


def _touched(accesses: Int64s, hit_blocks: Int64s) -> Hits:
    some = accesses > 0
    return Hits(accesses[some], hit_blocks[some])
