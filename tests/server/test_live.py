"""The stream behind the live page: what it sends, who may read it, and that it costs nothing while nobody looks."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
import zlib

import httpx
import numpy as np
import pytest
from tests.server.fake_snapshots import FakeEngine, app_around, server_state

from pagedkv.server import live
from pagedkv.server.live import SnapshotSource


@pytest.fixture
def engine():
    engine = FakeEngine(256)
    for _ in range(20):
        engine.step()
    return engine


def client_of(engine, **config):
    app = app_around(server_state(engine, **config), live.page_router, live.stream_router)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def read(engine, count, step=True):
    """Return the first events of a stream, the engine making a step after each."""
    state = server_state(engine)
    source = SnapshotSource(engine, interval=0.01)
    found = []
    stream = live._events(state, source)
    async for event in stream:
        assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
        found.append(json.loads(event[6:]))
        if len(found) == count:
            break
        if step:
            engine.step()
    assert source.watchers == 1
    await stream.aclose()
    assert source.watchers == 0
    return found


def test_events_hold_the_pool(engine):
    first, second = asyncio.run(read(engine, 2))
    assert first["model"] == "pysmall" and first["num_blocks"] == 256 and second["tick"] > first["tick"]
    raw = zlib.decompress(base64.b64decode(second["columns"]))
    tables = sum(request["blocks"] for request in second["requests"])
    assert len(raw) == 13 * 256 + 4 * tables
    kinds = np.frombuffer(raw, np.uint8, 256)
    assert np.array_equal(kinds, engine.snapshot().kinds)
    assert second["stats"]["blocks_used"] == engine.cache.used_block_count
    assert "salt" not in json.dumps(second)


def test_blocks_are_sent_again_only_when_they_changed(engine):
    first, second, third = asyncio.run(read(engine, 3, step=False))
    assert first["columns"] and second["columns"] is None is third["columns"]


def test_a_quiet_engine_is_heard_now_and_then(engine, monkeypatch):
    monkeypatch.setattr(live, "SECONDS_BETWEEN_SIGNS", 0.05)
    for request in [*engine.running]:
        engine.cache.free(request.sequences[0].seq_id)
    engine.running.clear()
    engine.waiting.clear()
    first, second = asyncio.run(read(engine, 2, step=False))
    assert second["taken"] - first["taken"] >= 0.05 and second["columns"] is None


def test_nobody_looks_and_no_snapshot_is_taken(engine):
    async def look_away():
        async with client_of(engine) as client:
            assert (await client.get("/")).status_code == 200
            await asyncio.sleep(0.3)

    asyncio.run(look_away())
    assert engine.snapshots == 0


def test_a_slow_reader_holds_up_nobody_and_gets_the_newest(engine):
    async def dawdle():
        state, source = server_state(engine), SnapshotSource(engine, interval=0.01)
        stream = live._events(state, source)
        await anext(stream)
        for _ in range(50):
            engine.step()
        await asyncio.sleep(0.2)
        taken = source.taken
        event = json.loads((await anext(stream))[6:])
        await stream.aclose()
        return taken, event["tick"]

    taken, tick = asyncio.run(dawdle())
    assert taken == 1 and tick == engine.snapshot().tick


def test_the_stream_ends_when_the_server_drains(engine):
    async def drain():
        state, source = server_state(engine), SnapshotSource(engine, interval=0.01)
        stream = live._events(state, source)
        await anext(stream)
        state.draining = True
        return [event async for event in stream]

    assert asyncio.run(asyncio.wait_for(drain(), 10)) == []


def test_too_many_readers_are_turned_away(engine, monkeypatch):
    monkeypatch.setattr(live, "MAX_WATCHERS", 0)

    async def knock():
        async with client_of(engine) as client:
            return await client.get("/v1/cache/stream")

    answer = asyncio.run(knock())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and engine.snapshots == 0


def test_the_page_is_open_and_the_stream_wants_the_key(engine):
    async def knock():
        async with client_of(engine, api_keys=("secret",)) as client:
            page = await client.get("/")
            refused = [await client.get("/v1/cache/stream", headers=h) for h in ({}, {"Authorization": "Bearer x"})]
            return page, refused

    page, refused = asyncio.run(knock())
    assert page.status_code == 200 and [answer.status_code for answer in refused] == [401, 401]
    assert engine.snapshots == 0


def test_tenants_do_not_see_the_pool_of_all(engine):
    async def knock():
        async with client_of(engine, api_keys=("a", "b"), operator_keys=("o",)) as client:
            return await client.get("/v1/cache/stream", headers={"Authorization": "Bearer a"})

    assert asyncio.run(knock()).status_code == 403


def test_the_page_brings_everything_and_allows_nothing_else(engine):
    async def fetch():
        async with client_of(engine) as client:
            names = [*live._PAGE_FILES]
            return {name: await client.get(f"/page/{name}") for name in [*names, "..%2flive.py", "none.js"]}

    parts = asyncio.run(fetch())
    assert parts.pop("..%2flive.py").status_code == 404 and parts.pop("none.js").status_code == 404
    for name, part in parts.items():
        assert part.status_code == 200, name
        assert part.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'"), name
        assert part.headers["x-content-type-options"] == "nosniff"
        text = part.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text, name
    assert "style=" not in parts["index.html"].text and "<script>" not in parts["index.html"].text


def test_snapshots_come_four_times_a_second_at_most(engine):
    async def watch():
        source = SnapshotSource(engine)
        await source.now()
        started = time.monotonic()
        for _ in range(3):
            await source.next()
        return time.monotonic() - started

    assert asyncio.run(watch()) >= 0.7


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
