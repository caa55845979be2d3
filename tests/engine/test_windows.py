"""Models whose layers all have a sliding window: blocks that no layer can see any more make room for others."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.hf.models import VOCAB, build
from tests.hf.serving import generated

from pagedkv.engine import LLM, RequestRefused, SamplingParams
from pagedkv.hf import load_runner

NEW = 40
TEXTS = [list(range(3, 3 + length)) for length in (20, 33, 41, 50)]
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)


@functools.cache
def expected(length: int) -> list[int]:
    return generated(build("mistral"), TEXTS[length], NEW)[len(TEXTS[length]) :]


def served(num_blocks: int, **options) -> LLM:
    llm = LLM(build("mistral"), num_blocks=num_blocks, block_size=4, max_batch_tokens=16, **options)
    outputs = llm.generate(TEXTS, GREEDY)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [*map(expected, range(len(TEXTS)))]
    llm.core.runner.cache.check()
    return llm


@pytest.mark.parametrize("mode", ["compiled", "ragged", "gather"])
def test_texts_longer_than_the_pool_are_written_without_preemption(mode):
    llm = served(16, mode=mode)  # 64 tokens; the texts have 60 to 90
    assert llm.core.runner.window == 12
    assert llm.stats().num_preemptions == 0


def test_nothing_is_given_back_while_there_is_room():
    llm = served(200)
    assert llm.core.runner.cache.stats.blocks_reclaimed == 0
    again = llm.generate(TEXTS[3] + [5], GREEDY)[0]
    assert again.num_cached_tokens == 50


@pytest.mark.parametrize("extra", [{"n": 2, "temperature": 1.0, "seed": 3}, {"beam_width": 2, "n": 2}])
def test_forks_are_written_as_with_plenty(extra):
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, **extra)
    few, many = (LLM(build("mistral"), num_blocks=n, block_size=4).generate(TEXTS, params) for n in (48, 400))
    assert [[text.token_ids for text in output.outputs] for output in few] == [
        [text.token_ids for text in output.outputs] for output in many
    ]


def test_a_pool_that_does_not_hold_window_and_chunk_refuses():
    llm = LLM(build("mistral"), num_blocks=8, block_size=4, max_batch_tokens=16)
    with pytest.raises(RequestRefused, match="need 9 blocks of 4 tokens at once, the pool has 8"):
        llm.generate(TEXTS[1], GREEDY)


def test_positions_are_those_of_the_text():
    """A runner by itself: what was dropped is seen by nobody, so the logits are the same."""
    rows = []
    for drops in (False, True):
        runner = load_runner(build("mistral"), num_blocks=32, block_size=4)
        ids = torch.arange(30) % VOCAB
        runner.cache.allocate(1, ids[:20].tolist())
        plan = runner.cache.plan([1])
        runner.forward(plan, ids[:20], [19])
        runner.cache.commit(plan)
        if drops:
            assert runner.cache.apply_streaming_llm(1, 0, runner.window - 1) == 9
        plan = runner.cache.append_batch([1], [ids[20:].tolist()])
        rows.append(runner.forward(plan, ids[20:], range(10)))
    assert torch.allclose(*rows, atol=1e-5)


@pytest.mark.parametrize(("name", "window"), [("llama", None), ("gemma2", None), ("llama4", None), ("mistral", 12)])
def test_the_window_is_one_that_all_layers_have(name, window):
    assert load_runner(build(name), num_blocks=8).window == window
