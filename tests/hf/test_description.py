"""The description of a model of transformers: run in plain torch, it gives the model's own logits; or it is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.hf.described import FAMILIES, REFUSED, right_logits, text, tiny
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
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite", "gpt2", "gpt_neox", "qwen3_moe", "gpt_oss"])
def test_a_description_in_half_precision(name, dtype):
    """Rounding is the model's own matter: the twin, in float32, is the model in float32 with the same weights."""
    model = tiny(name, dtype)
    described = describe(model)
    assert described.embedding.dtype == described.layers[0].attention.query.weight.dtype == dtype
    got = logits_of(described, text())
    assert distance(got, right_logits(model, text())) < 0.05
    assert distance(got, right_logits(copy.deepcopy(model).float(), text())) < 1e-5


def test_what_is_rounded_in_half_precision_is_described_as_rounded():
    assert describe(tiny("gemma")).embedding_scale == pytest.approx(72**0.5, rel=1e-6)
    assert describe(tiny("gemma", torch.bfloat16)).embedding_scale == 8.5


def of_layers(part, **new):
    """Return a change of a decoder: of all its layers, or of their attention or MLP."""

    def change(decoder):
        layers = []
        for layer in decoder.layers:
            whole = (
                replace(layer, **new)
                if part is None
                else replace(layer, **{part: replace(getattr(layer, part), **new)})
            )
            layers.append(whole)
        return replace(decoder, layers=layers)

    return change


def of_experts(decoder):
    experts = [[replace(each, activation="silu") for each in layer.mlp.experts] for layer in decoder.layers]
    mlps = [replace(layer.mlp, experts=each) for layer, each in zip(decoder.layers, experts, strict=True)]
    return replace(decoder, layers=[replace(each, mlp=mlp) for each, mlp in zip(decoder.layers, mlps, strict=True)])


MATTERS = {
    "window": ("mistral", of_layers("attention", window=None)),
    "softcap": ("gemma2", of_layers("attention", softcap=None)),
    "logit_softcap": ("gemma2", lambda decoder: replace(decoder, logit_softcap=None)),
    "scale": ("granite", of_layers("attention", scale=0.25)),
    "embedding_scale": ("granite", lambda decoder: replace(decoder, embedding_scale=1.0)),
    "residual_scale": ("granite", of_layers(None, residual_scale=1.0)),
    "logit_scale": ("granite", lambda decoder: replace(decoder, logit_scale=1.0)),
    "sinks": ("gpt_oss", of_layers("attention", sinks=None)),
    "activation": ("gpt_oss", of_experts),
    "is_renormalised": ("mixtral", of_layers("mlp", is_renormalised=False)),
    "position_offset": ("opt", lambda decoder: replace(decoder, position_offset=0)),
    "positions": ("gpt2", lambda decoder: replace(decoder, positions=None)),
    "rope": ("llama", of_layers("attention", rope=None)),
    "query_norm": ("qwen3", of_layers("attention", query_norm=None)),
    "is_parallel": ("gpt_neox", of_layers(None, is_parallel=False)),
    "attention_post_norm": ("gemma3", of_layers(None, attention_post_norm=None)),
    "gelu": ("gpt2", of_layers("mlp", activation="gelu")),
}


@pytest.mark.parametrize("what", MATTERS)
def test_what_is_described_matters(what):
    name, change = MATTERS[what]
    described = describe(tiny(name))
    assert distance(logits_of(change(described), text()), logits_of(described, text())) > 2e-5


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


PECULIAR = {
    "training": (lambda model: model.train(), "training"),
    "hook": (hook, "model.norm, a LlamaRMSNorm with hooks"),
    "forward": (replace_forward, "model.norm, a LlamaRMSNorm with hooks or a forward"),
    "adapter": (adapt, "layers.1.self_attn"),
    "class": (replace_class, "layers.0.mlp.up_proj, a Other, not a plain Linear"),
    "parameter": (add_parameter, "layers.0.extra, which has no place"),
    "buffer": (add_buffer, "layers.0.factor, which has no place"),
    "parametrised": (parametrize, "parametrised"),
    "float64": (lambda model: model.double(), "torch.float64"),
    "mixed": (lambda model: model.lm_head.to(torch.bfloat16), "cannot be traced"),
    "axes": (lambda model: model.config.rope_parameters.update(mrope_section=[4, 2, 2]), "several axes"),
    "quantised": (lambda model: setattr(model.config, "quantization_config", {"bits": 4}), "quantised"),
    "cross": (lambda model: setattr(model.config, "add_cross_attention", True), "cross attention"),
    "meta": (lambda model: model.to("meta"), "meta"),
}


@pytest.mark.parametrize("what", PECULIAR)
def test_what_is_not_plain_is_refused(what):
    change, reason = PECULIAR[what]
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
        ("llama4", "causal or sliding-window mask"),
        ("lfm2", "no list of layers with one attention each"),
        ("falcon_h1", "MLP is not two factors"),
        ("both_ways", "causal or sliding-window mask"),
    ],
)
def test_other_patterns_are_refused(name, reason):
    with pytest.raises(InvalidOperation, match="model: expected a decoder of the usual pattern") as error:
        describe(build(name))
    assert reason in str(error.value)


REASONS = {
    "mla": "whose projections are not queries, keys, values and an output",
    "other_limit": "experts compute in another way",
    "other_alpha": "experts compute in another way",
    "clipped": "clips queries",
    "scaled_by_position": "makes queries, keys and values in another way",
    "shared_expert": "more than a router and experts",
    "norm_after_rope": "makes queries, keys and values in another way",
    "other_activation": "unknown activation",
    "post_norm": "adds up its parts in another way",
    "projected": "embeddings have another size",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nearly_follows_the_pattern_is_refused(name):
    with pytest.raises(InvalidOperation, match="model: expected a decoder of the usual pattern") as error:
        describe(tiny(name))
    assert REASONS[name] in str(error.value)


def test_norms_may_stay_in_float32():
    model = copy.deepcopy(tiny("gpt_oss", torch.bfloat16))
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    described = describe(model)
    assert described.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
    assert distance(logits_of(described, text()), right_logits(copy.deepcopy(model).float(), text())) < 1e-5


def test_an_encoder_that_token_ids_never_reach_is_left_aside():
    model = copy.deepcopy(tiny("llama"))
    model.encoder = nn.Linear(3, 3).eval()
    assert distance(logits_of(describe(model), text()), right_logits(model, text())) < 1e-5


def test_hooks_of_transformers_itself_are_no_reason():
    model = copy.deepcopy(tiny("llama"))
    model(text()[None], output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    describe(model)


def test_tables_are_those_of_any_length():
    rope = describe(tiny("gpt_oss")).layers[0].attention.rope
    few, many = rope.tables(3), rope.tables(50)
    assert all(table.dtype == torch.float32 and table.is_contiguous() for table in many)
    assert all(torch.equal(one, other[:3]) for one, other in zip(few, many, strict=True))
    assert float(few[0][0, 0]) > 1.1  # scaled for attention, as yarn is
