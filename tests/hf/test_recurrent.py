"""Hybrids: layers that keep a state of each text, in slots of the cache, and snapshots by which they reuse prefixes."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.hf.models import GREEDY, VOCAB, build, prompt
from tests.hf.serving import generated, serve, step

from pagedkv import InvalidOperation, OutOfMemory
from pagedkv.engine import LLM, SamplingParams
from pagedkv.hf import PagedCache, generate, load_runner

HYBRIDS = ["lfm2", "falcon_h1", "zamba2"]
WHOLE = ["jamba", "recurrent_gemma"]
NEW = 12


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


def stock(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | options)


def paged(model, ids, cache, **options):
    return generate(model, ids, cache, attention_mask=torch.ones_like(ids), **GREEDY | options)


# ---------------------------------------------------------------- ModelRunner and the engine


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_conversation_reuses_what_it_has_computed(name):
    model = build(name)
    llm = LLM(model, num_blocks=64, block_size=4)
    text = prompt(1, 30)[0].tolist()
    for cached in (0, 40, 56):
        output = llm.generate(text, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True))[0]
        assert output.num_cached_tokens == cached
        text += output.outputs[0].token_ids
        assert text == generated(model, text[:-NEW], NEW)
        text += [5, 6, 7, 8, 9]
    assert llm.core.runner.cache.stats.prefix_hits == 2


@pytest.mark.parametrize("name", HYBRIDS)
def test_many_at_once_with_few_slots(name):
    model = build(name)
    head = prompt(1, 17)[0].tolist()
    texts = [head + prompt(1, 3 + n, seed=n)[0].tolist() for n in range(7)]
    llm = LLM(model, num_blocks=40, block_size=4, num_states=4, max_batch_tokens=16)
    assert llm.sizes.max_num_seqs == 4
    outputs = llm.generate(texts, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True))
    for text, output in zip(texts, outputs, strict=True):
        assert text + list(output.outputs[0].token_ids) == generated(model, text, NEW)
    assert llm.stats().prefix_hits >= 16
    llm.core.runner.cache.check()


@pytest.mark.parametrize("name", WHOLE)
def test_whole_prompts_are_not_reused_but_right(name):
    model = build(name)
    runner = load_runner(model, num_blocks=100, block_size=4)
    assert runner.has_states and not runner.chunkable and runner.cache.total_states == 64
    texts = [prompt(1, n, seed=n)[0].tolist() for n in (9, 4, 13)]
    for text, request in zip(texts, serve(runner, texts, NEW), strict=True):
        assert request.text == generated(model, text, NEW)
    assert runner.cache.cached_state_count == 0


def test_a_forward_pass_that_failed_leaves_no_state_behind():
    runner = load_runner(build("falcon_h1"), num_blocks=32, block_size=4)
    step(runner, {0: [1, 2, 3]})
    plan = runner.cache.append_batch([0], [[4, 5]])
    broken = runner.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.forward(plan, [4, 5], [1])
    broken.remove()
    with pytest.raises(InvalidOperation, match="plan: expected S0 to go on after token -1, got 3"):
        runner.forward(plan, [4, 5], [1])


def test_a_text_is_not_gone_on_from_where_no_state_was_computed():
    runner = load_runner(build("lfm2"), num_blocks=32, block_size=4)
    runner.cache.allocate(0, [1, 2, 3, 4, 5])
    with pytest.raises(InvalidOperation, match="S0 to go on after token 0, got 4"):
        runner.forward(runner.cache.plan([0], 1), [5], [0])


def test_a_state_is_taken_back_by_no_more_than_the_last_forward_pass():
    runner = load_runner(build("lfm2"), num_blocks=32, block_size=4)
    step(runner, {0: [1, 2, 3, 4, 5]})
    step(runner, {0: [6, 7]})
    runner.cache.truncate(0, 4)
    with pytest.raises(InvalidOperation, match="S0 to go on after token 7, got 4"):
        runner.forward(runner.cache.append_batch([0], [[9]]), [9], [0])


def test_states_are_counted_in_bytes_and_sized_by_them():
    seen = []
    runner = load_runner(build("lfm2"), num_blocks=8, num_states=lambda size: seen.append(size) or 5)
    assert runner.cache.total_states == 5 and runner.cache.states.slot_memory_bytes == seen[0] > 0
    with pytest.raises(InvalidOperation, match="num_states: expected an int"):
        load_runner(build("lfm2"), num_blocks=8, num_states=0)
    assert load_runner(build("llama"), num_blocks=8).cache.total_states == 0


# ---------------------------------------------------------------- generate() over a PagedCache


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_second_turn_goes_on_from_a_snapshot(name):
    model = build(name)
    cache = PagedCache(model.config, num_blocks=128, block_size=4, num_states=12)
    ids = prompt(1, 30)
    first = paged(model, ids, cache)
    assert torch.equal(first, stock(model, ids)) and cache.num_cached_tokens == 0
    assert torch.equal(paged(model, ids, cache), first) and cache.num_cached_tokens == 28
    turn = torch.cat([first, prompt(1, 9, seed=5)], dim=1)
    assert torch.equal(paged(model, turn, cache), stock(model, turn))
    assert cache.num_cached_tokens == (first.shape[1] - 1) // 4 * 4
    cache.manager.check()
    assert cache.manager.used_state_count == 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_beams_behind_a_cached_prefix(name, options):
    model = build(name)
    cache = PagedCache(model.config, num_blocks=128, block_size=4, num_states=60)
    ids = prompt(1, 30)
    for _ in range(2):
        assert torch.equal(paged(model, ids, cache, **options), stock(model, ids, **options))
    assert cache.num_cached_tokens == 28


def test_a_batch_reuses_what_all_of_its_rows_have():
    model = build("falcon_h1")
    cache = PagedCache(model.config, num_blocks=128, block_size=4, num_states=20)
    one, other = prompt(1, 30), prompt(1, 30, seed=4)
    both = torch.cat([torch.cat([one[:, :18], other[:, 18:]], dim=1), one])
    paged(model, one[:, :22], cache)
    paged(model, one, cache)
    assert torch.equal(paged(model, both, cache), stock(model, both))
    assert cache.num_cached_tokens in (0, 16)
    assert torch.equal(paged(model, both, cache), stock(model, both))
    assert cache.num_cached_tokens == 28
    cache.manager.check()


def test_plain_generate_reuses_the_prompt_that_was_told():
    model = build("lfm2")
    cache = PagedCache(model.config, num_blocks=128, block_size=4, num_states=4)
    ids = prompt(1, 28)
    for _ in range(2):
        cache.prompt(ids)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
        assert torch.equal(out, stock(model, ids))
        cache.release()
    cache.manager.check()


def test_rows_beyond_the_slots_are_refused_with_their_number():
    model = build("lfm2")
    cache = PagedCache(model.config, num_blocks=128, block_size=4, num_states=1)
    with pytest.raises(OutOfMemory, match="requested 1 slots for states, 0 available"):
        paged(model, prompt(2, 9), cache)
    assert torch.equal(paged(model, prompt(1, 9), cache), stock(model, prompt(1, 9)))


@pytest.mark.parametrize("name", ["jamba", "recurrent_gemma"])
def test_prompts_that_must_be_whole_stay_whole(name):
    model = build(name)
    cache = PagedCache(model.config, num_blocks=128, block_size=4, num_states=4)
    for _ in range(2):
        assert torch.equal(paged(model, prompt(1, 21), cache), stock(model, prompt(1, 21)))
    assert cache.num_cached_tokens == 0


def test_without_slots_every_prompt_is_computed():
    model = build("lfm2")
    cache = PagedCache(model.config, num_blocks=128, block_size=4)
    for _ in range(2):
        assert torch.equal(paged(model, prompt(1, 21), cache), stock(model, prompt(1, 21)))
    assert cache.num_cached_tokens == 0
    assert PagedCache(build("llama").config, num_states=5).manager.total_states == 0
    assert VOCAB > 9
