"""A bare engine over a ModelRunner: greedy, without a budget, two more prompts in every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pagedkv.hf import ModelRunner

WHOLE = 10**6


@dataclass(eq=False)
class Request:
    """One text on its way: how much of it the cache holds, and every row of logits that it was given."""

    seq_id: int
    text: list[int]
    goal: int
    fed: int = 0
    num_cached: int = 0
    guess: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def serve(
    runner: ModelRunner,
    prompts: list[list[int]],
    new_tokens: int,
    *,
    chunk: int = WHOLE,
    drafts: int = 0,
    reuse: bool = True,
) -> list[Request]:
    """Continue all prompts greedily, prompts in chunks; with wrong `drafts` behind every token, taken back again."""
    every = [Request(i, list(prompt), len(prompt) + new_tokens) for i, prompt in enumerate(prompts)]
    waiting, running = list(every), []
    while waiting or running:
        for request in running:
            _grow(runner, request, chunk, drafts)
        for request in waiting[:2]:
            _start(runner, request, chunk, "" if reuse else str(request.seq_id))
        running, waiting = running + waiting[:2], waiting[2:]
        _compute(runner, running)
        for request in [request for request in running if len(request.text) == request.goal]:
            running.remove(request)
            runner.cache.free(request.seq_id)
            runner.release(request.seq_id)
    return every


def _start(runner: ModelRunner, request: Request, chunk: int, salt: str) -> None:
    cached = runner.cache.match_prefix(request.text, salt)
    info = runner.cache.allocate(request.seq_id, request.text[: cached + chunk], cache_salt=salt)
    request.fed, request.num_cached = info.num_tokens, info.num_cached_tokens


def _grow(runner: ModelRunner, request: Request, chunk: int, drafts: int) -> None:
    part = request.text[request.fed : request.fed + chunk]
    request.guess = [(part[-1] + 1 + i) % runner.vocab_size for i in range(drafts if request.logits else 0)]
    runner.cache.append(request.seq_id, part + request.guess)
    request.fed += len(part)


def _compute(runner: ModelRunner, running: list[Request]) -> None:
    plan = runner.cache.plan([request.seq_id for request in running])
    ids, wanted, takers = [], [], []
    for request, count in zip(running, plan.num_query_tokens.tolist(), strict=True):
        ids += (request.text[: request.fed] + request.guess)[-count:]
        if request.fed == len(request.text):
            wanted.append(len(ids) - 1 - len(request.guess))
            takers.append(request)
    logits = runner.forward(plan, np.array(ids), np.array(wanted, np.int64))
    for request in running:
        if request.guess:
            runner.cache.truncate(request.seq_id, request.fed)
    runner.cache.commit(plan)
    for request, row in zip(takers, logits, strict=True):
        request.logits.append(row)
        request.text.append(int(row.argmax()))


def generated(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Return prompt and reply of ``model.generate()``."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": None}
    out: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return out


def step(runner: ModelRunner, news: dict[int, list[int]]) -> dict[int, torch.Tensor]:
    """Feed tokens to sequences, new ones too, and return the logits of the last token of each."""
    for seq_id in news.keys() - set(runner.cache.sequence_ids):
        runner.cache.allocate(seq_id, 0)
    lengths = [len(new) for new in news.values()]
    plan = runner.cache.append_batch(list(news), list(news.values()))
    logits = runner.forward(plan, np.concatenate(list(news.values())), np.cumsum(lengths) - 1)
    runner.cache.commit(plan)
    return dict(zip(news, logits, strict=True))
