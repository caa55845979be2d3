"""The description of a model of transformers: run in plain torch, it gives the model's own logits; or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.hf.described import FAMILIES, right_logits, text, tiny
from tests.hf.models import build
from tests.hf.plain_decoder import logits_of
from torch import nn

from pagedkv.errors import InvalidOperation
from pagedkv.hf.description import copied_bytes, describe, tensors_of


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_description_gives_the_logits_of_the_model(name):
    model = tiny(name)
    assert distance(logits_of(describe(model), text()), right_logits(model, text())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite", "gpt_neox", "qwen3"])
def test_a_description_in_half_precision(name, dtype):
    model = tiny(name, dtype)
    described = describe(model)
    assert described.embedding.dtype == described.layers[0].attention.query.weight.dtype == dtype
    assert distance(logits_of(described, text()), right_logits(model, text())) < 0.05


def test_weights_are_used_in_place():
    model = tiny("phi3")
    described = describe(model)
    attention, mlp = described.layers[1].attention, described.layers[1].mlp
    fused = model.model.layers[1].self_attn.qkv_proj.weight
    assert attention.query.weight.data_ptr() == fused.data_ptr()
    assert attention.value.weight.data_ptr() == fused[-32:].data_ptr()
    assert mlp.gate.weight.data_ptr() == model.model.layers[1].mlp.gate_up_proj.weight.data_ptr()
    assert copied_bytes(described, model) == 0
    assert all(each.stride(-1) == 1 for each in tensors_of(described))


def test_what_lies_in_another_order_is_copied_and_counted():
    model = tiny("gpt2")
    weights = [each.weight for each in model.modules() if type(each).__name__ == "Conv1D"]
    assert copied_bytes(describe(model), model) == sum(4 * each.numel() for each in weights)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "starcoder2"])
def test_windows_are_read_anew(name):
    model = copy.deepcopy(tiny(name))
    windows = [layer.attention.window for layer in describe(model).layers]
    assert 6 in windows
    for owner in (model.config, *model.modules()):
        if getattr(owner, "sliding_window", None) is not None:
            owner.sliding_window = 4
    described = describe(model)
    assert [layer.attention.window for layer in described.layers] == [each and 4 for each in windows]
    assert distance(logits_of(described, text()), right_logits(model, text())) < 1e-5


def test_layers_of_one_table_share_their_rope():
    ropes = [layer.attention.rope for layer in describe(tiny("llama")).layers]
    assert ropes[0] is ropes[1] is not None
    first, second = (layer.attention.rope for layer in describe(tiny("gemma3")).layers)
    assert first is not second
    assert [layer.attention.rope is None for layer in describe(tiny("smollm3")).layers] == [False, True]


def test_a_model_is_left_as_it_was():
    model = tiny("llama")
    before, attention = right_logits(model, text()), model.config._attn_implementation
    describe(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == attention
    assert torch.equal(right_logits(model, text()), before)


class Adapted(nn.Module):
    """A linear layer with an adapter that does nothing yet."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.lora.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora(x)


class Other(nn.Linear):
    """A linear layer that may be anything."""


def adapt(model):
    attention = model.model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj).eval()


def replace_class(model):
    model.model.layers[0].mlp.up_proj.__class__ = Other


def hook(model):
    model.model.norm.register_forward_hook(lambda module, args, out: out)


def replace_forward(model):
    model.model.norm.forward = lambda x: x


def add_parameter(model):
    model.model.layers[0].extra = nn.Parameter(torch.ones(3))


def add_buffer(model):
    model.model.layers[0].register_buffer("factor", torch.ones(3))


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)


REFUSED = {
    "training": (lambda model: model.train(), "training"),
    "hook": (hook, "model.norm, a LlamaRMSNorm with hooks"),
    "forward": (replace_forward, "model.norm, a LlamaRMSNorm with hooks or a forward"),
    "adapter": (adapt, "layers.1.self_attn"),
    "class": (replace_class, "layers.0.mlp.up_proj, a Other, not a plain Linear"),
    "parameter": (add_parameter, "layers.0.extra, which has no place"),
    "buffer": (add_buffer, "layers.0.factor, which has no place"),
    "parametrised": (parametrize, "parametrised"),
    "float64": (lambda model: model.double(), "torch.float64"),
    "mixed": (lambda model: model.lm_head.to(torch.bfloat16), ""),
    "meta": (lambda model: model.to("meta"), "meta"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_plain_is_refused(what):
    change, reason = REFUSED[what]
    model = copy.deepcopy(tiny("llama"))
    change(model)
    with pytest.raises(InvalidOperation, match="model: expected a decoder of the usual pattern") as error:
        describe(model)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("dynamic", "rotary frequencies change"),
        ("phi3", "rotary frequencies change"),
        ("bloom", "aten.add.Tensor on the mask"),
        ("deepseek_v3", "self_attn"),
        ("gemma4", "on the mask"),
        ("llama4", ""),
        ("lfm2", ""),
        ("falcon_h1", ""),
    ],
)
def test_other_patterns_are_refused(name, reason):
    with pytest.raises(InvalidOperation, match="model: expected a decoder of the usual pattern") as error:
        describe(build(name))
    assert reason in str(error.value)
