"""An engine without a model: real books of a real cache, under chat traffic that comes and goes."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from pagedkv import BlockManager, OutOfMemory
from pagedkv.engine.snapshot import EngineSizes, EngineSnapshot, EngineStats, take_snapshot
from pagedkv.server.admission import Admission
from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import install_error_handlers
from pagedkv.server.model import ServedModel
from pagedkv.server.state import ServerState
from pagedkv.tiers.rung import TierFigures


class FakeRequest:
    """What a snapshot reads of a request."""

    def __init__(self, number: int, prompt: list[int]) -> None:
        self.request_id = f"cmpl-{number:04d}"
        self.sequences = [SimpleNamespace(seq_id=number, output_ids=[])]
        self.prompt = prompt
        self.num_prompt_tokens = len(prompt)
        self.num_cached_tokens: int | None = None
        self.num_preemptions = 0
        self.priority = 0
        self.arrived = time.monotonic()
        self.wanted = 0


class FakeEngine:
    """Requests with a few shared system prompts; every `step` writes a token of each."""

    def __init__(self, num_blocks: int = 768, seed: int = 1, at_once: int = 12) -> None:
        self.cache = BlockManager(num_blocks, 16)
        self.random = random.Random(seed)
        self.systems = [[self.random.randrange(500) for _ in range(n)] for n in (320, 192, 96)]
        self.running: list[FakeRequest] = []
        self.waiting: list[FakeRequest] = []
        self.at_once = at_once
        self.counts = dict.fromkeys(("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits"), 0)
        self.preemptions = self.numbers = self.snapshots = 0
        self.tier_figures: tuple[TierFigures, ...] = ()
        self.tiers: tuple[Any, ...] = ()
        self.lock = threading.Lock()
        self.is_alive = True
        self.compile = None
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(f"t{i}" for i in ids))
        self.subscribe, self.block = self.cache.subscribe, self.cache.block
        self.sizes = EngineSizes(
            block_size=16,
            total_blocks=num_blocks,
            bytes_per_block=0,
            vocab_size=512,
            max_model_len=min(2048, 16 * num_blocks),
            max_num_seqs=at_once,
            max_batch_tokens=512,
        )

    def step(self) -> None:
        """Let requests come, grow and go."""
        with self.lock:
            while len(self.waiting) < 3:
                self.numbers += 1
                tail = [self.random.randrange(500) for _ in range(self.random.randrange(20, 400))]
                prompt = self.random.choice(self.systems) + tail
                request = FakeRequest(self.numbers, prompt)
                request.wanted = self.random.randrange(10, 120)
                self.waiting.append(request)
            self._admit()
            for request in list(self.running):
                self._write(request)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            request = self.waiting[0]
            try:
                info = self.cache.allocate(request.sequences[0].seq_id, request.prompt)
            except OutOfMemory:
                return
            self.running.append(self.waiting.pop(0))
            self.cache.commit(request.sequences[0].seq_id)
            request.num_cached_tokens = info.num_cached_tokens
            self.counts["prompt_tokens"] += len(request.prompt)
            self.counts["prefix_queries"] += len(request.prompt)
            self.counts["prefix_hits"] += info.num_cached_tokens

    def _write(self, request: FakeRequest) -> None:
        sequence = request.sequences[0]
        token = self.random.randrange(500)
        try:
            self.cache.commit(self.cache.append_batch([sequence.seq_id], [[token]]))
        except OutOfMemory:
            self.preemptions += 1
            request.wanted = 0
        sequence.output_ids.append(token)
        self.counts["generation_tokens"] += 1
        if len(sequence.output_ids) >= request.wanted:
            self.cache.free(sequence.seq_id)
            self.running.remove(request)

    def block_records(self, block_ids: Any) -> Any:
        return self.cache.block_records(block_ids)

    def hottest_prefixes(self, limit: int = 12, max_tokens: int = 0) -> Any:
        return self.cache.hottest_prefixes(limit, max_tokens)

    def stats(self) -> EngineStats:
        cache = self.cache
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=self.preemptions,
            blocks_total=cache.total_blocks,
            blocks_used=cache.used_block_count,
            blocks_cached=cache.cached_block_count,
            blocks_free=cache.free_block_count,
            block_size=cache.block_size,
            reclaimed=cache.stats.blocks_reclaimed,
            evictions=cache.stats.total_evictions,
            tiers=self.tier_figures,
            **self.counts,
        )

    def snapshot(self) -> EngineSnapshot:
        with self.lock:
            self.snapshots += 1
            requests: Any = [*self.running, *self.waiting]
            return take_snapshot(self.cache, requests, self.stats())


def server_state(engine: FakeEngine, **config: Any) -> ServerState:
    settings = ServerConfig(model_name="pysmall", **config)
    model = ServedModel.of(engine, settings)  # type: ignore[arg-type]
    return ServerState(engine=engine, config=settings, model=model, admission=Admission(8, 8))  # type: ignore[arg-type]


def app_around(state: ServerState, *routers: Any) -> FastAPI:
    """Return a bare application with some of the routers."""
    app = FastAPI()
    app.state.server = state
    install_error_handlers(app)
    for router in routers:
        app.include_router(router)
    return app
