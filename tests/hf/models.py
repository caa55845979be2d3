"""Small random models of many architectures, built from config: no download."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

VOCAB = 97
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _COMMON),
    "qwen3": ("Qwen3", _COMMON | {"head_dim": 16}),
    "gpt2": (
        "GPT2",
        dict(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None),
    ),
    "mistral": ("Mistral", _COMMON | {"sliding_window": 12}),
    "gemma2": (
        "Gemma2",
        _COMMON | {"head_dim": 16, "sliding_window": 12, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3",
        _COMMON | {"head_dim": 16, "sliding_window": 12, "layer_types": _TYPES, "query_pre_attn_scalar": 16},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        _COMMON
        | dict(
            num_key_value_heads=4,
            kv_lora_rank=24,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        _COMMON | dict(head_dim=16, sliding_window=12, num_local_experts=4, num_experts_per_tok=2, layer_types=_TYPES),
    ),
    "falcon": (
        "Falcon",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            multi_query=True,
            new_decoder_architecture=False,
            bos_token_id=None,
            eos_token_id=None,
        ),
    ),
    "bloom": (
        "Bloom",
        dict(vocab_size=VOCAB, hidden_size=64, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None),
    ),
}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (  # the last layers use the K and V of earlier ones
        "Gemma4",
        _COMMON
        | dict(
            head_dim=16,
            global_head_dim=16,
            sliding_window=12,
            num_hidden_layers=6,
            layer_types=_TYPES * 2,
            num_kv_shared_layers=3,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
        ),
    ),
    "llama4": (  # attention within chunks
        "Llama4",
        _COMMON
        | dict(
            head_dim=16,
            attention_chunk_size=8,
            num_local_experts=2,
            intermediate_size_mlp=96,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        ),
    ),
    "lfm2": (  # layers of short convolutions, which keep a state of their own
        "Lfm2",
        _COMMON | dict(layer_types=["conv", "full_attention", "conv"]),
    ),
}
_SPARSE = CONFIGS["deepseek_v3"][1] | dict(index_topk=12, index_n_heads=2, index_head_dim=16)
PECULIAR: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4_tuned": (  # layers without positions scale by the length of the text
        "Llama4",
        FURTHER["llama4"][1] | dict(layer_types=["full_attention"] * 4, num_hidden_layers=4),
    ),
    "phi3": (  # a text of more than 32 tokens has other rotary frequencies, and generate() computes it anew
        "Phi3",
        _COMMON
        | dict(
            original_max_position_embeddings=32,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=1e4,
                short_factor=[1.0] * 8,
                long_factor=[4.0] * 8,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "dynamic": (  # rotary frequencies grow with the text
        "Llama",
        _COMMON
        | dict(max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    ),
    "jamba": (  # its own code forgets the state before a chunk of a prompt
        "Jamba",
        _COMMON
        | dict(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
    ),
    "deepseek_v32": ("DeepseekV32", _SPARSE),  # keeps keys of an indexer, too
    "glm_moe_dsa": ("GlmMoeDsa", _SPARSE),
    "falcon_h1": (  # attention and a recurrence in every layer
        "FalconH1",
        _COMMON | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8),
    ),
    "zamba2": (
        "Zamba2",
        _COMMON
        | dict(
            layers_block_type=["linear_attention", "hybrid", "hybrid"],
            mamba_d_state=8,
            n_mamba_heads=4,
            mamba_headdim=32,
            mamba_ngroups=1,
            chunk_size=8,
            num_mem_blocks=1,
            use_mem_rope=True,
            adapter_rank=8,
        ),
    ),
    "minimax": ("MiniMax", _COMMON | dict(num_local_experts=2, num_experts_per_tok=1, block_size=8)),
    "recurrent_gemma": (
        "RecurrentGemma",
        _COMMON | dict(attention_window_size=16, lru_width=64, num_key_value_heads=1),
    ),
    "deepseek_v4": ("DeepseekV4", _COMMON),
    "both_ways": ("Gemma3", CONFIGS["gemma3"][1] | dict(use_bidirectional_attention=True)),
}
CLASSES = {"gpt2": "GPT2LMHeadModel"}
CONFIG_CLASSES = {
    "gemma3": "Gemma3TextConfig",
    "both_ways": "Gemma3TextConfig",
    "gemma4": "Gemma4TextConfig",
    "llama4": "Llama4TextConfig",
    "llama4_tuned": "Llama4TextConfig",
}


@functools.cache
def build(name: str, seed: int = 0, attention: str | None = None, layers: int | None = None) -> Any:
    """Return a model whose weights are wide enough for its tokens not to repeat."""
    stem, options = (CONFIGS | FURTHER | PECULIAR)[name]
    options = options | {"tie_word_embeddings": False}
    if layers is not None:
        options["num_hidden_layers"] = layers
    config = getattr(transformers, CONFIG_CLASSES.get(name, f"{stem}Config"))(**options)
    torch.manual_seed(seed)
    model_class = getattr(transformers, CLASSES.get(name, f"{stem}ForCausalLM"))
    model = model_class._from_config(config, attn_implementation=attention) if attention else model_class(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.12)
            elif key.endswith("sinks"):
                parameter.normal_()
    return model.eval()


def prompt(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Return random token ids, none of them the padding."""
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask; row i begins with 5 * i paddings."""
    ids, mask = prompt(rows, tokens), torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        ids[row, : 5 * row] = 0
        mask[row, : 5 * row] = 0
    return ids, mask
