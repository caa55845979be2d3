"""Snapshots: what is in them, as bytes and back, and how often they are taken."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
import numpy as np
import pytest
from tests.server.fake_snapshots import FakeEngine

from pagedkv import BlockManager, InvalidOperation
from pagedkv.control.types import ACTIVE, CACHED, FREE, PINNED, SHARED
from pagedkv.engine.snapshot import EngineStats, decode, encode, take_snapshot
from pagedkv.server.live import SnapshotSource


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


def test_one_snapshot_serves_all_who_ask_at_once():
    engine = FakeEngine(64)

    async def ask():
        source = SnapshotSource(engine, interval=60)
        first = await asyncio.gather(*(source.now() for _ in range(20)))
        return {id(snapshot) for snapshot in first}, source.taken

    seen, taken = asyncio.run(ask())
    assert len(seen) == 1 and taken == 1 == engine.snapshots


def test_a_costly_snapshot_is_taken_less_often():
    engine = FakeEngine(64)
    cheap = engine.snapshot
    engine.snapshot = lambda: dataclasses.replace(cheap(), cost=3.0)

    async def ask():
        source = SnapshotSource(engine, interval=0.0)
        await source.now()
        await asyncio.sleep(0.01)
        await source.now()
        return source.taken

    assert asyncio.run(ask()) == 1
