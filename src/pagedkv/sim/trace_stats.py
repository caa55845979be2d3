"""Statistics of a trace: lengths, attainable hits, reuse gaps, working sets; all exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.errors import bad_argument
from pagedkv.jit import compiled
from pagedkv.sim.trace import NO_PARENT, NO_SESSION, Floats, Int32s, Int64s, Trace

# One pass over the blocks of a trace: what was seen before, how long ago, and how many blocks a window touches.

NOT_YET = -1


class Passage(NamedTuple):
    """What the pass found."""

    hits: Int32s  # [num_requests]: blocks of each that a cache without a limit would have found
    uses: Int32s  # [num_distinct]: how often each block is accessed
    gap_accesses: Int64s  # [num_gaps]: from each use of a block to its next, 1 if the next access is to the same block
    gap_seconds: Floats  # [num_gaps]: the same in seconds
    window_sums: Int64s  # [num_windows]: distinct blocks, summed over the windows that the trace fills wholly
    window_peaks: Int64s  # [num_windows]: the most in any


def walk_through(trace: Trace, windows: Floats, whole: Floats) -> Passage:
    """Walk through a trace once, in O(num_accesses) time and memory.

    `windows` are lengths of tumbling windows in seconds, the first from the first request on; so many of each as
    `whole` says count for the sum.
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
    ids: Int32s,
    offsets: Int64s,
    times: Floats,
    windows: Floats,
    whole: Floats,
    last_place: Int64s,
    last_request: Int64s,
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
def _close_window(w: int, number: float, whole: Floats, distinct: Int64s, found: Passage) -> None:
    if number < whole[w]:
        found.window_sums[w] += distinct[w]
    found.window_peaks[w] = max(found.window_peaks[w], distinct[w])
    distinct[w] = 0


def heavy_chains(parents: Int32s, uses: Int32s) -> tuple[Int32s, Int32s]:
    """Cut the tree of prefixes into chains: a chain goes on as long as more than half of its requests share it.

    Returns the deepest block of each chain, in the order of their first blocks, and how deep it lies from the root.
    """
    depths, heads, last = np.empty((3, len(parents)), np.int32)
    _cut(parents, uses, depths, heads, last)
    ends = last[heads == np.arange(len(parents), dtype=np.int32)]
    return ends, depths[ends]


@compiled
def _cut(parents: Int32s, uses: Int32s, depths: Int32s, heads: Int32s, last: Int32s) -> None:
    # A parent's id is smaller than its children's, and at most one child has more than half of a head's uses.
    for block in range(len(parents)):
        parent = parents[block]
        depths[block] = 1 if parent == NO_PARENT else depths[parent] + 1
        heads[block] = block
        if parent != NO_PARENT and 2 * uses[block] > uses[heads[parent]] and last[heads[parent]] == parent:
            heads[block] = heads[parent]
        last[heads[block]] = block


WINDOWS = (60.0, 300.0, 600.0)
NUM_HOTTEST = 5


@dataclass(frozen=True)
class Figures:
    """A distribution. Percentiles are nearest-rank, so each of them occurs; all figures of no values are 0.

    Attributes
    ----------
    count : int
    mean, p50, p90, p99, maximum : float
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float


@dataclass(frozen=True)
class WorkingSet:
    """Distinct blocks touched within a window; windows tumble and the first begins with the first request.

    Attributes
    ----------
    seconds : float
        Length of the window.
    windows : int
        Windows that the trace fills wholly, at least 1; `mean` is over these.
    mean : float
    maximum : int
        The most in any window, the last and partly filled one included.
    """

    seconds: float
    windows: int
    mean: float
    maximum: int


@dataclass(frozen=True)
class HotPrefix:
    """A prefix that many requests begin with. It ends where no more than half of those that entered it go on alike.

    Attributes
    ----------
    block : int
        Content id of its last block.
    blocks, tokens : int
        Its length.
    requests : int
        How many requests begin with the whole of it.
    """

    block: int
    blocks: int
    tokens: int
    requests: int


@dataclass(frozen=True)
class ContentFigures:
    """What the content ids of a trace tell; lengths alone do not.

    Attributes
    ----------
    accesses, distinct_blocks : int
        Blocks touched, and different ones among them.
    hit_blocks, hit_tokens : int
        What a cache without a limit finds: the blocks of each request's longest prefix seen before.
    hit_ratio, token_hit_ratio : float
        Over `accesses`, and over all input tokens; 0.0 where there are none.
    used_once : float
        Share of the distinct blocks that are never used again.
    gap_seconds, gap_accesses : Figures
        From each use of a block to its next, in seconds and in blocks accessed (1 is the very next access).
    working_sets : tuple of WorkingSet
    depth_accesses, depth_hits : tuple of int
        Accesses and hits of the first block of a request, the second, and so on.
    hottest : tuple of HotPrefix
        The most used first; only prefixes with more than one request.
    """

    accesses: int
    distinct_blocks: int
    hit_blocks: int
    hit_tokens: int
    hit_ratio: float
    token_hit_ratio: float
    used_once: float
    gap_seconds: Figures
    gap_accesses: Figures
    working_sets: tuple[WorkingSet, ...]
    depth_accesses: tuple[int, ...]
    depth_hits: tuple[int, ...]
    hottest: tuple[HotPrefix, ...]


@dataclass(frozen=True)
class Description:
    """What `describe` found.

    Attributes
    ----------
    name, format : str
    block_tokens : int
    requests : int
    sessions : int or None
        None where the format names none.
    span_seconds : float
        From the first to the last request.
    input_tokens, output_tokens : Figures
        Per request.
    total_input_tokens, total_output_tokens : int
    num_skipped, num_reordered : int
        Bad lines left out, and requests whose timestamps went backwards.
    content : ContentFigures or None
        None for a trace of lengths only: hits need content.
    """

    name: str
    format: str
    block_tokens: int
    requests: int
    sessions: int | None
    span_seconds: float
    input_tokens: Figures
    output_tokens: Figures
    total_input_tokens: int
    total_output_tokens: int
    num_skipped: int
    num_reordered: int
    content: ContentFigures | None


def describe(trace: Trace) -> Description:
    """Say what a trace is like, exactly, in one pass and O(num_accesses) memory.

    Raises
    ------
    InvalidOperation
        When the trace has no request.
    """
    if not trace.num_requests:
        raise bad_argument("trace", f"at least 1 request, {trace.name} has none")
    known = trace.sessions[trace.sessions != NO_SESSION]
    return Description(
        name=trace.name,
        format=trace.format,
        block_tokens=trace.block_tokens,
        requests=trace.num_requests,
        sessions=len(np.unique(known)) if len(known) else None,
        span_seconds=float(trace.times[-1]),
        input_tokens=_figures(trace.input_tokens.copy()),
        output_tokens=_figures(trace.output_tokens.copy()),
        total_input_tokens=trace.num_tokens,
        total_output_tokens=int(trace.output_tokens.sum()),
        num_skipped=trace.num_skipped,
        num_reordered=trace.num_reordered,
        content=_content(trace) if trace.has_content else None,
    )


def _content(trace: Trace) -> ContentFigures:
    windows = np.array(WINDOWS)
    whole = np.maximum(np.floor(float(trace.times[-1]) / windows), 1.0)
    found = walk_through(trace, windows, whole)
    lengths = np.diff(trace.offsets)
    deepest = int(lengths.max(initial=0))
    columns = (windows, whole, found.window_sums, found.window_peaks)
    sets = zip(*(column.tolist() for column in columns), strict=True)
    hit_blocks, hit_tokens = int(found.hits.sum(dtype=np.int64)), trace.hit_tokens(found.hits)
    return ContentFigures(
        accesses=trace.num_accesses,
        distinct_blocks=trace.num_distinct,
        hit_blocks=hit_blocks,
        hit_tokens=hit_tokens,
        hit_ratio=_share(hit_blocks, trace.num_accesses),
        token_hit_ratio=_share(hit_tokens, trace.num_tokens),
        used_once=_share(int(np.count_nonzero(found.uses == 1)), trace.num_distinct),
        gap_seconds=_figures(found.gap_seconds),
        gap_accesses=_figures(found.gap_accesses),
        working_sets=tuple(
            WorkingSet(seconds, int(count), total / count, peak) for seconds, count, total, peak in sets
        ),
        depth_accesses=tuple(longer_than(lengths, deepest).tolist()),
        depth_hits=tuple(longer_than(found.hits, deepest).tolist()),
        hottest=_hottest(trace, found),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _figures(values: Int64s | Floats) -> Figures:
    """Describe values; the array is reordered."""
    count = len(values)
    if not count:
        return Figures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    ranks = [-(-percent * count // 100) - 1 for percent in (50, 90, 99, 100)]
    values.partition(sorted(set(ranks)))
    p50, p90, p99, maximum = (values[rank].item() for rank in ranks)
    return Figures(count, float(values.mean()), p50, p90, p99, maximum)


def longer_than(lengths: npt.NDArray[np.integer], deepest: int) -> Int64s:
    """Return for every depth below `deepest` how many of the lengths reach beyond it."""
    shorter = np.bincount(lengths, minlength=deepest + 1).cumsum()
    return (len(lengths) - shorter[:deepest]).astype(np.int64)


def _hottest(trace: Trace, found: Passage) -> tuple[HotPrefix, ...]:
    blocks, depths = heavy_chains(trace.parents, found.uses)
    best = np.argsort(-found.uses[blocks], kind="stable")[:NUM_HOTTEST]
    return tuple(
        HotPrefix(int(blocks[i]), int(depths[i]), int(depths[i]) * trace.block_tokens, int(found.uses[blocks[i]]))
        for i in best
        if found.uses[blocks[i]] > 1
    )
