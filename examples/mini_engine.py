"""A continuous batching engine in 80 lines of code, around any causal language model of transformers.

Requests come and go while others are written: each step takes in what fits, computes its prompts, and writes one token
of every text. Prefixes are shared, and a text that finds no block waits and is computed again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pagedkv import BatchPlan, OutOfMemory
from pagedkv.hf import load_runner
from pagedkv.hf.runner import ModelRunner
from pagedkv.models import shipped_model_path


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    text: list[int] = field(default_factory=list)
    num_cached: int = 0

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.text


class MiniEngine:
    """Greedy decoding; `max_running` texts at once."""

    def __init__(self, runner: ModelRunner, max_running: int = 8) -> None:
        self.runner, self.cache, self.max_running = runner, runner.cache, max_running
        self.requests: list[Request] = []
        self.waiting: deque[int] = deque()
        self.running: list[int] = []

    def add(self, prompt: list[int], max_tokens: int) -> int:
        self.requests.append(Request(prompt, max_tokens))
        self.waiting.append(len(self.requests) - 1)
        return len(self.requests) - 1

    def step(self) -> None:
        if entered := self.enter():
            plan = self.cache.plan(entered)  # of each the tokens that are not computed yet
            ids = [self.requests[s].ids[-count:] for s, count in zip(entered, plan.num_query_tokens, strict=True)]
            self.write(entered, plan, np.concatenate(ids))
        if going := [s for s in self.running if s not in entered]:
            going, plan = self.grow(going)
            self.write(going, plan, np.array([self.requests[s].text[-1] for s in going]))

    def enter(self) -> list[int]:
        """Start what waits, as long as there is room for its prompt and a block more for each text that runs."""
        entered = []
        while self.waiting and len(self.running) < self.max_running:
            seq_id = self.waiting[0]
            ids = self.requests[seq_id].ids
            if self.cache.blocks_to_allocate(ids) + len(self.running) + 1 > self.cache.free_block_count:
                break
            info = self.cache.allocate(seq_id, ids)
            self.requests[seq_id].num_cached = info.num_cached_tokens
            self.running.append(self.waiting.popleft())
            entered.append(seq_id)
        return entered

    def grow(self, going: list[int]) -> tuple[list[int], BatchPlan]:
        """Give each text room for its last token; without room, the newest one has to wait."""
        while True:
            try:
                return going, self.cache.append_batch(going, [self.requests[s].text[-1] for s in going])
            except OutOfMemory:
                if len(going) == 1:
                    raise
                newest = going[-1]
                self.cache.free(newest)  # its committed blocks stay findable until their room is needed
                self.running.remove(newest)
                self.waiting.appendleft(newest)
                going = going[:-1]

    def write(self, seq_ids: list[int], plan: BatchPlan, ids: np.ndarray) -> None:
        """Compute one token of every sequence, and end those that are done."""
        logits = self.runner.forward(plan, ids, plan.cu_seqlens_q[1:].astype(np.int64) - 1)
        self.cache.commit(plan)
        for seq_id, token in zip(seq_ids, logits.argmax(-1).tolist(), strict=True):
            request = self.requests[seq_id]
            request.text.append(token)
            if len(request.text) == request.max_tokens:
                self.cache.free(seq_id)
                self.running.remove(seq_id)

    def run(self) -> list[list[int]]:
        while self.waiting or self.running:
            self.step()
        return [request.text for request in self.requests]


def main(runner: ModelRunner | None = None) -> MiniEngine:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    engine = MiniEngine(runner or load_runner(shipped_model_path(), num_blocks=24, block_size=8))
    head = "import math\n\n\nclass Shape:\n    def area(self):\n        raise NotImplementedError\n\n\n"
    for name in ("Circle", "Square", "Triangle", "Ring"):
        engine.add(tokenizer(f"{head}class {name}(Shape):\n").input_ids, max_tokens=24)
    for request, text in zip(engine.requests, engine.run(), strict=True):
        print(f"--- {request.num_cached} of {len(request.prompt)} prompt tokens were cached")
        print(tokenizer.decode(text))
    return engine


if __name__ == "__main__":
    main()
