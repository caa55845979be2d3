"""A server over tiers: a chat that survives a restart, and tiers that are slow or fail and hold nobody up."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
from tests.contracts.user_tiers import DictTier
from tests.engine.fakes import FakeRunner
from tests.server.asgi import client_of
from tests.server.fakes import shipped_tokenizer
from tests.server.local import SMALL, make_engine, process, thread
from tests.tiers.resp_server import RespServer

from pagedkv.engine import LLM, AsyncEngine, offload
from pagedkv.server import ServerConfig
from pagedkv.server.warm import pin_prompts, read_prompts
from pagedkv.tiers import RespTier, Tier

CHAT = [
    {"role": "system", "content": "You write Python. " * 20},
    {"role": "user", "content": "def fibonacci(n):"},
]


def chat(url: str) -> dict[str, Any]:
    body = {"messages": CHAT, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached_of(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_servers_share_what_each_has_computed_and_go_on_when_it_is_gone(monkeypatch):
    monkeypatch.setattr(offload, "PATIENCE_UNMEASURED", 60.0)  # of machines that are busy
    shared = RespServer()
    prompt = {"prompt": CHAT[0]["content"], "max_tokens": 8, "temperature": 0}

    def completed(server: Any) -> tuple[str, int]:
        answer = httpx.post(f"{server.url}/v1/completions", json=prompt, timeout=60).json()
        return answer["choices"][0]["text"], cached_of(answer)

    def replica() -> AsyncEngine:
        return make_engine(tiers=[RespTier(shared.url, timeout=10)])

    with thread(replica()) as server:
        said, cached = completed(server)
        assert cached == 0
    assert shared.values
    with thread(replica()) as server:
        again, cached = completed(server)
        assert again == said and cached > 50
        (tier,) = httpx.get(f"{server.url}/v1/cache").json()["tiers"]
        assert tier["medium"] == "REMOTE" and tier["loads"] > 0 == tier["failed"]
        metrics = httpx.get(f"{server.url}/metrics").text
        assert any("tier_loads_total" in line and 'medium="REMOTE"' in line for line in metrics.splitlines())
    shared.stop()
    with thread(replica()) as server:
        assert completed(server) == (said, 0)
        (tier,) = httpx.get(f"{server.url}/v1/cache").json()["tiers"]
        assert tier["failed"] > 0


def test_a_chat_goes_on_after_a_restart(tmp_path):
    from pagedkv.cli.engine_options import EngineOptions, TierOptions, make_engine
    from pagedkv.cli.loading import load_model
    from pagedkv.cli.model_source import find_model

    disk = ["--disk", str(tmp_path / "disk"), "--disk-size", "20MB"]
    with process(tmp_path / "log", *SMALL, *disk) as server:
        first = chat(server.url)
        assert cached_of(first) == 0
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    tiers = TierOptions(disk=tmp_path / "disk", disk_size="20MB")
    shipped = find_model(None)
    engine = make_engine(EngineOptions(num_blocks=64), load_model(shipped, "cpu"), tiers)
    (tmp_path / "prompts.json").write_text(json.dumps([CHAT[0]["content"]]))
    pinned = pin_prompts(engine, ServerConfig(), read_prompts([tmp_path / "prompts.json"]))
    with thread(engine) as server:
        cache = httpx.get(f"{server.url}/v1/cache").json()
        (tier,) = cache["tiers"]
        assert cache["blocks"]["pinned"] == pinned.blocks == tier["loads"] > 3 and tier["medium"] == "DISK"
        again = chat(server.url)
        assert cached_of(again) == (again["usage"]["prompt_tokens"] - 1) // 16 * 16 > 64
        assert again["choices"] == first["choices"]


class LateTier(DictTier):
    """Has everything, and answers nothing for as long as it is told so."""

    def __init__(self) -> None:
        super().__init__(4)
        self.waiting: list[Future[int]] = []
        self.is_late, self.fault = True, False

    def _late(self, count: int) -> Future[int]:
        future: Future[int] = Future()
        if self.fault:
            future.set_exception(OSError("the line is cut"))
        elif self.is_late:
            self.waiting.append(future)
        else:
            future.set_result(0)
        return future

    def match(self, token_ids, cache_salt=""):
        return self._late(len(token_ids) // 4)

    def store(self, token_ids, rows, cache_salt=""):
        return self._late(0)

    def answer(self) -> None:
        self.is_late = False
        for future in self.waiting:
            future.set_result(0)


@pytest.fixture
def patience(monkeypatch):
    """Nobody gives up a load in this test: what is answered is answered beside it."""
    monkeypatch.setattr(offload, "LEAST_PATIENCE", 3600.0)
    monkeypatch.setattr(offload, "PATIENCE_UNMEASURED", 3600.0)


def new_engine(tier: Tier) -> AsyncEngine:
    runner = FakeRunner(256, 4)
    runner.vocab_size = 4096
    return AsyncEngine(LLM(runner, shipped_tokenizer(), tiers=[tier]))


async def completed(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.anyio
async def test_who_waits_for_a_slow_tier_holds_up_nobody_else(patience):
    tier = LateTier()
    engine = new_engine(tier)
    async with client_of(engine) as client:
        waits = asyncio.create_task(completed(client, list(range(100, 140))))
        while not tier.waiting:
            await asyncio.sleep(0.001)
        tier.is_late = False  # for those that come now
        for start in (200, 300):
            assert (await completed(client, list(range(start, start + 40))))["usage"]["completion_tokens"] == 4
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/cache")).json()["num_requests"] == 1 and not waits.done()
        tier.answer()
        assert (await waits)["usage"]["completion_tokens"] == 4
    await engine.shutdown()


@pytest.mark.anyio
async def test_a_tier_that_fails_costs_nobody_an_answer():
    tier = LateTier()
    tier.fault = True
    engine = new_engine(tier)
    async with client_of(engine) as client:
        answers = await asyncio.gather(*(completed(client, list(range(i, i + 40))) for i in range(0, 400, 40)))
        assert {answer["usage"]["completion_tokens"] for answer in answers} == {4}
        (figures,) = (await client.get("/v1/cache")).json()["tiers"]
        assert figures["failed"] >= 10 and figures["medium"] == "REMOTE"
    await engine.shutdown()


def test_a_tier_that_cannot_be_closed_does_not_keep_a_server_from_ending(caplog):
    class Stuck(DictTier):
        def open(self, block):
            """Be closed by the server, too."""

        def close(self):
            super().close()
            raise OSError("the disk is gone")

    with thread(new_engine(Stuck(4))) as server:
        body = {"prompt": list(range(40)), "max_tokens": 4}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert "a tier was not closed" in caplog.text and "the disk is gone" in caplog.text
