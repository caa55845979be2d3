"""Snapshots: what is in them, as bytes and back, and ages in seconds out of ages in ticks."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from tests.engine.fakes import FakeRunner
from tests.server.fake_snapshots import FakeEngine

from pagedkv import BlockManager, InvalidOperation
from pagedkv.control.types import ACTIVE, CACHED, FREE, PINNED, SHARED
from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine.snapshot import MOST_POINTS, EngineStats, TickClock, decode, encode, take_snapshot
from pagedkv.tiers.rung import TierFigures


@pytest.fixture
def snapshot():
    engine = FakeEngine(256)
    for _ in range(60):
        engine.step()
    return engine.snapshot()


def test_every_kind_of_block_and_its_owner():
    engine = FakeEngine(8)
    cache = engine.cache
    cache.allocate(1, list(range(40)))
    cache.commit(1)
    cache.fork(1, 2)
    cache.append_batch([2], [[7]])
    cache.allocate(3, list(range(100, 116)))
    cache.commit(3)
    cache.pin(3)
    cache.allocate(4, list(range(200, 217)))
    cache.commit(4)
    cache.free(4)
    requests = [_request(engine, 1), _request(engine, 2), _request(engine, 9)]
    made = take_snapshot(cache, requests, EngineStats())
    kinds = {info.seq_id: [made.kinds[b] for b in info.block_ids] for info in cache.snapshot().sequences}
    assert kinds[1] == [SHARED, SHARED, ACTIVE] and kinds[2] == [SHARED, SHARED, ACTIVE] and kinds[3] == [PINNED]
    assert made.counts() == {"free": 2, "active": 2, "shared": 2, "cached": 1, "pinned": 1}
    assert [r.state for r in made.requests] == ["running", "running", "waiting"]
    assert [r.blocks for r in made.requests] == [3, 3, 0]
    for place, seq_id in ((0, 1), (1, 2)):
        assert made.blocks_of(place).tolist() == list(cache.get_sequence(seq_id).block_ids)
    assert set(made.owner[made.kinds == SHARED]) == {0} and set(made.owner[made.kinds == PINNED]) == {-1}
    assert made.depth[list(cache.get_sequence(1).block_ids)[:2]].tolist() == [0, 1]
    assert (made.age[made.kinds == FREE] == 0).all() and made.age[made.kinds == CACHED].max() <= made.tick


def _request(engine, number):
    from tests.server.fake_snapshots import FakeRequest

    return FakeRequest(number, [1, 2, 3])


def test_encoding_is_exact_and_small(snapshot):
    data = encode(snapshot)
    again = decode(data)
    for field in dataclasses.fields(snapshot):
        if field.name == "cost":
            continue
        mine, other = getattr(snapshot, field.name), getattr(again, field.name)
        same = (
            np.array_equal(mine, other) and mine.dtype == other.dtype if isinstance(mine, np.ndarray) else mine == other
        )
        assert same, field.name


def test_snapshots_with_tiers_and_those_from_before_are_read(snapshot):
    tier = TierFigures(medium="DISK", blocks=3, total_blocks=9, read_seconds=0.5)
    made = dataclasses.replace(snapshot, stats=dataclasses.replace(snapshot.stats, tiers=(tier,)))
    assert decode(encode(made)).stats == made.stats
    frame = msgspec.msgpack.decode(encode(made))
    del frame["stats"]["tiers"]
    assert decode(msgspec.msgpack.encode(frame)).stats == snapshot.stats


def test_a_large_calm_pool_takes_few_bytes():
    assert len(encode(FakeEngine(50_000).snapshot())) < 50_000 / 10


def test_an_empty_pool():
    made = take_snapshot(BlockManager(0, 16), [], EngineStats())
    assert decode(encode(made)).total_blocks == 0


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"num_blocks": 255},
        {"num_blocks": 2**40},
        {"num_blocks": -1},
        {"columns": b"no zlib"},
        {"requests": []},
        {"taken": "now"},
    ],
)
def test_what_is_no_snapshot_is_refused(snapshot, change):
    broken = msgspec.msgpack.encode(msgspec.msgpack.decode(encode(snapshot)) | change)
    with pytest.raises(InvalidOperation, match="data: expected"):
        decode(broken)


@pytest.mark.parametrize("data", [b"", b"\x81", b"\xc1" * 40, b'{"version": 1}'])
def test_other_bytes_are_refused(data):
    with pytest.raises(InvalidOperation, match="data: expected"):
        decode(data)


def test_every_truncation_is_refused(snapshot):
    data = encode(snapshot)
    for size in range(0, len(data), 97):
        with pytest.raises(InvalidOperation):
            decode(data[:size])


def test_hottest_prefixes_against_a_count_by_hand():
    cache = BlockManager(64, 4)
    common, longer = list(range(12)), list(range(12)) + [50, 51, 52, 53]
    for seq, tokens in enumerate([common + [90 + i] for i in range(3)] + [longer + [99], longer + [98]]):
        cache.allocate(seq, tokens)
        cache.commit(seq)
        cache.free(seq)
    found = cache.hottest_prefixes(5, max_tokens=100)
    assert [(p.num_tokens, p.uses, p.token_ids) for p in found] == [
        (12, 5, tuple(common)),
        (16, 2, tuple(longer)),
    ]
    assert cache.hottest_prefixes(1)[0].token_ids == ()
    cache.clear_prefix_cache()
    assert cache.hottest_prefixes() == ()


# Ticks to seconds.


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
