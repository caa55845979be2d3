"""What a model's cache and prefill cost, against published figures and against sums written out by hand."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedkv.sim
from pagedkv.errors import InvalidOperation, ModelConfigError
from pagedkv.models import shipped_model_path
from pagedkv.sim.model_config import preset_names
from pagedkv.sim.model_shape import read_model

PRESETS = Path(pagedkv.sim.__file__).parent / "presets"
SMALL = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def small(**changes):
    return {**SMALL, **changes}


def kinds(**changes):
    return "".join(layer.kind[0] for layer in read_model(small(**changes)).layers)


MIB = 2**20
STATE = 4  # bytes of an element of a recurrent state: float32


def mamba2(heads, size, groups=8, state=128):
    return STATE * heads * size * state + 2 * 3 * (heads * size + 2 * groups * state)


def delta(values, keys=16, size=128):
    return STATE * values * size * size + 2 * 3 * (2 * keys + values) * size


# By hand, from head counts alone. Name: bytes per token over full layers, over all layers, windows of a sequence,
# states of a sequence, billions of parameters (all, active).
PUBLISHED = {
    "llama-3.1-8b": (131_072, 131_072, 0, 0, 8.03, 8.03),
    "llama-3.1-70b": (327_680, 327_680, 0, 0, 70.55, 70.55),
    "llama-3.1-405b": (516_096, 516_096, 0, 0, 405.85, 405.85),
    "llama-3.2-3b": (28 * 4096, 28 * 4096, 0, 0, 3.21, 3.21),
    "llama-4-scout": (12 * 4096, 48 * 4096, 36 * 4096 * 8192, 0, 107.77, 17.17),
    "llama-4-maverick": (12 * 4096, 48 * 4096, 36 * 4096 * 8192, 0, 400.71, 17.18),
    "qwen3-4b": (36 * 4096, 36 * 4096, 0, 0, 4.02, 4.02),
    "qwen3-8b": (147_456, 147_456, 0, 0, 8.19, 8.19),
    "qwen3-14b": (40 * 4096, 40 * 4096, 0, 0, 14.77, 14.77),
    "qwen3-32b": (262_144, 262_144, 0, 0, 32.76, 32.76),
    "qwen3-30b-a3b": (98_304, 98_304, 0, 0, 30.53, 3.35),
    "qwen3-235b-a22b": (94 * 2048, 94 * 2048, 0, 0, 235.09, 22.19),
    "qwen3-coder-480b-a35b": (62 * 4096, 62 * 4096, 0, 0, 480.15, 35.47),
    "qwen3-next-80b-a3b": (12 * 2048, 12 * 2048, 0, 36 * delta(32), 79.67, 3.87),
    "qwen3.5-4b": (8 * 4096, 8 * 4096, 0, 24 * delta(32), 4.21, 4.21),
    "qwen3.5-9b": (8 * 4096, 8 * 4096, 0, 24 * delta(32), 8.95, 8.95),
    "qwen3.5-27b": (16 * 4096, 16 * 4096, 0, 48 * delta(48), 26.90, 26.90),
    "qwen3.5-35b-a3b": (10 * 2048, 10 * 2048, 0, 30 * delta(32), 34.66, 3.45),
    "qwen3.5-397b-a17b": (15 * 2048, 15 * 2048, 0, 45 * delta(64), 396.35, 17.35),
    "mistral-7b": (131_072, 131_072, 0, 0, 7.25, 7.25),
    "ministral-3-8b": (34 * 4096, 34 * 4096, 0, 0, 8.49, 8.49),
    "mistral-small-4-119b": (36 * 320 * 2, 36 * 320 * 2, 0, 0, 119.0, 6.63),
    "mixtral-8x7b": (131_072, 131_072, 0, 0, 46.70, 12.88),
    "mixtral-8x22b": (56 * 4096, 56 * 4096, 0, 0, 140.63, 39.16),
    "gemma-2-9b": (21 * 8192, 42 * 8192, 21 * 8192 * 4096, 0, 9.24, 9.24),
    "gemma-3-4b": (5 * 4096, 34 * 4096, 29 * 4096 * 1024, 0, 3.88, 3.88),
    "gemma-3-12b": (8 * 8192, 48 * 8192, 40 * 8192 * 1024, 0, 11.77, 11.77),
    "gemma-3-27b": (10 * 8192, 62 * 8192, 52 * 8192 * 1024, 0, 27.01, 27.01),
    "gemma-4-e2b": (3 * 2048, 3 * 2048 + 12 * 1024, 12 * 1024 * 512, 0, 4.63, 4.63),
    "gemma-4-e4b": (4 * 4096, 4 * 4096 + 20 * 2048, 20 * 2048 * 512, 0, 7.46, 7.46),
    "gemma-4-26b-a4b": (5 * 4096, 5 * 4096 + 25 * 8192, 25 * 8192 * 1024, 0, 25.2, 3.82),
    "gemma-4-31b": (10 * 8192, 10 * 8192 + 50 * 16_384, 50 * 16_384 * 1024, 0, 30.7, 30.7),
    "deepseek-v3": (61 * 576 * 2, 70_272, 0, 0, 671.03, 37.55),
    "deepseek-v3.2": (61 * (576 + 128) * 2, 85_888, 0, 0, 671.88, 38.40),
    # 21 layers keep 512 + 128 elements for four tokens, 20 keep 512 for 128; all a window of 128 vectors, two of them
    # nothing else; and the values and gates of unfinished entries, twice and twice as wide where these overlap.
    "deepseek-v4-flash": (
        2 * (21 * 160 + 20 * 4),
        2 * (21 * 160 + 20 * 4 + 2 * 512),
        2 * 2 * 512 * 128,
        2 * (41 * 128 * 512 + 21 * 2 * 8 * 2 * 640 + 20 * 2 * 128 * 512),
        284.3,
        13.76,
    ),
    "deepseek-v4-pro": (
        2 * (30 * 160 + 31 * 4),
        2 * (30 * 160 + 31 * 4),
        0,
        2 * (61 * 128 * 512 + 30 * 2 * 8 * 2 * 640 + 31 * 2 * 128 * 512),
        1573.0,
        49.69,
    ),
    "kimi-k2": (70_272, 70_272, 0, 0, 1026.4, 32.86),
    "kimi-linear-48b-a3b": (7 * 576 * 2, 7 * 576 * 2, 0, 20 * delta(32, keys=32), 49.12, 3.48),
    "glm-4.5": (92 * 4096, 92 * 4096, 0, 0, 352.8, 33.63),
    "glm-4.5-air": (46 * 4096, 46 * 4096, 0, 0, 106.85, 13.42),
    "glm-4.7-flash": (47 * 576 * 2, 47 * 576 * 2, 0, 0, 29.94, 3.90),
    "glm-5": (78 * (576 + 128) * 2, 78 * (576 + 128) * 2, 0, 0, 743.9, 41.78),
    "gpt-oss-20b": (12 * 2048, 24 * 2048, 12 * 2048 * 128, 0, 20.91, 4.19),
    "gpt-oss-120b": (18 * 2048, 36 * 2048, 18 * 2048 * 128, 0, 116.79, 5.71),
    "minimax-m2": (62 * 4096, 62 * 4096, 0, 0, 228.69, 11.03),
    "nemotron-nano-9b-v2": (4 * 4096, 4 * 4096, 0, 27 * mamba2(128, 80), 8.89, 8.89),
    "nemotron-3-nano-30b-a3b": (6 * 1024, 6 * 1024, 0, 23 * mamba2(64, 64), 31.58, 3.58),
    "granite-4.0-h-micro": (4 * 2048, 4 * 2048, 0, 36 * mamba2(64, 64, groups=1), 3.19, 3.19),
    "jamba-v0.1": (4 * 4096, 4 * 4096, 0, 28 * (STATE * 8192 * 16 + 2 * 3 * 8192), 51.57, 12.1),
    "olmo-hybrid-7b": (8 * 15_360, 8 * 15_360, 0, 24 * (STATE * 30 * 96 * 192 + 2 * 3 * 11_520), 7.43, 7.43),
    "ernie-4.5-21b-a3b": (28 * 2048, 28 * 2048, 0, 0, 21.83, 3.35),
    "solar-open-100b": (48 * 4096, 48 * 4096, 0, 0, 102.65, 12.05),
    "olmo-3-32b": (16 * 4096, 64 * 4096, 48 * 4096 * 4096, 0, 32.23, 32.23),
    "smollm3-3b": (36 * 2048, 36 * 2048, 0, 0, 3.08, 3.08),
    "pysmall": (2048, 2048, 0, 0, 0.0038034, 0.0038034),
}


def test_there_is_a_figure_for_every_preset():
    assert set(preset_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_figures(name):
    full, every, windows, states, total, active = PUBLISHED[name]
    model = read_model(name)
    assert (model.name, model.kv_dtype) == (name, "bfloat16")
    assert len(model.notes) == ("none" in {layer.kind for layer in model.layers})
    assert (model.bytes_per_token, model.bytes_per_token_all_layers) == (full, every)
    assert (model.window_bytes_per_sequence, model.state_bytes_per_sequence) == (windows, states)
    assert model.bytes_of(1000, sequences=3) == 1000 * full + 3 * (windows + states)
    assert model.parameters.total / 1e9 == pytest.approx(total, rel=2e-3)
    assert model.parameters.active / 1e9 == pytest.approx(active, rel=2e-3)


def test_every_preset_says_where_its_figures_are_from():
    for name in preset_names():
        assert json.loads((PRESETS / f"{name}.json").read_text())["_source"]


# Not of the kind of which there is a model for text alone, and of which transformers reads the heads otherwise.
NOT_COUNTED = ("mistral-small-4-119b", "gemma-4-26b-a4b", "gemma-4-31b", "gemma-3-27b")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {*NOT_COUNTED}))
def test_presets_have_as_many_parameters_as_transformers_makes(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((PRESETS / f"{name}.json").read_text())
    del config["_source"]
    config["model_type"] = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    counted = sum(weights.numel() for weights in made.parameters())
    assert read_model(name).parameters.total == pytest.approx(counted, rel=1e-3)


def test_the_preset_of_the_shipped_model_is_its_config():
    folder = shipped_model_path()
    shipped, preset = read_model(folder), read_model("pysmall")
    assert shipped.name == "pysmall"
    assert shipped == preset == read_model(folder / "config.json") == read_model(str(folder))


def test_every_way_to_name_a_model_reads_the_same(tmp_path):
    file = tmp_path / "tiny" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(SMALL))
    other = tmp_path / "shape.json"
    other.write_text(json.dumps(SMALL))
    models = [read_model(way) for way in (file, str(file.parent), other, json.dumps(SMALL), SMALL)]
    assert [model.name for model in models] == ["tiny", "tiny", "shape", "llama", "llama"]
    assert len({model.layers for model in models}) == 1 and len({model.parameters for model in models}) == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of Hugging Face's hub with two models, one of them under two owners."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for owner, name, layers in (("acme", "Tiny-1B", 3), ("acme", "Twice", 1), ("other", "Twice", 2)):
        folder = tmp_path / f"models--{owner}--{name}"
        for revision, count in (("aaa", layers + 10), ("bbb", layers)):
            (folder / "snapshots" / revision).mkdir(parents=True)
            (folder / "snapshots" / revision / "config.json").write_text(json.dumps(small(num_hidden_layers=count)))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("bbb\n")


def test_a_model_of_the_local_hub_cache_is_known_by_its_name(hub):
    for name in ("acme/Tiny-1B", "Tiny-1B", "ACME/tiny-1b"):
        model = read_model(name)
        assert (model.name, model.num_layers) == (name, 3)
    assert read_model("other/Twice").num_layers == 2
    with pytest.raises(ModelConfigError, match="acme/Twice|other/Twice"):
        read_model("Twice")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("qwen3.5-35b", "qwen3.5-35b-a3b"),
        ("Qwen/Qwen3-8B-Instruct", "qwen3-8b"),
        ("deepseek-v32", "deepseek-v3.2"),
        ("gemma4-31b", "gemma-4-31b"),
        ("kimi", "kimi-k2, kimi-linear-48b-a3b"),
        ("tiny-1", "acme/Tiny-1B"),
    ],
)
def test_a_model_that_is_not_known_is_answered_with_those_like_it(hub, asked, meant):
    with pytest.raises(ModelConfigError) as failure:
        read_model(asked)
    assert meant in str(failure.value) and "llama-3.1-405b" not in str(failure.value)


def test_a_model_like_no_other_is_answered_with_all():
    with pytest.raises(ModelConfigError) as failure:
        read_model("no-such-preset")
    assert all(name in str(failure.value) for name in preset_names())


def test_a_sparse_indexer_bounds_what_attention_costs():
    changes = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    changes |= {"index_head_dim": 2, "index_n_heads": 3, "index_topk": 10}
    model = read_model(small(**changes))
    assert model.bytes_per_token == 4 * (8 + 4 + 2) * 2
    per_token = 2 * model.parameters.per_token
    by_hand = sum(per_token + 2 * 4 * (8 * (8 + 8) * min(seen, 10) + 3 * 2 * seen) for seen in range(1, 51))
    assert float(model.prefill_flops(50)) == by_hand


@pytest.mark.parametrize(
    ("changes", "bytes_of_state"),
    [
        (
            {"layer_types": ["mamba"] * 3 + ["attention"], "mamba_d_state": 16, "mamba_d_conv": 4},
            4 * 128 * 16 + 2 * 3 * 128,
        ),
        ({"layer_types": ["conv"] * 3 + ["full_attention"], "conv_L_cache": 3}, 2 * 2 * 64),
        ({"model_type": "minimax", "layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 4 * 8 * 8 * 8),
        (
            {"layer_types": ["mamba"] * 3 + ["attention"], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16},
            4 * 4 * 8 * 16 + 2 * 3 * (32 + 32),
        ),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 0),
        ({"cross_attention_layers": [0, 1, 2], "conv_L_cache": 3}, 0),
    ],
)
def test_states_of_layers_without_attention(changes, bytes_of_state):
    model = read_model(small(**changes))
    assert model.state_bytes_per_sequence == 3 * bytes_of_state
    assert model.bytes_per_token == 64 and model.bytes_of(0, sequences=2) == 2 * 3 * bytes_of_state


def test_a_state_that_is_not_known_is_said_to_be_left_out():
    unknown = read_model(small(layer_types=["linear_attention"] * 3 + ["full_attention"]))
    assert "not counted" in unknown.notes[0]
    assert "not counted" not in read_model("qwen3-next-80b-a3b").notes[0]


def test_layers_beside_attention_keep_their_state_too():
    model = read_model(small(model_type="falcon_h1", mamba_n_heads=4, mamba_d_head=8, mamba_d_state=16))
    assert model.bytes_per_token == 4 * 64 and model.state_bytes_per_sequence == 4 * (
        4 * 4 * 8 * 16 + 2 * 3 * (32 + 32)
    )


def test_compressed_layers_are_read_under_their_old_and_new_names():
    old = json.loads((PRESETS / "deepseek-v4-flash.json").read_text())
    words = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    new = {name: value for name, value in old.items() if name != "compress_ratios"}
    new["layer_types"] = [words[ratio] for ratio in old["compress_ratios"]]
    assert read_model(new).layers == read_model({**old, "compress_ratios": [*old["compress_ratios"], 0, 0]}).layers
    with pytest.raises(ModelConfigError, match="compress_ratios: expected an entry for each of 43 layers, got nothing"):
        read_model({name: value for name, value in new.items() if name != "layer_types"})
    with pytest.raises(ModelConfigError, match="43 layers, got 3"):
        read_model({**old, "compress_ratios": [4, 4, 4]})
    with pytest.raises(ModelConfigError, match="divisors of 640"):
        read_model({**old, "compress_ratios": [3] * 43})


def test_bytes_follow_the_element_type():
    sizes = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "fp8": 1, "float8_e4m3fn": 1, "half": 2}
    for dtype, size in sizes.items():
        assert read_model(SMALL, kv_dtype=dtype).bytes_per_token == 4 * 2 * (8 + 8) * size
    assert read_model(small(dtype=None, torch_dtype="torch.float32")).kv_dtype == "float32"


def test_a_config_without_a_dtype_says_what_is_assumed():
    model = read_model({name: value for name, value in SMALL.items() if name != "dtype"})
    assert model.kv_dtype == "bfloat16" and "no dtype" in model.notes[0]


def test_gpt2_and_its_names():
    model = read_model({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257})
    assert model.bytes_per_token == 12 * 2 * 768 * 2
    assert model.parameters.total == 50257 * 768 + 12 * 12 * 768**2


@pytest.mark.parametrize(
    ("changes", "kv_heads"),
    [
        ({"num_key_value_heads": None}, 8),
        ({"model_type": "falcon", "num_key_value_heads": None}, 1),
        ({"model_type": "falcon", "num_key_value_heads": None, "multi_query": False}, 8),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_key_value_heads": None, "num_kv_heads": 4}, 4),
        ({"model_type": "gpt_bigcode", "num_key_value_heads": None}, 1),
        ({"num_key_value_heads": None, "multi_query_attention": True, "multi_query_group_num": 2}, 2),
        ({"num_key_value_heads": None, "attn_config": {"kv_n_heads": 4}}, 4),
    ],
)
def test_heads_of_k_and_v(changes, kv_heads):
    assert read_model(small(**changes)).bytes_per_token == 4 * kv_heads * 16 * 2


def test_latent_attention_keeps_one_vector_and_one_rotary_key():
    model = read_model(small(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128))
    assert model.bytes_per_token == 4 * (512 + 64) * 2
    assert model.layers[0].attention_width == 8 * (192 + 128)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({}, "ffff"),
        ({"sliding_window": None}, "ffff"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "linear_attention", "mamba"], "sliding_window": 9},
            "fwnn",
        ),
        ({"model_type": "gemma2", "sliding_window": 9}, "wfwf"),
        ({"model_type": "gpt_oss", "sliding_window": 9}, "wfwf"),
        ({"model_type": "gemma3_text", "sliding_window": 9, "num_hidden_layers": 7}, "wwwwwfw"),
        ({"model_type": "cohere2", "sliding_window": 9, "sliding_window_pattern": 3}, "wwfw"),
        ({"model_type": "exaone4", "sliding_window": 9, "sliding_window_pattern": "LG"}, "wfwf"),
        ({"model_type": "qwen2", "sliding_window": 9}, "ffff"),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}, "fffw"),
        ({"model_type": "mistral", "sliding_window": 9, "use_sliding_window": False}, "ffff"),
        ({"attention_types": [[["global", "local"], 2]], "window_size": 9}, "fwfw"),
        ({"model_type": "llama4_text", "attention_chunk_size": 9}, "wwwf"),
        ({"attention_chunk_size": 9, "no_rope_layers": [0, 1, 1, 1]}, "fwww"),
        ({"attn_layer_period": 3, "attn_layer_offset": 1}, "nfnn"),
        ({"model_type": "qwen3_next"}, "nnnf"),
        ({"full_attention_interval": 2}, "nfnf"),
        ({"attn_type_list": [0, 0, 1, 0]}, "nnfn"),
        ({"attn_layer_indices": [2]}, "nnfn"),
        ({"full_attn_idxs": [0, 1]}, "ffnn"),
        ({"cross_attention_layers": [1]}, "fnff"),
        ({"linear_attn_config": {"full_attn_layers": [4]}}, "nnnf"),
        ({"hybrid_override_pattern": "M-*-"}, "nnfn"),
        ({"layers_block_type": ["mamba", "hybrid", "mamba", "attention"]}, "nfnf"),
        ({"block_types": ["recurrent", "attention"], "attention_window_size": 9}, "nwnw"),
    ],
)
def test_which_layers_keep_what(changes, pattern):
    assert kinds(**changes) == pattern


def test_a_windowed_layer_costs_its_window_once_per_sequence():
    model = read_model(small(model_type="gemma2", sliding_window=100))
    assert model.bytes_per_token == 2 * 64 and model.bytes_per_token_all_layers == 4 * 64
    assert model.window_bytes_per_sequence == 2 * 64 * 100
    assert model.bytes_of(1000, sequences=3) == 1000 * 128 + 3 * 12_800
    paged = read_model(small(model_type="gemma2", sliding_window=100), window_as_full=True)
    assert (paged.bytes_per_token, paged.window_bytes_per_sequence) == (256, 0)


def test_a_model_of_windows_alone_counts_every_token_and_says_so():
    model = read_model(small(model_type="mistral", sliding_window=4096))
    assert model.bytes_per_token == 4 * 64 and model.window_bytes_per_sequence == 0
    assert "every layer has a window" in model.notes[0]


def test_layers_that_read_another_layers_cache_keep_nothing():
    assert read_model(small(num_kv_shared_layers=3)).bytes_per_token == 64


def test_a_multimodal_config_is_read_from_its_text_part():
    inner = {name: value for name, value in SMALL.items() if name != "dtype"}
    outer = {"model_type": "llava", "torch_dtype": "float16", "vision_config": {"hidden_size": 1}, "text_config": inner}
    assert read_model(outer).layers == read_model(SMALL).layers
    assert read_model(outer).kv_dtype == "float16"
    assert read_model({"thinker_config": outer}).layers == read_model(SMALL).layers


def test_parameters_of_a_mixture_of_experts():
    changes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    parameters = read_model(small(first_k_dense_replace=1, **changes)).parameters
    attention = 64 * (8 * 8 + 2 * 2 * 8) + 64 * 64
    expert, dense, router = 3 * 64 * 32, 3 * 64 * 128, 64 * 8
    assert parameters.per_token == 4 * attention + dense + 3 * (3 * expert + router)
    assert parameters.total == 4 * attention + dense + 3 * (9 * expert + router) + 2 * 64 * 1000
    assert parameters.active == parameters.per_token + 2 * 64 * 1000
    every_other = read_model(small(decoder_sparse_step=2, **changes)).parameters
    assert every_other.per_token == 4 * attention + 2 * dense + 2 * (3 * expert + router)


def test_prefill_is_linear_in_the_weights_and_quadratic_in_the_context():
    model = read_model(SMALL)
    by_hand = sum(2 * model.parameters.per_token + 4 * 4 * 8 * 8 * context for context in range(1, 51))
    assert float(model.prefill_flops(50)) == by_hand
    np.testing.assert_array_equal(model.prefill_flops([0, 50]), [0, by_hand])


def test_prefill_of_a_windowed_layer_stops_growing_at_the_window():
    model = read_model(small(model_type="gemma2", sliding_window=10))
    by_hand = sum(2 * model.parameters.per_token + 2 * 4 * 64 * (c + min(c, 10)) for c in range(1, 51))
    assert float(model.prefill_flops(50)) == by_hand


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers", "missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "expected an int in 1"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers", "10000,"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers", "expected an int"),
        ({"hidden_size": "64"}, "hidden_size", "'64'"),
        ({"hidden_size": 64.0}, "hidden_size", "64.0"),
        ({"hidden_size": True}, "hidden_size", "True"),
        ({"hidden_size": 4}, "num_attention_heads", "at most hidden_size"),
        ({"num_attention_heads": -1}, "num_attention_heads", "-1"),
        ({"num_key_value_heads": 16}, "num_key_value_heads", "a divisor of the 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "a divisor of the 8"),
        ({"num_key_value_heads": [1, 2]}, "num_key_value_heads", "[1, 2]"),
        ({"vocab_size": None}, "vocab_size", "missing"),
        ({"dtype": "float64"}, "dtype", "float16"),
        ({"dtype": 16}, "dtype", "a string"),
        ({"dtype": None, "torch_dtype": "int3"}, "torch_dtype", "int3"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim", "missing"),
        ({"layer_types": ["full_attention"]}, "layer_types", "4 layers, got 1 entries"),
        ({"layer_types": ["odd"] * 4}, "layer_types", "'odd'"),
        ({"layer_types": "full"}, "layer_types", "a list"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types", "no KV cache"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window", "missing"),
        ({"sliding_window": -5}, "sliding_window", "-5"),
        ({"sliding_window": 5, "sliding_window_pattern": 1.5}, "sliding_window_pattern", "1.5"),
        ({"attention_types": [[["global"], 3]], "window_size": 9}, "attention_types", "got 3"),
        ({"attention_types": [[["global"], 10**12]]}, "attention_types", "groups"),
        ({"hybrid_override_pattern": "M*"}, "hybrid_override_pattern", "4 letters"),
        ({"num_experts": 8}, "num_experts_per_tok", "missing"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok", "at most the 8"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder", "decoder-only"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
        ({"attn_config": 7}, "attn_config", "an object"),
    ],
)
def test_a_field_at_fault_is_named(changes, field, expected):
    with pytest.raises(ModelConfigError) as failure:
        read_model(small(**changes))
    assert failure.value.field == field and expected in str(failure.value) and field in str(failure.value)
    assert str(pickle.loads(pickle.dumps(failure.value))) == str(failure.value)


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', "{}", '{"num_hidden_layers": 1}', '{"a":' * 5000])
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(ModelConfigError):
        read_model(text)


def test_files_that_are_no_config_are_refused(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    for path in (
        tmp_path / "list.json",
        tmp_path / "binary.json",
        tmp_path,
        tmp_path / "none",
        "a\0b",
        "no-such-preset",
    ):
        with pytest.raises(ModelConfigError, match="expected"):
            read_model(path)


def test_a_config_of_absurd_size_is_not_read(tmp_path):
    file = tmp_path / "huge.json"
    with file.open("wb") as stream:
        stream.truncate(17 * 2**20)
    with pytest.raises(ModelConfigError, match="16 MiB"):
        read_model(file)


def test_an_unknown_element_type_is_refused():
    with pytest.raises(InvalidOperation, match="kv_dtype: expected one of float16"):
        read_model(SMALL, kv_dtype="int3")


ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**12,
    1.5,
    "",
    "L",
    "full_attention",
    [],
    [0],
    [1, 2, 3, 4],
    ["x"],
    [[]],
    {},
    {"a": 1},
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(preset_names()), st.data())
def test_a_config_with_odd_fields_is_read_or_refused(preset, data):
    config = json.loads((PRESETS / f"{preset}.json").read_text())
    extra = ["sliding_window", "layer_types", "kv_lora_rank", "num_experts", "attn_layer_period", "block_types"]
    extra += ["attention_types", "hybrid_override_pattern", "linear_attn_config", "moe_layer_freq", "global_head_dim"]
    extra += ["compress_ratios", "mlp_layer_types", "linear_num_heads", "mamba_num_heads", "conv_L_cache"]
    extra += ["attention_chunk_size", "no_rope_layers", "full_attention_interval", "text_config", "mamba_expand"]
    names = st.sampled_from(sorted(config) + extra)
    config |= data.draw(st.dictionaries(names, st.sampled_from(ODD), min_size=1, max_size=3))
    try:
        model = read_model(config)
    except ModelConfigError as error:
        assert "expected" in str(error)
    else:
        assert model.bytes_per_token > 0 and np.isfinite(model.prefill_flops(1000))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen3_moe", "gemma2", "deepseek_v3", "qwen3_next"])
def test_weights_are_those_of_transformers(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[family](num_hidden_layers=5)
    with torch.device("meta"):
        weights = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    counted = read_model(json.loads(config.to_json_string(use_diff=False))).parameters.total
    assert counted == pytest.approx(weights, rel=2e-3)


def test_the_guide_names_every_preset_and_every_gpu():
    from pagedkv.sim.gpus import gpu_names

    table = (Path(__file__).parents[2] / "docs" / "cli.md").read_text().partition("### Known models and GPUs")[2]
    cells = [line.split("|")[2] for line in table.partition("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    told = set()
    for cell in cells:
        stem = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if not name.startswith("-"):
                told.add(name)
                stem = re.split(r"-(?=e?\d+b)", name)[0]
            else:
                told.add(stem + name)
    assert told == {*preset_names(), *gpu_names()}
