"""GET /v1/cache and the binary snapshot: right figures, no words unless allowed, no salts ever."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.server.fake_snapshots import FakeEngine, app_around, server_state

from pagedkv.engine.snapshot import decode
from pagedkv.server import admin


@pytest.fixture
def engine():
    engine = FakeEngine(256)
    for _ in range(40):
        engine.step()
    return engine


def get(engine, path, key=None, **config):
    app = app_around(server_state(engine, **config), admin.cache_router)
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_the_figures_are_the_caches_own(engine):
    body = get(engine, "/v1/cache").json()
    cache = engine.cache
    assert sum(body["blocks"].values()) == body["num_blocks"] == 256
    assert body["blocks"]["active"] + body["blocks"]["shared"] == cache.used_block_count
    assert body["blocks"]["cached"] == cache.cached_block_count
    assert body["usage"] == cache.utilization and body["block_size"] == 16 and body["strategy"] == "LRU"
    stats = engine.stats()
    assert body["prefix_hit_rate"] == pytest.approx(stats.prefix_hits / stats.prefix_queries)
    assert {r["request_id"]: r["prompt_tokens"] for r in body["requests"]} == {
        r.request_id: r.num_prompt_tokens for r in [*engine.running, *engine.waiting]
    }
    assert body["num_requests"] == len(body["requests"])
    for request, shown in zip(engine.running, body["requests"], strict=False):
        assert shown["blocks"] == cache.get_sequence(request.branches[0].seq_id).num_blocks > 0
    hottest = body["hottest_prefixes"]
    assert hottest and hottest[0]["uses"] >= 2
    assert all(cache.block(p["block_id"]).state != "free" for p in hottest)


def test_no_words_unless_the_operator_allows_them(engine):
    assert [p["text"] for p in get(engine, "/v1/cache").json()["hottest_prefixes"]] == [None] * len(
        get(engine, "/v1/cache").json()["hottest_prefixes"]
    )
    shown = get(engine, "/v1/cache", show_tokens=True).json()["hottest_prefixes"]
    systems = [" ".join(f"t{i}" for i in system) for system in engine.systems]
    assert shown[0]["text"] and any(text.startswith(shown[0]["text"][:40]) for text in systems)


def test_no_salt_is_shown(engine):
    engine.cache.allocate(10**6, list(range(40)), cache_salt="tenant-secret")
    engine.cache.commit(10**6)
    for path in ("/v1/cache", "/v1/cache/snapshot"):
        assert b"tenant-secret" not in get(engine, path, show_tokens=True).content


def test_long_lists_are_cut_where_wished(engine):
    body = get(engine, "/v1/cache?max_requests=2").json()
    assert len(body["requests"]) == 2 < body["num_requests"]
    assert get(engine, "/v1/cache?max_requests=-1").status_code in (400, 422)


def test_the_snapshot_is_what_top_reads(engine):
    answer = get(engine, "/v1/cache/snapshot")
    assert answer.headers["content-type"] == "application/vnd.pagedkv.snapshot"
    snapshot = decode(answer.content)
    assert snapshot.counts() == engine.snapshot().counts() and snapshot.tick == engine.snapshot().tick


@pytest.mark.parametrize("path", ["/v1/cache", "/v1/cache/snapshot"])
def test_it_is_the_operators(engine, path):
    keys = {"api_keys": ("a", "b"), "operator_keys": ("o",)}
    assert [get(engine, path, key, **keys).status_code for key in (None, "x", "a", "o")] == [401, 401, 403, 200]
