"""What a tier is told of a model's blocks: the same for the same model, another one for whatever changes K and V."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.hf.models import build
from transformers import AutoModelForCausalLM

from pagedkv import InvalidOperation
from pagedkv.hf import PagedCache, load_runner, pool
from pagedkv.hf.pool import ModelKvCache, block_format


def format_of(model, **options):
    runner = load_runner(model, num_blocks=8, **options)
    return block_format(runner.model, runner.cache)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_a_model_that_was_saved_and_loaded_has_the_same_blocks(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    loaded.config.bos_token_id = 5
    assert format_of(loaded) == format_of(model)


def test_it_knows_block_size_and_bytes():
    runner = load_runner(build("llama"), num_blocks=3, block_size=8)
    block = block_format(runner.model, runner.cache)
    assert (block.block_size, block.block_bytes) == (8, runner.bytes_per_block)


def weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-6


def rope(model):
    model.config.rope_parameters["rope_theta"] = 10_001.0


def buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 1.0001


def attention(model):
    model.set_attn_implementation("eager")


def window(model):
    model.config.sliding_window = 7


class Adapter(torch.nn.Module):
    """As a layer of PEFT tells of itself."""

    active_adapters, disable_adapters, scaling = ["lora"], False, {"lora": 2.0}


def adapter(model):
    model.model.layers[0].extra = Adapter()


def rescaled(model):
    model.model.layers[0].extra = Adapter()
    model.model.layers[0].extra.scaling = {"lora": 3.0}


def switched_off(model):
    model.model.layers[0].extra = Adapter()
    model.model.layers[0].extra.disable_adapters = True


CHANGES = [weight, rope, buffer, attention, window, adapter, rescaled, switched_off]


def test_whatever_changes_k_and_v_changes_the_fingerprint():
    model = copy.deepcopy(build("llama"))
    runner = load_runner(model, num_blocks=8)
    found = [block_format(model, runner.cache).fingerprint]
    for change in CHANGES:
        changed = copy.deepcopy(model)
        change(changed)
        found.append(block_format(changed, runner.cache).fingerprint)
    for options in ({"mode": "gather"}, {"batch_invariant": False}, {"kv_dtype": "int8"}, {"block_size": 8}):
        found.append(format_of(model, **options).fingerprint)
    half = copy.deepcopy(model).to(torch.bfloat16)
    found.append(format_of(half).fingerprint)
    assert len(set(found)) == len(found)


def test_versions_of_the_libraries_are_a_part_of_it(monkeypatch):
    runner = load_runner(build("llama"), num_blocks=8)
    before = block_format(runner.model, runner.cache)
    monkeypatch.setattr(pool, "version", lambda name: "5.99.1")
    after = block_format(runner.model, runner.cache)
    monkeypatch.setattr(pool, "version", lambda name: "5.99.2")
    assert before != after == block_format(runner.model, runner.cache)


def test_what_cannot_be_known_is_refused():
    model = build("llama")
    with pytest.raises(InvalidOperation, match="cache: expected one that knows the shapes"):
        block_format(model, ModelKvCache(8, 16, num_layers=0))
    with pytest.raises(InvalidOperation, match="cache: expected one that knows the shapes"):
        block_format(model, PagedCache(model.config).manager)
    runner = load_runner(model, num_blocks=8)
    with torch.device("meta"):
        nowhere = copy.deepcopy(model).to("meta")
    with pytest.raises(InvalidOperation, match="model: expected one whose weights can all be read"):
        block_format(nowhere, runner.cache)
