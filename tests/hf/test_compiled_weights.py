"""The compiled runner and a model that changes after it was loaded: weights, hooks, what a clear takes up."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from tests.hf.described import right_logits, tiny
from torch import nn

from pagedkv import InvalidOperation
from pagedkv.hf import ModelRunner, load_runner

TEXT = torch.arange(1, 12)


def loaded(name: str = "llama", **options: Any) -> tuple[Any, ModelRunner]:
    model = copy.deepcopy(tiny(name))
    return model, load_runner(model, num_blocks=40, block_size=4, mode="compiled", **options)


def logits_of(runner: ModelRunner, text: torch.Tensor = TEXT) -> torch.Tensor:
    runner.cache.allocate(7, len(text))
    plan = runner.cache.plan([7])
    logits = runner.forward(plan, text, np.arange(len(text)))
    runner.cache.commit(plan)
    runner.cache.free(7)
    return logits


def assert_as_the_model(runner: ModelRunner, model: Any, tolerance: float = 1e-4) -> None:
    expected = right_logits(model, TEXT)
    assert float((logits_of(runner) - expected).norm() / expected.norm()) < tolerance


def scaled_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def others(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor * 1.1 for name, tensor in model.state_dict().items()}


def parameters_anew(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.1))


def data_anew(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


CHANGES = {
    "in place": scaled_in_place,
    "assigned by load_state_dict": lambda model: model.load_state_dict(others(model), assign=True),
    "copied by load_state_dict": lambda model: model.load_state_dict(others(model)),
    "new parameters": parameters_anew,
    "new data": data_anew,
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_cleared_cache_takes_up_other_weights(change, name):
    model, runner = loaded(name)
    before = logits_of(runner)
    change(model)
    runner.cache.clear_prefix_cache()
    assert_as_the_model(runner, model)
    assert not torch.allclose(logits_of(runner), before, atol=1e-3)


def test_weights_in_place_are_seen_at_once():
    model, runner = loaded()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert_as_the_model(runner, model)


@pytest.mark.parametrize("change", [parameters_anew, data_anew])
def test_weights_that_were_replaced_stay_alive_until_then(change):
    model, runner = loaded()
    before = logits_of(runner)
    change(model)
    gc.collect()
    filler = [torch.full_like(parameter, torch.nan) for parameter in model.parameters() for _ in range(3)]
    assert torch.equal(logits_of(runner), before)
    del filler


def test_a_model_of_another_dtype_is_taken_up():
    model, runner = loaded()
    model.to(torch.bfloat16)
    runner.cache.clear_prefix_cache()
    assert_as_the_model(runner, model, 2e-2)


def test_hooks_are_refused_once_prefixes_are_forgotten():
    model, runner = loaded()
    before = logits_of(runner)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    runner.cache.clear_prefix_cache()
    runner.cache.allocate(1, len(TEXT))
    plan = runner.cache.plan([1])
    for _ in range(2):
        with pytest.raises(
            InvalidOperation, match=r"model: expected a decoder of the usual pattern, got .* with hooks"
        ):
            runner.forward(plan, TEXT, [0])
    handle.remove()
    assert torch.equal(runner.forward(plan, TEXT, np.arange(len(TEXT))), before)


def test_other_shapes_are_refused():
    model, runner = loaded()
    attention = model.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = nn.Linear(64, 64).eval(), nn.Linear(64, 64).eval()
    attention.num_key_value_groups = 1
    runner.cache.clear_prefix_cache()
    with pytest.raises(InvalidOperation, match="keys of shape"):
        logits_of(runner)


def test_fewer_embeddings_are_refused():
    model, runner = loaded()
    model.resize_token_embeddings(runner.vocab_size - 9)
    model.eval()
    runner.cache.clear_prefix_cache()
    with pytest.raises(InvalidOperation, match=f"expected embeddings of {runner.vocab_size} tokens, got"):
        logits_of(runner)


def test_defaults_of_torch_have_no_part(monkeypatch):
    model, runner = loaded("mistral")
    expected = logits_of(runner)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            runner.cache.clear_prefix_cache()
            got = logits_of(runner)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
