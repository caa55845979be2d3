"""Token for token, and logit for logit, what transformers' own cache gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.models import CONFIGS, FURTHER, GREEDY, build, left_padded, prompt

from pagedkv.errors import InvalidOperation
from pagedkv.hf import PagedCache

DIRECT = ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3", "gpt_oss", "lfm2"]
REFUSED = ["deepseek_v3", "bloom", "llama4", "gemma4"]


def single() -> dict[str, Any]:
    return {"input_ids": prompt(1, 37)}


def padded() -> dict[str, Any]:
    ids, mask = left_padded(3, 37)
    return {"input_ids": ids, "attention_mask": mask}


def beams() -> dict[str, Any]:
    return {"input_ids": prompt(2, 21), "num_beams": 3, "num_return_sequences": 2}


def lookup() -> dict[str, Any]:
    return {"input_ids": prompt(1, 8).repeat(1, 5), "prompt_lookup_num_tokens": 4}


def samples() -> dict[str, Any]:
    return {"input_ids": prompt(2, 21), "do_sample": True, "num_return_sequences": 3}


def chunks() -> dict[str, Any]:
    return {"input_ids": prompt(2, 37), "prefill_chunk_size": 10}


MODES = {mode.__name__: mode for mode in (single, padded, beams, lookup, samples, chunks)}
# Every model in the modes that the issue names, one model in all.
CASES = [(name, mode) for name in [*CONFIGS, *FURTHER] for mode in ("single", "padded", "beams", "lookup")]
CASES += [("llama", "samples"), ("llama", "chunks"), ("mistral", "chunks")]


def run(model: Any, cache: PagedCache | None, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    options = {**GREEDY, **arguments, "return_dict_in_generate": True, "output_logits": True}
    options.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return model.generate(**options, **({"past_key_values": cache} if cache else {}))


def assert_equal_to_stock(model: Any, stock: Any, block_size: int, arguments: dict[str, Any]) -> None:
    cache = PagedCache(model.config, num_blocks=512, block_size=block_size)
    expected, got = run(stock, None, arguments), run(model, cache, arguments)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=2e-4, atol=2e-4)
    cache.manager.check()
    cache.release()
    cache.manager.check()
    assert cache.manager.used_block_count == 0
    assert cache.manager.num_sequences == 0


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_gather_mode_equals_the_stock_cache(name, mode):
    model = build(name)
    assert_equal_to_stock(model, model, 5, MODES[mode]())


@pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] in DIRECT])
def test_direct_mode_equals_the_stock_cache(name, mode):
    assert_equal_to_stock(build(name, attention="pagedkv"), build(name), 5, MODES[mode]())


@pytest.mark.parametrize("name", REFUSED)
def test_direct_mode_refuses_what_it_cannot_do(name):
    model = build(name, attention="pagedkv")
    cache = PagedCache(model.config, num_blocks=512, block_size=5)
    with pytest.raises(InvalidOperation, match="gather mode"):
        run(model, cache, single())
    cache.release()
    cache.manager.check()
    assert cache.manager.used_block_count == 0


def test_direct_mode_is_unknown_to_falcon():
    with pytest.raises(KeyError, match="pagedkv"):  # transformers' own table of falcon's attention classes
        build("falcon", attention="pagedkv")


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_every_block_size_gives_the_same_tokens(block_size):
    model = build("llama")
    assert_equal_to_stock(model, model, block_size, padded())


@pytest.mark.parametrize("attention", [None, "pagedkv"])
def test_assisted_decoding_equals_the_stock_cache(attention):
    stock, assistant = build("llama"), build("llama", layers=1)
    model = build("llama", attention=attention)
    assert_equal_to_stock(model, stock, 5, {**single(), "assistant_model": assistant})


def test_the_models_answer_with_more_than_one_token():
    """Equal tokens say little if a model repeats itself."""
    for name in CONFIGS:
        tokens = run(build(name), None, single()).sequences[0, 37:]
        assert len(set(tokens.tolist())) > 3, name
