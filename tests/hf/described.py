"""Small models of the families that a description reaches, everything about them random: norms, biases, sinks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tests.hf.models import _COMMON, VOCAB

_SMALL = _COMMON | {"num_hidden_layers": 2, "max_position_embeddings": 128}
_TYPES = ["sliding_attention", "full_attention"]
_HEADS = {"head_dim": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SMALL | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", _SMALL | {"sliding_window": 6} | _HEADS),
    "qwen2": ("Qwen2", _SMALL | {"use_sliding_window": True, "sliding_window": 6, "layer_types": _TYPES}),
    "qwen3": ("Qwen3", _SMALL | _HEADS),
    "smollm3": ("SmolLM3", _SMALL | {"no_rope_layers": [1, 0], "tie_word_embeddings": False}),
    "gemma": ("Gemma", _SMALL | _HEADS | {"hidden_size": 72}),  # whose root is another number in half precision
    "gemma2": (
        "Gemma2",
        _SMALL
        | _HEADS
        | dict(
            sliding_window=6,
            layer_types=_TYPES,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
        ),
    ),
    "gemma3": (
        "Gemma3",
        _SMALL
        | _HEADS
        | dict(
            sliding_window=6,
            layer_types=_TYPES,
            query_pre_attn_scalar=16,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
            config_class="Gemma3TextConfig",
        ),
    ),
    "phi3": (
        "Phi3",
        _SMALL | {"rope_parameters": dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)},
    ),
    "granite": (
        "Granite",
        _SMALL | dict(embedding_multiplier=3.0, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=1.7),
    ),
    "olmo2": ("Olmo2", _SMALL),
    "starcoder2": ("Starcoder2", _SMALL | {"sliding_window": 6, "use_bias": True}),
    "gpt2": (
        "GPT2",
        dict(
            vocab_size=VOCAB,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=128,
            scale_attn_by_inverse_layer_idx=True,
            model_class="GPT2LMHeadModel",
        ),
    ),
    "gpt_neox": (
        "GPTNeoX",
        _SMALL | {"rope_parameters": dict(rope_theta=1e4, rope_type="default", partial_rotary_factor=0.25)},
    ),
    "gpt_neox_in_turn": ("GPTNeoX", _SMALL | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "opt": (
        "OPT",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        ),
    ),
    "phi": ("Phi", _SMALL | {"qk_layernorm": True}),
    "cohere": ("Cohere", _SMALL | {"logit_scale": 0.4}),
    "glm4": ("Glm4", _SMALL | {"head_dim": 16, "attention_bias": True}),
    "nemotron": ("Nemotron", _SMALL),
    "olmo": ("Olmo", _SMALL),
    "exaone4": ("Exaone4", _SMALL | dict(sliding_window=6, layer_types=_TYPES)),
    "gpt_bigcode": (
        "GPTBigCode",
        dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, multi_query=True),
    ),
    "stablelm": ("StableLm", _SMALL | dict(use_parallel_residual=True, use_qkv_bias=True)),
    "granitemoe": ("GraniteMoe", _SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral": ("Mixtral", _SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3Moe",
        _SMALL
        | dict(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[0], norm_topk_prob=True
        ),
    ),
    "olmoe": ("Olmoe", _SMALL | dict(num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "GptOss",
        _SMALL
        | dict(
            head_dim=16,
            sliding_window=6,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=_TYPES,
            intermediate_size=32,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32, truncate=False
            ),
        ),
    ),
}


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mla": (  # latent attention
        "DeepseekV3",
        _SMALL | dict(num_key_value_heads=4, kv_lora_rank=24, q_lora_rank=32, qk_rope_head_dim=8, v_head_dim=12),
    ),
    "other_limit": ("GptOss", FAMILIES["gpt_oss"][1] | {"swiglu_limit": 3.0}),
    "other_alpha": ("GptOss", FAMILIES["gpt_oss"][1] | {"swiglu_alpha": 1.0}),
    "clipped": ("Olmoe", FAMILIES["olmoe"][1] | {"clip_qkv": 0.5}),
    "scaled_by_position": (
        "Ministral3",
        _SMALL
        | dict(
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=32,
                llama_4_scaling_beta=0.1,
            )
        ),
    ),
    "shared_expert": (
        "Qwen2Moe",
        _SMALL
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=48),
    ),
    "norm_after_rope": ("HunYuanDenseV1", _SMALL | {"head_dim": 16}),
    "other_activation": ("Llama", _SMALL | {"hidden_act": "mish"}),
    "post_norm": ("OPT", FAMILIES["opt"][1] | {"do_layer_norm_before": False}),
    "projected": ("OPT", FAMILIES["opt"][1] | {"word_embed_proj_dim": 32}),
}


@functools.cache
def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model in which nothing is one or zero for want of training."""
    stem, options = (FAMILIES | REFUSED)[name]
    options = dict(options)
    config_class = options.pop("config_class", f"{stem}Config")
    model_class = options.pop("model_class", f"{stem}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            else:
                is_norm = "norm" in key or ".ln" in key
                parameter.add_(torch.randn_like(parameter) * (0.3 if is_norm else 0.5))
    return model.to(dtype).eval()


def right_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the model's own logits of one text."""
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids[None]).logits[0].float()
    return logits


def text(num_tokens: int = 20) -> torch.Tensor:
    """Return the ids of a text."""
    return torch.randint(1, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(3))
