"""The engine's core over a fake model: every text is what it would be alone."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import InvalidOperation
from pagedkv.engine import RequestRefused, SamplingParams

from tests.engine.fakes import VOCAB, FakeRunner, alone, engine, logits_of, request, run, tokens_of


def greedy(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(np.array(tokens)).argmax()))
    return tuple(tokens[len(prompt) :])


def prompts(count, shared=9, seed=0):
    random = np.random.default_rng(seed)
    head = random.integers(0, VOCAB, shared).tolist()
    return [head + random.integers(0, VOCAB, random.integers(1, 25)).tolist() for _ in range(count)]


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 4096])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_blocks", [20, 4096])
def test_greedy_texts_are_those_of_the_model(max_batch_tokens, prefix_caching, num_blocks):
    core = engine(num_blocks, max_batch_tokens=max_batch_tokens, prefix_caching=prefix_caching)
    given = prompts(12)
    for i, prompt in enumerate(given):
        core.add(request(f"r{i}", prompt, max_tokens=20 + i))
    outputs = run(core)
    for i, prompt in enumerate(given):
        assert tokens_of(outputs[f"r{i}"]) == [greedy(prompt, 20 + i)]
        assert outputs[f"r{i}"].outputs[0].finish_reason == "length"
    assert core.runner.cache.used_block_count == 0
    stats = core.stats()
    assert stats.generation_tokens == sum(20 + i for i in range(12))
    if num_blocks == 20 and max_batch_tokens >= 64:
        assert stats.num_preemptions > 0
