"""The compiled runner: the logits of the module, the tokens of generate(), and the same bits however a text is cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.hf.described import FAMILIES, right_logits, tiny
from tests.hf.serving import WHOLE, generated, serve

from pagedkv.hf import ModelRunner, load_runner
from pagedkv.hf.pool import ModelKvCache

NEW = 8


def runner_of(name: str, dtype: torch.dtype = torch.float32, **options: object) -> ModelRunner:
    return load_runner(tiny(name, dtype), **{"num_blocks": 200, "block_size": 4, "mode": "compiled", **options})


def texts(vocab_size: int) -> list[list[int]]:
    """Six prompts of 1 to 60 tokens, most of which begin alike."""
    ids = np.random.default_rng(1).integers(0, vocab_size, 100).tolist()
    return [ids[:20] + ids[20 + n : 20 + 2 * n] for n in (1, 9, 30, 40)] + [ids[3:4], ids[:20]]


def logits_of(runner: ModelRunner, text: list[int], cut: int) -> torch.Tensor:
    """Return the logits of all tokens of a text, computed in chunks."""
    parts = []
    for first in range(0, len(text), cut):
        ids = text[first : first + cut]
        if first:
            runner.cache.append(7, len(ids))
        else:
            runner.cache.allocate(7, len(ids))
        plan = runner.cache.plan([7])
        parts.append(runner.forward(plan, ids, np.arange(len(ids))))
        runner.cache.commit(plan)
    runner.cache.free(7)
    return torch.cat(parts)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_module(name):
    runner = runner_of(name)
    for text in texts(runner.vocab_size)[:4]:
        expected = right_logits(tiny(name), torch.tensor(text))
        assert distance(logits_of(runner, text, WHOLE), expected) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_generate(name):
    runner, model = runner_of(name), tiny(name)
    prompts = texts(runner.vocab_size)
    for chunk, drafts in ((WHOLE, 0), (7, 3)):
        served = serve(runner, prompts, NEW, chunk=chunk, drafts=drafts)
        assert [each.text for each in served] == [generated(model, prompt, NEW) for prompt in prompts]
    runner.cache.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt_neox", "qwen3_moe"])
def test_cuts_change_no_bit(name, dtype):
    runner = runner_of(name, dtype)
    text = texts(runner.vocab_size)[3]
    whole = logits_of(runner, text, WHOLE)
    for cut in (1, 3, 17):
        assert torch.equal(logits_of(runner, text, cut), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "stablelm"])
def test_half_precision_is_near_what_float32_gives(name, dtype):
    """Of the same weights, whose rounding in the module itself is several times as much; so no exam is sat."""
    runner = ModelRunner(tiny(name, dtype), ModelKvCache(200, 4, num_layers=0), "compiled")
    text = texts(runner.vocab_size)[2]
    exact = right_logits(copy.deepcopy(tiny(name, dtype)).float(), torch.tensor(text))
    limit = 5e-2 if "moe" in name else 2e-2  # rounding decides ties between experts
    assert distance(logits_of(runner, text, WHOLE), exact) < limit
