"""The shipped model over a long prompt, in blocks of every size."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagedkv.hf import PagedCache, generate
from pagedkv.models import shipped_model_path

TOKENS = 2000
OPTIONS = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path())
    text = inspect.getsource(inspect) + inspect.getsource(torch.nn.Module)
    return tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]


@pytest.fixture(scope="module")
def expected(model, ids):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)


@pytest.mark.parametrize("attention", ["sdpa", "pagedkv"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_a_prompt_of_2000_tokens(model, ids, expected, block_size, attention):
    assert ids.shape == (1, TOKENS)
    cache = PagedCache(model.config, num_blocks=-(-TOKENS // block_size) + 32, block_size=block_size)
    model.set_attn_implementation(attention)
    try:
        out = generate(model, ids, cache, attention_mask=torch.ones_like(ids), **OPTIONS)
        assert torch.equal(out, expected)
        again = generate(model, ids, cache, attention_mask=torch.ones_like(ids), release=False, **OPTIONS)
        assert torch.equal(again, expected)
        stored = (TOKENS + 15) // block_size * block_size  # whole blocks; the last token has no K and V
        assert cache.num_cached_tokens == min(TOKENS - 1, stored)
    finally:
        model.set_attn_implementation("sdpa")
    cache.release()
    cache.manager.check()
    assert cache.manager.used_block_count == 0
