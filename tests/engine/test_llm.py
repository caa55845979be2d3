"""LLM with real models: the tokens are those of ``model.generate()``."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.hf.models import CONFIGS, FURTHER, VOCAB, build
from transformers import AutoModelForCausalLM

from pagedkv import InvalidOperation
from pagedkv.engine import LLM, RequestRefused, SamplingParams
from pagedkv.models import shipped_model_path


def by_model(model, prompt, max_tokens, **options):
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": max_tokens}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **(settings | options))
    return [tuple(row) for row in out[:, len(prompt) :].tolist()]


def mixed(count, vocab, seed=0, longest=30):
    """Return prompts, some with a common beginning, and how long their texts are to be."""
    random = np.random.default_rng(seed)
    head = random.integers(1, vocab, 21).tolist()
    prompts = [
        (head if i % 2 else []) + random.integers(1, vocab, random.integers(1, longest)).tolist() for i in range(count)
    ]
    return prompts, random.integers(4, 24, count).tolist()


def texts(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def settled(llm):
    cache = llm.core.runner.cache
    cache.check()
    assert cache.used_block_count == 0 and not llm.core.has_work


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(shipped):
    prompts, lengths = mixed(64, 2000)
    return prompts, lengths, [by_model(shipped, p, n)[0] for p, n in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 8192])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_64_requests_under_pressure(shipped, expected, max_batch_tokens, prefix_caching):
    # Thousands of steps where each is one token: a part of the requests will do, but for the slow tests.
    prompts, lengths, tokens = (column[:16] if max_batch_tokens == 1 else column for column in expected)
    llm = LLM(shipped, num_blocks=40, block_size=4, max_batch_tokens=max_batch_tokens, prefix_caching=prefix_caching)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params)
    assert texts(outputs) == tokens
    stats = llm.core.stats()
    assert stats.num_preemptions > 0 or max_batch_tokens < 64
    assert (stats.prefix_hits > 0) == prefix_caching
    settled(llm)


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_64_requests_one_token_a_step(shipped, expected, prefix_caching):
    prompts, lengths, tokens = expected
    llm = LLM(shipped, num_blocks=40, block_size=4, max_batch_tokens=1, prefix_caching=prefix_caching)
    assert texts(llm.generate(prompts, [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])) == tokens
    settled(llm)


@pytest.mark.parametrize("name", [*CONFIGS, *FURTHER])
def test_every_family(name):
    model = build(name)
    prompts, lengths = mixed(8, VOCAB, longest=24)
    tokens = [by_model(model, p, n)[0] for p, n in zip(prompts, lengths, strict=True)]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    for max_batch_tokens in (7, 512):
        llm = LLM(model, num_blocks=20, block_size=4, max_batch_tokens=max_batch_tokens)
        assert texts(llm.generate(prompts, params)) == tokens
        settled(llm)


@functools.cache
def by_family(name):
    model = build(name)
    prompts, lengths = mixed(64, VOCAB, longest=24)
    return model, prompts, lengths, [by_model(model, p, n)[0] for p, n in zip(prompts, lengths, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, *FURTHER])
@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 8192])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_64_requests_of_every_family_under_pressure(name, max_batch_tokens, prefix_caching):
    model, prompts, lengths, tokens = by_family(name)
    llm = LLM(model, num_blocks=30, block_size=4, max_batch_tokens=max_batch_tokens, prefix_caching=prefix_caching)
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])
    assert texts(outputs) == tokens
    assert llm.core.stats().num_preemptions > 0 or max_batch_tokens < 64
    settled(llm)


def test_beams_are_those_of_transformers(shipped):
    prompts, _ = mixed(6, 2000, seed=3)
    llm = LLM(shipped, num_blocks=40, block_size=4)
    for width, best in ((2, 1), (4, 3)):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=16, beam_width=width, n=best, ignore_eos=True))
        for prompt, output in zip(prompts, outputs, strict=True):
            reference = by_model(shipped, prompt, 16, num_beams=width, num_return_sequences=best)
            assert [each.token_ids for each in output.outputs] == reference
    settled(llm)


def test_prompt_lookup_changes_speed_only(shipped):
    prompts, _ = mixed(8, 2000, seed=4)
    llm = LLM(shipped, num_blocks=200, block_size=4)
    for options in ({}, {"temperature": 0.7, "seed": 5}, {"repetition_penalty": 1.3}):
        plain = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True, **options))
        steps = llm.core.stats().steps
        guessed = llm.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True, prompt_lookup=4, **options))
        assert texts(guessed) == texts(plain)
        if not options:
            assert llm.core.stats().steps - steps < 40 and llm.core.stats().accepted_tokens > 0
    settled(llm)


def test_a_seed_gives_the_same_texts_whatever_else_is_in_the_batch(shipped):
    llm = LLM(shipped, num_blocks=60, block_size=8, max_batch_tokens=24)
    params = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, n=3, seed=11, ignore_eos=True)
    alone = llm.generate([5, 6, 7], params)[0]
    assert len({each.token_ids for each in alone.outputs}) == 3
    prompts, _ = mixed(20, 2000, seed=6)
    crowd = [SamplingParams(max_tokens=20, temperature=1.0)] * 20
    among = llm.generate([*prompts, [5, 6, 7]], [*crowd, params])[-1]
    assert [each.token_ids for each in among.outputs] == [each.token_ids for each in alone.outputs]
    assert [each.index for each in among.outputs] == [0, 1, 2]
    settled(llm)


def test_salts_never_share(shipped):
    llm = LLM(shipped, num_blocks=60, block_size=4)
    prompt, params = list(range(10, 40)), SamplingParams(max_tokens=4, ignore_eos=True)
    assert llm.generate(prompt, params, cache_salt="a")[0].num_cached_tokens == 0
    assert llm.generate(prompt, params, cache_salt="b")[0].num_cached_tokens == 0
    assert llm.generate(prompt, params)[0].num_cached_tokens == 0
    assert llm.generate(prompt, params, cache_salt="a")[0].num_cached_tokens >= 28


def test_text_in_text_out():
    llm = LLM(shipped_model_path(), num_blocks=64)
    output = llm.generate("def add(a, b):\n", SamplingParams(max_tokens=24))[0]
    assert output.prompt == "def add(a, b):\n" and output.finished
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    whole = llm.tokenizer.decode(ids, skip_special_tokens=True)
    assert whole.endswith(output.outputs[0].text) and len(output.outputs[0].text) > 20
    cut = output.outputs[0].text[8:11]
    stopped = llm.generate("def add(a, b):\n", SamplingParams(max_tokens=24, stop=cut))[0].outputs[0]
    assert stopped.text == output.outputs[0].text[: output.outputs[0].text.index(cut)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", cut)
    settled(llm)


def test_threads_take_turns(shipped, expected):
    prompts, lengths, wanted = expected
    llm = LLM(shipped, num_blocks=60, block_size=4)

    def generate(start):
        some = slice(start, start + 4)
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths[some]]
        return texts(llm.generate(prompts[some], params)) == wanted[some]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(generate, range(0, 16, 4)))
    settled(llm)


@pytest.mark.parametrize("block_size", [0, -1, 2.5, "16"])
def test_a_block_size_that_is_none(shipped, block_size):
    with pytest.raises(InvalidOperation, match="block_size: expected an int"):
        LLM(shipped, num_blocks=8, block_size=block_size)


def test_what_makes_no_sense_is_refused_and_nothing_stays(shipped):
    llm = LLM(shipped, num_blocks=8, block_size=4)
    with pytest.raises(RequestRefused, match="need 10 blocks of 4 tokens at once, the pool has 8"):
        llm.generate([[1, 2, 3], list(range(1, 31))], SamplingParams(max_tokens=8))
    with pytest.raises(InvalidOperation, match="no tokenizer"):
        llm.generate("text")
    with pytest.raises(InvalidOperation, match="at least one token id"):
        llm.generate([[1, 2], []], SamplingParams(max_tokens=4))
    with pytest.raises(InvalidOperation, match="one SamplingParams for each of 1 prompts"):
        llm.generate([[1, 2]], [])
    settled(llm)


def test_streams_are_those_of_a_streaming_session(shipped):
    from pagedkv.hf.streaming import StreamingSession

    prompts, _ = mixed(3, 2000, seed=8, longest=50)
    llm = LLM(shipped, num_blocks=40, block_size=4, max_batch_tokens=16)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=60, streaming=(4, 24), ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        session = StreamingSession(shipped, 4, 24, block_size=4)
        assert output.outputs[0].token_ids == tuple(session.generate(prompt, 60))
    settled(llm)
