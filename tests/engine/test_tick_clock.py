"""Ages in seconds out of ages in ticks."""

from __future__ import annotations

import numpy as np
import pytest
from tests.engine.fakes import FakeRunner
from tests.server.fake_snapshots import FakeEngine

from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine.snapshot import MOST_POINTS, TickClock, decode, encode


def test_the_newest_point_is_always_there():
    clock = TickClock()
    for step in range(100):
        clock.mark(3 * step, 0.01 * step)
        assert clock.ago(50.0)[-1] == (3 * step, pytest.approx(50 - 0.01 * step))
    assert 4 <= len(clock.ago(50.0)) <= 7  # a quarter of a second apart


def test_what_is_long_ago_is_sparser_and_points_stay_few():
    clock = TickClock()
    for second in range(10_000):
        clock.mark(second, float(second))
        assert len(clock.ago(0.0)) <= MOST_POINTS
    ticks, ago = zip(*clock.ago(10_000.0), strict=True)
    assert ticks[0] == 0 and list(ticks) == sorted(set(ticks)) and ticks[-60:] == tuple(range(9_940, 10_000))
    for age in (1, 100, 5_000):  # the pace was even, so that the gaps do not matter
        assert np.interp(10_000 - age, ticks, ago) == pytest.approx(age)


def test_a_snapshot_tells_seconds(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    llm = LLM(FakeRunner(num_blocks=16, block_size=4))
    old, new = list(range(1, 10)), list(range(20, 29))
    for prompt in (old, new):
        llm.generate([prompt], SamplingParams(max_tokens=2))
        now[0] += 60
    snapshot = decode(encode(llm.core.snapshot()))
    ages = sorted({int(age) for age, kind in zip(snapshot.age, snapshot.kinds, strict=True) if kind})
    assert snapshot.seconds_since(ages[0]) == pytest.approx(60) and snapshot.seconds_since(ages[-1]) == pytest.approx(
        120
    )
    assert snapshot.seconds_since(10**6) == pytest.approx(120)  # at least


def test_without_a_clock_there_are_no_seconds():
    assert FakeEngine(4).snapshot().seconds_since(3) is None
