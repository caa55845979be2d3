"""The adaptive strategy: equal to a slow twin to the count, the same everywhere, sane in every pool, worth having."""

from __future__ import annotations

import heapq
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from tests.control.slow_adaptive import SlowAdaptive
from tests.sim.traces import AGENTS, CHAT, real_outputs, real_times, real_trace

from pagedkv import Adaptive, BlockManager, CorruptedState, InvalidOperation, SequenceNotFound
from pagedkv.control.content_cache import ContentCache
from pagedkv.control.prefix import name_of
from pagedkv.control.turns import code_of, length_of, mean_gap
from pagedkv.sim import synthesize

LEARNED = 3_993
REAL = [
    (CHAT, 2_000, 29_300),
    (CHAT, 5_000, 48_759),
    (CHAT, 10_000, 66_488),
    (CHAT, 20_000, 85_565),
    (AGENTS, 1_000, 552_573),
    (AGENTS, 2_000, 877_293),
    (AGENTS, 4_000, 1_114_882),
    (AGENTS, 8_000, 1_169_640),
]
BY_TIME = [
    (CHAT, 5_000, 48_759),
    (AGENTS, 500, 320_007),
    (AGENTS, 700, 430_233),
    (AGENTS, 1_000, 570_063),
    (AGENTS, 1_400, 733_890),
    (AGENTS, 2_000, 886_084),
]
BY_OUTPUTS = [
    (CHAT, 5_000, 48_759),
    (AGENTS, 500, 331_762),
    (AGENTS, 700, 440_991),
    (AGENTS, 1_000, 590_780),
    (AGENTS, 1_400, 754_429),
    (AGENTS, 2_000, 905_293),
]


def popular(seed, requests, prompts=90, length=8, fresh=3):
    """Prompts of a power-law popularity, each request with an end of its own; the popular ones are worth keeping."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length, prompts)
    starts = 10**6 + np.concatenate([[0], np.cumsum(lengths)])
    chances = 1 / np.arange(1, prompts + 1) ** 0.8
    made, new = [], 0
    for prompt in rng.choice(prompts, requests, p=chances / chances.sum()):
        grown = int(rng.integers(0, 2 * fresh))
        made.append([*range(starts[prompt], starts[prompt] + lengths[prompt]), *range(new, new + grown)])
        new += grown
    return made


def in_a_loop(requests, prompts=40, length=9):
    """The same prompts in turn: recency is as good as anything that can be learned from their ages."""
    return [
        list(range(2 * 10**6 + i % prompts * length, 2 * 10**6 + (i % prompts + 1) * length)) for i in range(requests)
    ]


def sessions(seed, requests, parallel=12):
    """Sessions that grow and end: who waits longest is done."""
    rng = np.random.default_rng(seed)
    made, new, live = [], 3 * 10**6, [[] for _ in range(parallel)]
    for _ in range(requests):
        i = int(rng.integers(parallel))
        if len(live[i]) > 25 or rng.random() < 0.03:
            live[i] = []
        grown = int(rng.integers(1, 4))
        live[i] = [*live[i], *range(new, new + grown)]
        new += grown
        made.append(live[i])
    return made


def at_their_own_pace(seed, requests, live=16):
    """Sessions that grow and end, each at its own pace: who waited long before will wait long again."""
    rng = np.random.default_rng(seed)
    waiting = [(rng.exponential(), i, math.exp(rng.normal()), []) for i in range(live)]
    heapq.heapify(waiting)
    made, new = [], 4 * 10**6
    while len(made) < requests:
        time, i, pace, session = heapq.heappop(waiting)
        if session and rng.random() < 0.02:
            pace, session = math.exp(rng.normal()), []
        grown = int(rng.integers(0, 4) if session else rng.integers(1, 10))
        session = [*session, *range(new, new + grown)]
        new += grown
        made.append(session)
        heapq.heappush(waiting, (time + pace * math.exp(0.8 * rng.normal()), i, pace, session))
    return made


TRAFFIC = {
    "paces": lambda: at_their_own_pace(6, 3000),
    "popular": lambda: popular(1, 3000),
    "sessions": lambda: sessions(2, 3000),
    "both, then a loop": lambda: popular(3, 1500) + sessions(4, 1500) + in_a_loop(600) + popular(5, 1500),
}


def arrays(requests):
    offsets = np.cumsum([0, *map(len, requests)]).astype(np.int64)
    return np.array([block for request in requests for block in request], np.int64), offsets


def run(cache, requests, times=None, outputs=None):
    hits = cache.run(*arrays(requests), times, outputs).tolist()
    cache.check()
    return hits


def learner(cache):
    return cache._state.learner


def lives(cache):
    return [learner(cache).classes[field].tolist() for field in ("short", "long")]


CELLS = [
    ("popular", 40, 3000),
    ("popular", 1100, 1600),
    ("sessions", 7, 3000),
    ("sessions", 40, 2000),
    ("paces", 90, 1500),
    ("both, then a loop", 1, 3000),
    ("both, then a loop", 2, 3000),
    ("both, then a loop", 40, 5100),
]


def by_a_clock(requests, seed=7):
    """Times in seconds, ascending."""
    return np.cumsum(np.random.default_rng(seed).exponential(2.0, len(requests)))


TIMED = [(*cell, False, False) for cell in CELLS]
TIMED += [("paces", 90, 800, False, True)] + [
    (*cell, True, writes) for cell in (("popular", 40, 600), ("paces", 90, 1500)) for writes in (False, True)
]


def written(requests, seed=8):
    """How many tokens each request writes; a tenth of them do not say."""
    draw = np.random.default_rng(seed)
    return np.where(draw.random(len(requests)) < 0.1, 0, draw.geometric(1 / 300, len(requests)))


@pytest.mark.parametrize(("traffic", "capacity", "count", "has_clock", "writes"), TIMED)
def test_it_is_its_slow_twin_to_the_count(traffic, capacity, count, has_clock, writes):
    requests = TRAFFIC[traffic]()[:count]
    times = by_a_clock(requests) if has_clock else None
    outputs = written(requests) if writes else None
    twin, cache = SlowAdaptive(capacity, name_of("")), ContentCache(capacity, "adaptive")
    expected = twin.run(requests, times.tolist() if has_clock else None, outputs.tolist() if writes else None)
    assert run(cache, requests, times, outputs) == expected
    totals = learner(cache).totals[0]
    assert (totals.lessons, totals.rules) == (twin.lessons, twin.rules)
    assert (totals.pauses, learner(cache).factors.tolist()) == (
        twin.pauses.count,
        twin.pauses.weights if twin.pauses.count else [0.0] * 4,
    )
    assert (totals.pauses > 100) == (has_clock and writes)
    assert lives(cache) == [twin.short, twin.long]
    assert twin.lessons > 0 and sum(expected) > 0
    assert twin.flips > 1 or (traffic, capacity) != ("both, then a loop", 40)
    assert twin.reigns[2] > 0 or traffic != "paces"


def test_what_it_learns_is_worth_having():
    requests = TRAFFIC["popular"]()
    learned, recent = (sum(run(ContentCache(40, strategy), requests)) for strategy in ("adaptive", "lru"))
    assert (learned, recent) == (LEARNED, 2305)


def test_of_sessions_with_their_own_pace_it_keeps_those_that_come_back_soon():
    requests = TRAFFIC["paces"]()
    learned, recent = (sum(run(ContentCache(90, strategy), requests)) for strategy in ("adaptive", "lru"))
    assert learned >= 1.02 * recent > 0


def in_busy_and_quiet_hours(seed, requests, live=24):
    """Sessions at their own pace, and the times of their requests; in busy hours others ask much more in between."""
    draw = np.random.default_rng(seed)
    waiting = [(draw.exponential(), i, math.exp(1.5 * draw.normal()), []) for i in range(live)]
    heapq.heapify(waiting)
    made, times, new = [], [], 5 * 10**6
    while len(made) < requests:
        time, i, pace, session = heapq.heappop(waiting)
        if session and draw.random() < 0.01:
            pace, session = math.exp(1.5 * draw.normal()), []
        grown = int(draw.integers(0, 2) if session else draw.integers(5, 15))
        session = [*session, *range(new, new + grown)]
        new += grown
        made.append(session)
        times.append(time)
        for _ in range(int(draw.integers(0, 8)) if time % 20 < 10 else 0):
            made.append(list(range(new, new + 6)))
            times.append(time)
            new += 6
        heapq.heappush(waiting, (time + pace * math.exp(0.3 * draw.normal()), i, pace, session))
    return made, np.array(times)


def test_a_clock_tells_more_of_pauses_than_counting_does_where_the_load_varies():
    requests, times = in_busy_and_quiet_hours(1, 6000)
    timed, counted = (sum(run(ContentCache(110, "adaptive"), requests, when)) for when in (times, None))
    assert timed >= 1.02 * counted > 0


def by_calls_in_time(cache, now, requests, times, finish=lambda seq_id: None):
    """Allocate, commit, finish and free, one request after the other, at these times."""
    found = []
    for seq_id, request in enumerate(requests):
        now[0] = times[seq_id]
        found.append(cache.allocate(seq_id, request).num_cached_tokens)
        cache.commit(seq_id)
        finish(seq_id)
        cache.free(seq_id)
    cache.check()
    return found


def test_a_pause_is_timed_by_the_clock_of_the_cache():
    requests = [[*request[:36], 10**8 + i] for i, request in enumerate(TRAFFIC["paces"]()[:1500])]
    times, now = by_a_clock(requests), [0.0]
    expected = run(ContentCache(90, "adaptive"), requests, times)
    found = by_calls_in_time(ContentCache(90, "adaptive", clock=lambda: now[0]), now, requests, times)
    assert found == expected != run(ContentCache(90, "adaptive"), requests)
    now[0] = 0.0
    cache = ContentCache(90, "adaptive", clock=lambda: now[0])
    for i, now[0] in enumerate(times.tolist()):
        assert run(cache, requests[i : i + 1]) == expected[i : i + 1]


@pytest.mark.parametrize("days", [0, 97.09, 194.18])
def test_when_the_clock_began_makes_no_difference(days):
    requests = TRAFFIC["paces"]()[:1500]
    expected = run(ContentCache(90, "adaptive"), requests, by_a_clock(requests))
    assert run(ContentCache(90, "adaptive"), requests, by_a_clock(requests) + 86_400 * days) == expected


@pytest.mark.parametrize("clock", [0, "now", 1.5])
def test_a_clock_is_a_function(clock):
    with pytest.raises(InvalidOperation, match="clock: expected a function that returns seconds, got"):
        BlockManager(4, 1, strategy="adaptive", clock=clock)


def test_times_and_outputs_are_one_for_each_request():
    cache = ContentCache(4, "adaptive")
    with pytest.raises(InvalidOperation, match="times: expected one for each of 2 requests, got 1"):
        cache.run(*arrays([[1], [2]]), np.zeros(1))
    with pytest.raises(InvalidOperation, match="outputs: expected one for each of 2 requests, got 3"):
        cache.run(*arrays([[1], [2]]), outputs=np.zeros(3, np.int64))
    with pytest.raises(InvalidOperation, match="outputs: expected a flat int64 array, got float64"):
        cache.run(*arrays([[1], [2]]), outputs=np.zeros(2))
    with pytest.raises(InvalidOperation, match="outputs: expected 0 or more tokens, got -1"):
        cache.run(*arrays([[1], [2]]), outputs=np.array([5, -1]))
    with pytest.raises(InvalidOperation, match="tokens: expected"):
        cache.tell_output(1, -1)
    with pytest.raises(SequenceNotFound):
        cache.tell_output(1, 1)
    assert cache.stats.blocks_reclaimed == cache.cached_block_count == 0


# ---------------------------------------------------------------- what turns write


def after_long_answers(seed, requests, live=24):
    """Sessions whose pauses follow from how much the turn wrote, with the times and outputs of their requests."""
    draw = np.random.default_rng(seed)
    waiting = [(draw.exponential(), i, []) for i in range(live)]
    heapq.heapify(waiting)
    made, times, outputs, new = [], [], [], 6 * 10**6
    while len(made) < requests:
        time, i, session = heapq.heappop(waiting)
        session = [] if session and draw.random() < 0.01 else session
        grown = int(draw.integers(0, 2) if session else draw.integers(5, 15))
        session = [*session, *range(new, new + grown)]
        new += grown
        made.append(session)
        times.append(time)
        outputs.append(int(np.exp(draw.normal(5, 1.5))) + 1)
        heapq.heappush(waiting, (time + outputs[-1] * math.exp(0.3 * draw.normal()), i, session))
    return made, np.array(times), np.array(outputs)


def test_how_much_a_turn_writes_tells_how_long_the_session_waits():
    requests, times, outputs = after_long_answers(1, 6000)
    told, untold = (sum(run(ContentCache(110, "adaptive"), requests, times, some)) for some in (outputs, None))
    misleading = sum(run(ContentCache(110, "adaptive"), requests, times, np.roll(outputs, 1)))
    assert told >= 1.05 * untold > 0 and misleading >= 0.98 * untold


def test_a_regression_that_learns_nothing_new_stays_bounded():
    requests, times, _ = after_long_answers(2, 3000)
    cache = ContentCache(110, "adaptive")
    for _ in range(4):
        run(cache, requests, times, np.full(3000, 7))
    doubts = learner(cache).doubts.reshape(4, 4)
    assert learner(cache).totals[0].pauses > 8000
    assert np.isfinite(learner(cache).factors).all() and np.trace(doubts) < 2 * 200
    assert (doubts == doubts.T).all() and np.linalg.eigvalsh(doubts).min() > -1e-6


def test_what_is_told_of_a_sequence_is_what_is_told_of_a_request():
    requests, times, outputs = after_long_answers(3, 1500)
    requests = [[*request, 10**8 + i] for i, request in enumerate(requests)]
    expected, now = run(ContentCache(110, "adaptive"), requests, times, outputs), [0.0]
    cache = ContentCache(110, "adaptive", clock=lambda: now[0])
    assert by_calls_in_time(cache, now, requests, times, lambda i: cache.tell_output(i, int(outputs[i]))) == expected
    assert expected != run(ContentCache(110, "adaptive"), requests, times)


def test_the_books_count_the_tokens_that_a_sequence_writes():
    cache = BlockManager(400, 4, strategy="adaptive", clock=lambda: 0.0)

    def told(seq_id):
        cache.commit(seq_id)
        first = cache.plan([seq_id]).block_tables[0, 0]
        cache.free(seq_id)
        return cache._state.learner.waits["output"][first]

    cache.allocate(1, range(10))
    cache.append(1, [7, 7, 7])
    cache.truncate(1, 11)  # a draft of which one token was accepted
    cache.append_batch([1], [[8] * 9])
    cache.allocate(2, range(100, 110))
    cache.fork(1, 3)
    cache.append(3, [9])
    cache.allocate(4, range(200, 210))
    cache.append(4, [1])
    cache.truncate(4, 9)  # more than it wrote
    cache.allocate(5, range(300, 310))
    cache.append(5, 1000)
    cache.append(5, [])
    assert [told(seq_id) for seq_id in (2, 4, 5)] == [0, 0, code_of(1000)]
    assert told(1) == 0  # the fork holds its blocks
    assert told(3) == code_of(11)
    cache.check()


def test_a_listener_changes_nothing():
    requests, times, outputs = after_long_answers(5, 800)
    cache, heard = ContentCache(60, "adaptive"), []
    cache.subscribe(heard.append)
    assert run(cache, requests, times, outputs) == run(ContentCache(60, "adaptive"), requests, times, outputs) and heard


def test_a_gap_is_kept_to_a_thousandth():
    for gap in [*range(1, 3000), 10**6 + 7, 2**31 - 1]:
        assert gap * 0.999 - 1 <= length_of(mean_gap(gap, np.uint16(0))) <= gap
    assert mean_gap(0, np.uint16(0)) == mean_gap(1, np.uint16(0)) == 1
    slow = mean_gap(1, np.uint16(0))
    for _ in range(60):
        slow = mean_gap(5000, np.uint16(slow))
    assert 0.98 * 5000 < length_of(slow) <= 5000


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("capacity", [20, 60, 150, 400])
def test_it_loses_no_thousandth_against_recency(traffic, capacity):
    requests = TRAFFIC[traffic]()
    learned, recent = (sum(run(ContentCache(capacity, strategy), requests)) for strategy in ("adaptive", "lru"))
    assert learned >= recent - 0.001 * sum(map(len, requests))


@pytest.mark.parametrize(("blocks", "least"), [(8_000, 1_500), (16_000, 0)])
def test_a_sudden_change_of_traffic_uses_up_little_of_what_was_won(blocks, least):
    prompts = synthesize(
        "chat", requests=3000, block_tokens=64, turns=1.1, system_prompts=2000, system_tokens=1500, first_tokens=300
    )
    sessions = synthesize(
        "chat", requests=4000, block_tokens=64, turns=15, think_seconds=60, first_tokens=600, rate=2.0
    )
    ids = np.concatenate([prompts.ids, sessions.ids + np.int32(prompts.num_distinct)])
    offsets = np.concatenate([prompts.offsets, prompts.num_accesses + sessions.offsets[1:]])
    learned, recent = (int(ContentCache(blocks, name).run(ids, offsets).sum()) for name in ("adaptive", "lru"))
    assert learned - recent >= least


def by_calls(cache, requests):
    """Allocate, commit and free, one request after the other."""
    hits = []
    for seq_id, request in enumerate(requests):
        info = cache.allocate(seq_id, request)
        hits.append(info.num_cached_tokens // cache.block_size)
        cache.commit(seq_id)
        cache.free(seq_id)
    cache.check()
    return hits


def test_the_caches_that_serve_models_learn_the_same():
    requests = [[*request[:36], 10**8 + i] for i, request in enumerate(TRAFFIC["both, then a loop"]()[:3500])]
    expected = run(ContentCache(40, "adaptive"), requests)
    assert by_calls(ContentCache(40, "adaptive"), requests) == expected
    assert by_calls(BlockManager(40, 1, strategy="adaptive"), requests) == expected
    assert sum(expected) > sum(run(ContentCache(40, "lru"), requests)) > 0


def test_a_trace_in_pieces_and_with_a_listener():
    requests = TRAFFIC["popular"]()
    expected = run(ContentCache(40, "adaptive"), requests)
    cache, heard = ContentCache(40, "adaptive"), []
    cache.subscribe(heard.append)
    assert [hit for i in range(0, 3000, 100) for hit in run(cache, requests[i : i + 100])] == expected and heard


def test_without_the_compiler_it_is_the_same():
    code = (
        "from tests.control.test_adaptive import *; cache = ContentCache(40, 'adaptive');"
        "print(run(cache, TRAFFIC['popular']()[:520]), lives(cache))"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    cache = ContentCache(40, "adaptive")
    hits = run(cache, TRAFFIC["popular"]()[:520])
    assert found.stdout.strip() == f"{hits} {lives(cache)}" and learner(cache).totals[0].lessons > 0


@pytest.mark.parametrize("blocks", [0, 1, 2, 50, 511, 512, 1023, 1024, 10_000_000])
@pytest.mark.parametrize("block_size", [1, 16, 1024])
def test_pools_of_any_size(blocks, block_size):
    if blocks * block_size > 10**9:
        block_size = 16
    manager = BlockManager(blocks, block_size, strategy="adaptive", on_full="evict")
    for seq_id in range(min(30, 20 * blocks)):
        manager.allocate(seq_id, min(blocks, 3) * block_size)
    shadows = manager._state.learner
    assert 1 <= shadows.totals[0].room < 1024 and manager.num_sequences == min(30, 20 * blocks, max(1, blocks // 3))
    if blocks < 2000:
        manager.check()


def test_clearing_forgets_blocks_but_not_lessons():
    requests = TRAFFIC["popular"]()
    cache = ContentCache(40, "adaptive")
    run(cache, requests)
    before, lessons = lives(cache), learner(cache).totals[0].lessons
    assert cache.clear_prefix_cache() == 40
    cache.check()
    assert not cache._state.notes["kind"].any() and learner(cache).totals[0].shadow_size == 0
    assert lives(cache) == before and learner(cache).totals[0].lessons == lessons > 0
    assert run(cache, requests[:5])[0] == 0
    assert sum(run(cache, requests)) > 3000


def test_check_compares_notes_and_blocks():
    cache = ContentCache(40, "adaptive")
    run(cache, TRAFFIC["popular"]()[:50])
    cache._state.notes[3]["kind"] = 0
    with pytest.raises(CorruptedState, match="notes and cached blocks differ"):
        cache.check()


def test_check_compares_both_orders_of_leaves():
    requests, times, outputs = after_long_answers(1, 3000)
    cache = ContentCache(110, "adaptive")
    run(cache, requests, times, outputs)
    assert cache._state.counters[0].by_turns == 1
    cache._state.expected["score"][cache._state.heap[110]] += 10**12
    with pytest.raises(CorruptedState, match="order by turns"):
        cache.check()


def test_two_caches_of_one_object_learn_apart():
    strategy, requests = Adaptive(), TRAFFIC["popular"]()
    alone = run(ContentCache(40, Adaptive()), requests)
    one, two = ContentCache(40, strategy), ContentCache(40, strategy)
    run(two, TRAFFIC["sessions"]())
    assert run(one, requests) == alone


# ---------------------------------------------------------------- real traffic


@pytest.mark.parametrize(("name", "blocks", "hits"), REAL)
def test_frozen_counts_on_real_traces(name, blocks, hits):
    trace = real_trace(name)
    assert int(ContentCache(blocks, "adaptive").run(trace.ids, trace.offsets).sum()) == hits


@pytest.mark.parametrize(("name", "blocks", "hits"), BY_TIME)
def test_frozen_counts_on_real_traces_in_time(name, blocks, hits):
    trace = real_trace(name)
    assert int(ContentCache(blocks, "adaptive").run(trace.ids, trace.offsets, real_times(name)).sum()) == hits


@pytest.mark.parametrize(("name", "blocks", "hits"), BY_OUTPUTS)
def test_frozen_counts_on_real_traces_with_outputs(name, blocks, hits):
    trace, times, outputs = real_trace(name), real_times(name), real_outputs(name)
    assert int(ContentCache(blocks, "adaptive").run(trace.ids, trace.offsets, times, outputs).sum()) == hits


# What leaf LRU and the optimum find on the chat trace.
LEAF_LRU = {2_000: 15_665, 5_000: 32_260, 10_000: 61_046, 20_000: 83_035}
OPTIMUM = {5_000: 98_448, 10_000: 105_710}

# And on the agents.
AGENTS_LRU = {
    500: 268_993,
    700: 359_976,
    1_000: 499_793,
    1_400: 676_737,
    2_000: 870_929,
    4_000: 1_114_882,
    8_000: 1_169_640,
}
AGENTS_OPTIMUM = {500: 564_828, 700: 678_707, 1_000: 805_929, 1_400: 926_540, 2_000: 1_035_517}


def test_the_counts_meet_the_targets():
    counts = {(name, blocks): hits for name, blocks, hits in REAL}
    for blocks, lru in LEAF_LRU.items():
        assert counts[CHAT, blocks] >= lru
    for blocks, share in ((5_000, 0.2), (10_000, 0.1)):
        assert counts[CHAT, blocks] - LEAF_LRU[blocks] >= share * (OPTIMUM[blocks] - LEAF_LRU[blocks])
    for blocks in (1_000, 2_000, 4_000, 8_000):
        assert counts[AGENTS, blocks] >= AGENTS_LRU[blocks] - 0.001 * 1_225_897
    told = {(name, blocks): hits for name, blocks, hits in BY_OUTPUTS}
    for blocks, optimum in AGENTS_OPTIMUM.items():
        assert told[AGENTS, blocks] - AGENTS_LRU[blocks] >= 0.2 * (optimum - AGENTS_LRU[blocks])
