"""An engine without a model: it writes a fixed text and remembers what it was asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pagedkv import BlockManager
from pagedkv.engine import (
    CompletionOutput,
    EngineSizes,
    EngineStats,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Structured,
)
from pagedkv.engine.core import PinnedPrefix
from pagedkv.errors import EngineDead
from pagedkv.models import shipped_model_path

STORY = "import os\n\ndef main():\n    return os.path.join('a', 'β→')\n"


@cache
def shipped_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped_model_path())


@cache
def story_tokens() -> tuple[int, ...]:
    return tuple(shipped_tokenizer()(STORY, add_special_tokens=False)["input_ids"])


@cache
def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(shipped_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _prompt_logprobs(ids: list[int]) -> list[dict[int, Logprob] | None]:
    """The third likeliest token is always the one that stands there."""
    likely = {4001: Logprob(-0.5, 1), 4002: Logprob(-1.5, 2)}
    return [None, *({token: Logprob(-2.5, 3), **likely} for token in ids[1:])]


@dataclass
class Call:
    token_ids: list[int]
    params: SamplingParams
    options: dict[str, Any]
    ended: str = ""


class FakeEngine:
    """Follows the contract of AsyncEngine; a token takes `delay` seconds.

    It writes the story again and again or, where it is given `says`, that, and then it stops.
    """

    def __init__(
        self, *, delay: float = 0.0, max_positions: int = 256, cached: int = 0, says: str | None = None
    ) -> None:
        self.delay, self.cached, self.says = delay, cached, says
        self.calls: list[Call] = []
        self.error: Exception | None = None
        self.fails_after: int | None = None
        self.is_alive = True
        self.cleared = 0
        self.compiled: list[Structured] = []
        self.pinned: dict[int, list[int]] = {}
        self._handles = itertools.count()
        self.tokenizer = shipped_tokenizer()
        self.sizes = EngineSizes(
            block_size=16,
            total_blocks=1024,
            bytes_per_block=0,
            vocab_size=4096,
            max_model_len=max_positions,
            max_num_seqs=4,
            max_batch_tokens=512,
        )
        self.cache = BlockManager(1024, 16)
        self.subscribe, self.block = self.cache.subscribe, self.cache.block
        self.tiers: tuple[Any, ...] = ()

    @property
    def running(self) -> int:
        return sum(not call.ended for call in self.calls)

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        call = Call(list(prompt), params, options)
        self.calls.append(call)
        if self.error is not None:
            call.ended = "refused"
            raise self.error
        arrived = time.monotonic()
        try:
            limit = params.max_tokens or 8
            if self.says is not None:
                limit = min(params.max_tokens or len(tokens_of(self.says)), len(tokens_of(self.says)))
            for count in range(1, limit + 1):
                await asyncio.sleep(self.delay)
                if not self.is_alive:
                    raise EngineDead("it was shut down")
                if self.fails_after is not None and count > self.fails_after:
                    raise RuntimeError("secret words of the prompt")
                yield self._output(call, count, count == limit, arrived)
            call.ended = "finished"
        finally:
            call.ended = call.ended or "aborted"

    def _output(self, call: Call, count: int, finished: bool, arrived: float) -> RequestOutput:
        now = time.monotonic()
        metrics = RequestMetrics(arrived=arrived, first_scheduled=arrived, first_token=now)
        return RequestOutput(
            request_id="fake",
            prompt=None,
            prompt_token_ids=tuple(call.token_ids),
            outputs=[self._text(index, call.params, count, finished) for index in range(call.params.n)],
            finished=finished,
            num_cached_tokens=self.cached,
            prompt_logprobs=None if call.params.prompt_logprobs is None else _prompt_logprobs(call.token_ids),
            metrics=replace(metrics, finished=now if finished else None),
        )

    def _text(self, index: int, params: SamplingParams, count: int, finished: bool) -> CompletionOutput:
        story = story_tokens() if self.says is None else tokens_of(self.says)
        reason = "length" if self.says is None or count < len(story) else "stop"
        tokens = tuple(story[place % len(story)] for place in range(count))
        text = self.tokenizer.decode(list(tokens))
        likely = [{token: Logprob(-0.5 - index, 1), 5: Logprob(-1.5, 2)} for token in tokens]
        return CompletionOutput(
            index=index,
            text=text if finished else text.rstrip("\ufffd"),
            token_ids=tokens,
            finish_reason=reason if finished else None,  # type: ignore[arg-type]
            logprobs=None if params.logprobs is None else likely,
            cumulative_logprob=(-0.5 - index) * count,
        )

    def compile(self, structured: Structured) -> None:
        self.compiled.append(structured)

    async def pin(self, token_ids: Sequence[int], *, cache_salt: str = "") -> PinnedPrefix:
        handle = next(self._handles)
        self.pinned[handle] = list(token_ids)
        return PinnedPrefix(handle, len(token_ids))

    async def unpin(self, handle: int) -> None:
        self.pinned.pop(handle, None)

    async def clear_prefix_cache(self) -> int:
        self.cleared += 1
        return 7

    def block_records(self, block_ids: Any) -> Any:
        return self.cache.block_records(block_ids)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=self.running)

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        self.is_alive = False
