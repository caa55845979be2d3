"""The arrays behind the charts, against loops that are obviously right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.traces import as_requests, as_trace, chained_requests

from pagedkv.sim.report import facts
from pagedkv.sim.trace import Trace


@st.composite
def traces_with_hits(draw: st.DrawFn) -> tuple[Trace, np.ndarray]:
    trace = as_trace(draw(chained_requests()))
    count = trace.num_requests
    gaps = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5, 400.0]), min_size=count, max_size=count))
    sessions = draw(st.lists(st.integers(-1, 4), min_size=count, max_size=count))
    lengths = np.diff(trace.offsets)
    hits = [draw(st.integers(0, int(length))) for length in lengths]
    times = np.cumsum([0.0, *gaps[1:]])[:count]
    return replace(trace, times=times, sessions=np.array(sessions, np.int64)), np.array(hits, np.int32)


@given(traces_with_hits(), st.sampled_from([None, 0.5, 3.0, 1000.0]))
@settings(max_examples=60, deadline=None)
def test_windows_count_what_falls_into_them(case, seconds):
    trace, hits = case
    windows = facts.per_window(trace, hits, seconds)
    requests, accesses, found = Counter(), Counter(), Counter()
    for i, ids in enumerate(as_requests(trace)):
        window = int(trace.times[i] // windows.seconds)
        requests[window] += 1
        accesses[window] += len(ids)
        found[window] += int(hits[i])
    places = range(len(windows.accesses))
    assert windows.requests.tolist() == [requests[place] for place in places]
    assert windows.accesses.tolist() == [accesses[place] for place in places]
    assert windows.hit_blocks.tolist() == [found[place] for place in places]
    assert sum(requests.values()) == windows.requests.sum() == trace.num_requests
    if seconds is None:
        assert len(windows.accesses) <= 60


@pytest.mark.parametrize(("span", "width"), [(0, 1), (59.9, 1), (60, 2), (3600, 120), (86400 * 365, 86400 * 7)])
def test_windows_have_round_widths(span, width):
    assert facts.window_seconds(span) == width
    assert span / width < 60


@given(traces_with_hits())
@settings(max_examples=60, deadline=None)
def test_depths_count_every_block_of_every_request(case):
    trace, hits = case
    touched, found = Counter(), Counter()
    for ids, hit in zip(as_requests(trace), hits.tolist(), strict=True):
        touched.update(range(len(ids)))
        found.update(range(hit))
    depths = facts.per_depth(trace, hits)
    assert depths.accesses.tolist() == [touched[depth] for depth in range(len(touched))]
    assert depths.hit_blocks.tolist() == [found[depth] for depth in range(len(touched))]


@given(traces_with_hits())
@settings(max_examples=60, deadline=None)
def test_sessions_and_requests_add_up(case):
    trace, hits = case
    touched, found = Counter(), Counter()
    for session, ids, hit in zip(trace.sessions.tolist(), as_requests(trace), hits.tolist(), strict=True):
        touched[session] += len(ids)
        found[session] += hit
    named = sorted(session for session in touched if session >= 0 and touched[session])
    shares = facts.per_session(trace, hits)
    assert shares.accesses.tolist() == [touched[session] for session in named]
    assert shares.hit_blocks.tolist() == [found[session] for session in named]
    assert shares.ratios.tolist() == [found[session] / touched[session] for session in named]

    single = facts.per_request(trace, hits)
    lengths = [len(ids) for ids in as_requests(trace)]
    assert single.accesses.tolist() == [length for length in lengths if length]
    assert single.hit_blocks.tolist() == [h for h, length in zip(hits.tolist(), lengths, strict=True) if length]


@given(traces_with_hits(), st.sampled_from([1, 3, 1000]))
@settings(max_examples=60, deadline=None)
def test_gaps_are_the_times_between_uses_of_a_block(case, chunk):
    trace, _ = case
    edges = np.array([0.1, 0.5, 1.0, 8.0, 100.0])
    expected, last = [0] * 4, {}
    for time, ids in zip(trace.times.tolist(), as_requests(trace), strict=True):
        for block in ids:
            if block in last:
                gap = time - last[block]
                inside = [b for b in range(4) if edges[b] <= gap < edges[b + 1]]
                expected[inside[0] if inside else 0 if gap < edges[0] else 3] += 1
            last[block] = time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "_CHUNK", chunk)
        gaps = facts.reuse_gaps(trace, edges)
    assert gaps.counts.tolist() == expected
    assert gaps.total == trace.num_accesses - trace.num_distinct


def test_a_quantile_is_the_end_of_the_bin_that_reaches_it():
    gaps = facts.Gaps(np.array([1.0, 2.0, 4.0, 8.0]), np.array([1, 0, 3]))
    assert [gaps.quantile(share) for share in (0.25, 0.26, 1.0)] == [2.0, 8.0, 8.0]
    assert facts.Gaps(gaps.edges, np.zeros(3, np.int64)).quantile(0.5) == 0.0
