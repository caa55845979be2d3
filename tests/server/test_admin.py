"""Models, version, tokens, the OpenAPI document; the cache as JSON and bytes, without words unless allowed."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tests.server.asgi import client_of
from tests.server.fake_snapshots import FakeEngine as BusyEngine
from tests.server.fake_snapshots import app_around, server_state
from tests.server.fakes import STORY, FakeEngine, shipped_tokenizer

from pagedkv import __version__
from pagedkv.engine.snapshot import decode
from pagedkv.server import admin

pytestmark = pytest.mark.anyio


async def test_models() -> None:
    async with client_of(FakeEngine(max_positions=99)) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get("/v1/models/tiny")).json()
    assert listed == {"object": "list", "data": [one]}
    assert one["id"] == "tiny" and one["object"] == "model" and one["max_model_len"] == 99


async def test_a_name_with_slashes() -> None:
    from pagedkv.server import ServerConfig, create_app

    app = create_app(FakeEngine(), ServerConfig(model_name="org/tiny"))  # type: ignore[arg-type]
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/v1/models/org/tiny")).json()["id"] == "org/tiny"


async def test_version() -> None:
    async with client_of(FakeEngine()) as client:
        assert (await client.get("/version")).json() == {"version": __version__}


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/v1/models"])
async def test_a_probe_may_ask_for_the_head_alone(path: str) -> None:
    async with client_of(FakeEngine()) as client:
        head, whole = await client.head(path), await client.get(path)
        assert (await client.head("/v1/completions")).status_code == 405
    assert head.status_code == whole.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert int(head.headers["content-length"]) == len(whole.content)


async def test_tokens_there_and_back() -> None:
    async with client_of(FakeEngine()) as client:
        told = (await client.post("/tokenize", json={"prompt": STORY, "return_token_strs": True})).json()
        bare = (await client.post("/tokenize", json={"prompt": STORY, "add_special_tokens": False})).json()
        back = (await client.post("/detokenize", json={"tokens": bare["tokens"]})).json()
    assert told["tokens"] == shipped_tokenizer()(STORY)["input_ids"] and told["max_model_len"] == 256
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) == bare["count"] + 1
    assert told["token_strs"][0] == "<|file|>" and back == {"prompt": STORY}


async def test_tokens_of_a_conversation() -> None:
    async with client_of(FakeEngine()) as client:
        told = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})).json()
        neither = await client.post("/tokenize", json={})
        both = await client.post("/tokenize", json={"prompt": "x", "messages": [{"role": "user", "content": "x"}]})
        wrong = await client.post("/detokenize", json={"tokens": [4096]})
        empty = await client.post("/detokenize", json={"tokens": []})
    assert shipped_tokenizer().decode(told["tokens"], skip_special_tokens=True) == "user: x\n\nassistant:"
    assert neither.status_code == both.status_code == wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "tokens" and empty.json() == {"prompt": ""}


async def test_the_document_is_whole() -> None:
    async with client_of(FakeEngine()) as client:
        document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    text = str(document)
    for name in schemas:
        assert f"#/components/schemas/{name}" in text, f"nothing refers to {name}"
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            content = told["responses"]["200"]["content"]
            assert all(of.get("schema") for kind, of in content.items() if "json" in kind), (path, method)
            if method == "post" and path.startswith("/v1/c") and "clear" not in path:
                assert set(content) == {"application/json", "text/event-stream"}
            assert "422" not in told["responses"] and told["responses"]["4XX"] and told["summary"]


async def test_the_document_asks_for_keys_where_there_are_any() -> None:
    async with client_of(FakeEngine()) as client:
        without = (await client.get("/openapi.json")).json()
    async with client_of(FakeEngine(), api_keys=("alice",)) as client:
        with_keys = (await client.get("/openapi.json")).json()
    assert "securitySchemes" not in without["components"] and "'security'" not in str(without)
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/cache/clear"):
        assert with_keys["paths"][path]["post"]["security"]
    assert "security" not in with_keys["paths"]["/health"]["get"]


# GET /v1/cache and the binary snapshot.


@pytest.fixture
def engine():
    engine = BusyEngine(256)
    for _ in range(40):
        engine.step()
    return engine


def get(engine, path, key=None, **config):
    app = app_around(server_state(engine, **config), admin.cache_router)
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
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
        assert shown["blocks"] == cache.get_sequence(request.sequences[0].seq_id).num_blocks > 0
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
