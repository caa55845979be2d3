from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.traces import AGENTS, CHAT, as_requests, as_trace, chained_traces, real_trace

from pagedkv.errors import InvalidOperation
from pagedkv.sim.trace import Trace
from pagedkv.sim.trace_stats import ContentFigures, Figures, HotPrefix, WorkingSet, describe

# ---------------------------------------------------------------- by hand


@pytest.fixture
def small() -> Trace:
    """Blocks of 4 tokens: 0 1 2 | 0 1 3 | 0 1 2 | 4, at 0, 10, 70 and 400 seconds, in two sessions."""
    trace = as_trace([[0, 1, 2], [0, 1, 3], [0, 1, 2], [4]], 4, [11, 12, 11, 3])
    return replace(
        trace,
        times=np.array([0.0, 10.0, 70.0, 400.0]),
        output_tokens=np.array([5, 0, 7, 1]),
        sessions=np.array([0, 1, 0, -1]),
    )


def content(trace: Trace) -> ContentFigures:
    found = describe(trace).content
    assert found is not None
    return found


def test_requests_and_lengths(small):
    found = describe(small)
    assert (found.name, found.format, found.block_tokens) == ("test", "test", 4)
    assert (found.requests, found.sessions, found.span_seconds) == (4, 2, 400.0)
    assert found.input_tokens == Figures(4, 37 / 4, 11, 12, 12, 12)
    assert found.output_tokens == Figures(4, 13 / 4, 1, 7, 7, 7)
    assert (found.total_input_tokens, found.total_output_tokens) == (37, 13)


def test_hits_of_a_cache_without_a_limit(small):
    found = content(small)
    assert (found.accesses, found.distinct_blocks) == (10, 5)
    assert (found.hit_blocks, found.hit_ratio) == (5, 0.5)
    assert (found.hit_tokens, found.token_hit_ratio) == (8 + 11, 19 / 37)
    assert found.used_once == 2 / 5
    assert (found.depth_accesses, found.depth_hits) == ((4, 3, 3), (2, 2, 1))


def test_gaps_between_the_uses_of_a_block(small):
    found = content(small)
    assert found.gap_accesses == Figures(5, (3 * 4 + 6) / 5, 3, 6, 6, 6)  # 0 and 1 twice, 2 after six
    assert found.gap_seconds == Figures(5, (10 + 10 + 60 + 60 + 70) / 5, 60.0, 70.0, 70.0, 70.0)


def test_working_sets_of_windows_that_tumble(small):
    assert content(small).working_sets == (
        WorkingSet(60.0, 6, (4 + 3) / 6, 4),  # four windows without a request; the seventh is not full
        WorkingSet(300.0, 1, 4.0, 4),
        WorkingSet(600.0, 1, 5.0, 5),
    )


def test_the_hottest_prefix_ends_where_its_requests_part(small):
    shared = HotPrefix(block=2, blocks=3, tokens=12, requests=2)
    assert content(small).hottest == (shared,)  # two of three requests go on to block 2
    parting = as_trace([[0, 1, 2], [0, 1, 3], [0, 1, 4], [5], [5]])
    assert content(parting).hottest == (HotPrefix(1, 2, 8, 3), HotPrefix(5, 1, 4, 2))


def test_a_trace_without_sessions_says_none():
    assert describe(as_trace([[0]])).sessions is None


def test_requests_without_blocks():
    found = content(as_trace([[], []]))
    assert (found.accesses, found.hit_ratio, found.token_hit_ratio, found.used_once) == (0, 0.0, 0.0, 0.0)
    assert found.gap_seconds == Figures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert (found.depth_accesses, found.hottest) == ((), ())


def test_lengths_alone_tell_no_hits(small):
    lengths = replace(
        small,
        has_content=False,
        ids=np.zeros(0, np.int32),
        parents=np.zeros(0, np.int32),
        offsets=np.zeros(5, np.int64),
    )
    found = describe(lengths)
    assert found.content is None
    assert found.input_tokens == describe(small).input_tokens


def test_what_the_reader_mended_is_told(small):
    found = describe(replace(small, num_skipped=3, num_reordered=2))
    assert (found.num_skipped, found.num_reordered) == (3, 2)


def test_a_trace_without_requests_is_refused():
    with pytest.raises(InvalidOperation, match="trace: expected at least 1 request, test has none"):
        describe(as_trace([]))


def test_the_trace_is_left_as_it_was(small):
    before = [array.copy() for array in (small.input_tokens, small.output_tokens, small.times, small.ids)]
    describe(small)
    for array, copy in zip((small.input_tokens, small.output_tokens, small.times, small.ids), before, strict=True):
        np.testing.assert_array_equal(array, copy)


# ---------------------------------------------------------------- against slow Python


def slow_figures(values: list[float]) -> Figures:
    if not values:
        return Figures(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(values)
    p50, p90, p99 = (ordered[math.ceil(p * len(values) / 100) - 1] for p in (50, 90, 99))
    return Figures(len(values), pytest.approx(sum(values) / len(values)), p50, p90, p99, ordered[-1])


def slow_hits(requests: list[list[int]]) -> list[int]:
    seen: set[int] = set()
    hits = []
    for request in requests:
        prefix = 0
        while prefix < len(request) and request[prefix] in seen:
            prefix += 1
        hits.append(prefix)
        seen.update(request)
    return hits


def slow_gaps(requests: list[list[int]], times: list[float]) -> tuple[list[float], list[float]]:
    uses: dict[int, list[tuple[int, float]]] = {}
    place = 0
    for request, time in zip(requests, times, strict=True):
        for block in request:
            uses.setdefault(block, []).append((place, time))
            place += 1
    pairs = [pair for of_block in uses.values() for pair in pairwise(of_block)]
    return [b[0] - a[0] for a, b in pairs], [b[1] - a[1] for a, b in pairs]


def slow_working_set(requests: list[list[int]], times: list[float], seconds: float) -> WorkingSet:
    whole = max(1, int(times[-1] // seconds))
    windows: dict[int, set[int]] = {}
    for request, time in zip(requests, times, strict=True):
        windows.setdefault(int(time // seconds), set()).update(request)
    counts = {window: len(blocks) for window, blocks in windows.items()}
    mean = sum(count for window, count in counts.items() if window < whole) / whole
    return WorkingSet(seconds, whole, mean, max(counts.values()))


def slow_hottest(requests: list[list[int]], block_tokens: int) -> list[HotPrefix]:
    """From every prefix that no chain has reached, follow those that more than half of its requests share."""
    uses: dict[tuple[int, ...], int] = {}
    for request in requests:
        for depth in range(1, len(request) + 1):
            prefix = tuple(request[:depth])
            uses[prefix] = uses.get(prefix, 0) + 1
    inside: set[tuple[int, ...]] = set()
    found = []
    for head in sorted(uses, key=lambda prefix: prefix[-1]):  # ids grow from parent to child
        if head in inside:
            continue
        end = head
        while heavy := [p for p in uses if p[:-1] == end and 2 * uses[p] > uses[head]]:
            (end,) = heavy
            inside.add(end)
        found.append(HotPrefix(end[-1], len(end), len(end) * block_tokens, uses[end]))
    shared = [prefix for prefix in found if prefix.requests > 1]
    return sorted(shared, key=lambda prefix: -prefix.requests)[:5]


@given(chained_traces(), st.data())
def test_every_figure_equals_the_slow_one(trace, data):
    requests = as_requests(trace)
    if not requests:
        return
    pauses = st.one_of(st.just(0.0), st.floats(0, 700, allow_subnormal=False))
    times = np.cumsum([0.0, *(data.draw(pauses) for _ in requests[1:])])
    sessions = np.array([data.draw(st.integers(-1, 3)) for _ in requests])
    outputs = np.array([data.draw(st.integers(0, 9)) for _ in requests])
    trace = replace(trace, times=times, sessions=sessions, output_tokens=outputs)
    found, seconds = describe(trace), times.tolist()

    assert found.requests == len(requests) and found.span_seconds == seconds[-1]
    assert found.sessions == (len(set(sessions.tolist()) - {-1}) or None)
    assert found.input_tokens == slow_figures(trace.input_tokens.tolist())
    assert found.output_tokens == slow_figures(outputs.tolist())

    blocks, hits = [block for request in requests for block in request], slow_hits(requests)
    told = found.content
    assert (told.accesses, told.distinct_blocks, told.hit_blocks) == (len(blocks), len(set(blocks)), sum(hits))
    assert told.hit_ratio == (sum(hits) / len(blocks) if blocks else 0.0)
    tokens = sum(
        min(hit * trace.block_tokens, length) for hit, length in zip(hits, trace.input_tokens.tolist(), strict=True)
    )
    assert told.hit_tokens == tokens
    assert told.token_hit_ratio == (tokens / trace.num_tokens if trace.num_tokens else 0.0)
    once = sum(blocks.count(block) == 1 for block in set(blocks))
    assert told.used_once == (once / len(set(blocks)) if blocks else 0.0)
    gap_accesses, gap_seconds = slow_gaps(requests, seconds)
    assert told.gap_accesses == slow_figures(gap_accesses) and told.gap_seconds == slow_figures(gap_seconds)
    for one in told.working_sets:
        assert one == slow_working_set(requests, seconds, one.seconds)
    depths = range(max(map(len, requests)))
    assert told.depth_accesses == tuple(sum(len(request) > d for request in requests) for d in depths)
    assert told.depth_hits == tuple(sum(hit > d for hit in hits) for d in depths)
    assert list(told.hottest) == slow_hottest(requests, trace.block_tokens)


# ---------------------------------------------------------------- the real ones


def test_the_hour_of_chat():
    found = describe(real_trace(CHAT))
    assert (found.requests, found.content.accesses, found.content.distinct_blocks) == (12_031, 288_500, 182_790)
    assert found.content.hit_blocks == 288_500 - 182_790  # chained: every block that was seen before is a hit
    assert found.content.hottest[0] == HotPrefix(block=0, blocks=1, tokens=512, requests=12_031)


def test_the_coding_agents():
    found = content(real_trace(AGENTS))
    assert (found.accesses, found.hit_blocks) == (1_225_897, 1_225_897 - 44_847)
    assert sum(found.depth_hits) == found.hit_blocks and sum(found.depth_accesses) == found.accesses
