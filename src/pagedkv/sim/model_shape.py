"""Bytes of a model's KV cache and FLOPs of its prefill, from its config alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.sim.model_config import ConfigFields, load_config
from pagedkv.sim.model_layers import (
    FINE_RATIO,
    Heads,
    LayerShape,
    compress_ratios,
    delta_heads,
    has_state,
    heads_of,
    is_compressed,
    layer_shapes,
    mamba2,
    read_heads,
    recurrent_state,
)
from pagedkv.spec import DTYPE_BYTES
from pagedkv.typing import DtypeName
from pagedkv.validate import require_choice

# How many weights a model has, and how many of them one token meets.

# Families whose feed-forward has two matrices, not three (no gate), and that tie the output head to the embedding.
_UNGATED = frozenset(
    "gpt2 gpt_bigcode gpt_neo gpt_neox gptj opt bloom falcon RefinedWeb RefinedWebModel mpt phi starcoder2 nemotron "
    "nemotron_h codegen persimmon xglm apertus".split()
)
_TIED = frozenset(
    "gpt2 gpt_bigcode gpt_neo opt bloom falcon mpt gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text cohere "
    "cohere2 recurrent_gemma starcoder2".split()
)
_DENSE = tuple("intermediate_size_mlp intermediate_size n_inner ffn_hidden_size ffn_dim ffn_intermediate_size".split())
_CHOSEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Parameters:
    """Weights of a model's matrices. Norms and biases, a thousandth of them, are left out.

    Exact for plain transformers and mixtures of experts; an estimate for layers without attention, for layers that
    share weights, and for embeddings per layer.

    Attributes
    ----------
    total : int
        All, the embedding included.
    active : int
        Those that one token can meet: in a mixture of experts the experts it is sent to; the embedding included.
    per_token : int
        Active ones that every prompt token is multiplied with: without the embedding, which is looked up, and without
        the output head, which only the last token of a prompt needs.
    """

    total: int
    active: int
    per_token: int


def count_parameters(config: ConfigFields, heads: Heads, layers: Sequence[LayerShape]) -> Parameters:
    """Count the weights of a model from its config."""
    total = active = 0
    ratios = compress_ratios(config, len(layers)) if is_compressed(config) else []
    for layer, shape in enumerate(layers):
        mixer = 0
        if ratios:
            mixer = _compressed_attention(config, heads, ratios[layer])
        elif shape.kind != "none":
            mixer = _attention(config, heads_of(config, heads, shape.kind), shape)
        if has_state(config, layer, shape.kind):
            mixer += _other_mixer(config, heads)
        stored, used = _feed_forward(config, heads.hidden_size, layer, shape)
        total += mixer + stored
        active += mixer + used
    vocabulary = config.integer("vocab_size", "padded_vocab_size") * heads.hidden_size
    tied = config.flag("tie_word_embeddings", default=config.model_type in _TIED)
    outside = vocabulary * (1 if tied else 2) + _positions(config) * heads.hidden_size
    looked_up, multiplied = _per_layer_input(config, heads.hidden_size, len(layers))
    outside += looked_up
    return Parameters(total + outside + multiplied, active + outside + multiplied, active + multiplied)


def _per_layer_input(config: ConfigFields, hidden: int, layers: int) -> tuple[int, int]:
    """Gemma 3n and 4 give every layer an embedding of its own: what is looked up, and the matrices around it."""
    size = config.integer("hidden_size_per_layer_input", default=0, low=0)
    vocabulary = config.integer("vocab_size_per_layer_input", default=0, low=0)
    return vocabulary * layers * size, 3 * hidden * layers * size


def _positions(config: ConfigFields) -> int:
    if config.model_type not in ("gpt2", "gpt_bigcode", "gpt_neo", "opt"):
        return 0
    return config.integer("n_positions", "max_position_embeddings", default=0)


_GATED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def _attention(config: ConfigFields, heads: Heads, shape: LayerShape) -> int:
    hidden, queries = heads.hidden_size, heads.num_q_heads
    output = queries * heads.v_head_dim * hidden
    if heads.latent:
        rank, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim", low=0)
        q_rank = config.optional("q_lora_rank")
        into = q_rank * (hidden + queries * heads.head_dim) if q_rank else hidden * queries * heads.head_dim
        expand = rank * queries * (heads.head_dim - rope + heads.v_head_dim)
        indexer = (q_rank or hidden) * shape.index_width
        if shape.index_width:
            indexer += hidden * (heads.index + shape.index_width // heads.index)
        return into + hidden * (rank + rope) + expand + output + indexer
    gate = 2 if config.flag("attn_output_gate", default=config.model_type in _GATED) else 1
    keys = heads.num_kv_heads * (heads.head_dim + heads.v_head_dim)
    if config.flag("attention_k_eq_v") and shape.kind == "full":
        keys = heads.num_kv_heads * heads.head_dim  # one matrix makes both
    if not shape.elements_per_token:
        keys = 0  # another layer's are read
    return hidden * (gate * queries * heads.head_dim + keys) + output


def _compressed_attention(config: ConfigFields, heads: Heads, ratio: int) -> int:
    """Count the weights of a layer of DeepSeek-V4: attention, its compressor, and the sparse indexer with its own."""
    hidden, size, rank = heads.hidden_size, heads.head_dim, config.integer("q_lora_rank")
    width, inner = heads.num_q_heads * size, config.integer("o_lora_rank")
    attention = rank * (hidden + width) + hidden * size + width * inner + config.integer("o_groups") * inner * hidden
    if not ratio:
        return attention
    if ratio > FINE_RATIO:
        return attention + 2 * hidden * size
    index_heads, index_size = config.integer("index_n_heads"), config.integer("index_head_dim")
    return attention + 2 * hidden * 2 * (size + index_size) + index_heads * (rank * index_size + hidden)


def _other_mixer(config: ConfigFields, heads: Heads) -> int:
    """Count a layer without attention: a gated delta rule, a state-space layer, or else about 4·hidden²."""
    hidden = heads.hidden_size
    if "linear_num_value_heads" in config:
        keys = config.integer("linear_num_key_heads") * config.integer("linear_key_head_dim")
        num_values = config.integer("linear_num_value_heads")
        values = num_values * config.integer("linear_value_head_dim")
        return hidden * (2 * keys + 2 * values + 2 * num_values) + values * hidden
    if "head_dim" in config.nested("linear_attn_config") or "linear_num_heads" in config:
        count, size = delta_heads(config)
        return 4 * hidden * count * size + 2 * size * (hidden + count * size) + hidden * count
    if any(name in config for name in ("mamba_num_heads", "mamba_n_heads")):
        count, size, groups, state = mamba2(config)
        return hidden * (3 * count * size + 2 * groups * state + count)
    if any(name in config for name in ("mamba_expand", "expand")):
        inner = hidden * config.integer("mamba_expand", "expand")
        is_stated = config.first(("mamba_dt_rank",))[1] not in (None, "auto")
        rank = config.integer("mamba_dt_rank") if is_stated else hidden // 16
        return inner * (3 * hidden + 2 * rank + 2 * config.integer("mamba_d_state", default=16))
    return 4 * hidden * hidden


def _feed_forward(config: ConfigFields, hidden: int, layer: int, shape: LayerShape) -> tuple[int, int]:
    """Return the weights of a layer's feed-forward that are stored, and those that one token meets."""
    if _is_mixer_alone(config, layer):
        return 0, 0
    matrices = 2 if config.model_type in _UNGATED else 3
    inner = config.nested("ffn_config") if "ffn_config" in config else config
    experts = inner.integer("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", default=0, low=0)
    dense = matrices * hidden * _dense_size(config, hidden)
    if config.flag("use_double_wide_mlp") and not shape.elements_per_token:
        dense *= 2
    if experts < 2 or not _is_sparse(config, layer):
        return dense, dense
    size = inner.integer("moe_intermediate_size", "ffn_hidden_size", "intermediate_size")
    chosen = inner.integer(*_CHOSEN)
    if chosen > experts:
        raise config.error("num_experts_per_tok", f"expected at most the {experts} experts, got {chosen}")
    always = _shared_size(config, size) * matrices * hidden + hidden * experts
    if config.flag("enable_moe_block"):
        always += dense  # Gemma 4 runs it beside the experts
    expert = matrices * hidden * size
    return experts * expert + always, chosen * expert + always


def _is_mixer_alone(config: ConfigFields, layer: int) -> bool:
    """Say whether a layer of Nemotron-H is attention or a state-space layer, without a feed-forward of its own."""
    letter = config.text("hybrid_override_pattern", default="")[layer : layer + 1]
    words = (config.items("layers_block_type") or []) if config.model_type == "nemotron_h" else []
    return letter in ("M", "*") or (layer < len(words) and words[layer] not in ("moe", "mlp"))


def _shared_size(config: ConfigFields, expert_size: int) -> int:
    stated = config.optional("moe_shared_expert_intermediate_size")
    if stated:
        return stated
    count = config.integer("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0, low=0)
    if count:
        return count * expert_size
    if config.model_type == "llama4_text":
        return expert_size
    return config.integer("shared_expert_intermediate_size", "shared_intermediate_size", default=0, low=0)


def _dense_size(config: ConfigFields, hidden: int) -> int:
    name, value = config.first(_DENSE)
    if isinstance(value, list):
        sizes = [config.checked(name, size) for size in value] or [4 * hidden]
        return sum(sizes) // len(sizes)
    return config.integer(*_DENSE, default=4 * hidden)


def _is_sparse(config: ConfigFields, layer: int) -> bool:
    """Say whether a layer of a mixture of experts has experts."""
    letter = config.text("hybrid_override_pattern", default="")[layer : layer + 1]
    if letter:
        return letter != "-"
    words = config.items("mlp_layer_types") or []
    if layer < len(words):
        return str(words[layer]) != "dense"
    if layer < config.integer("first_k_dense_replace", "moe_layer_start_index", default=0, low=0):
        return False
    if layer in (config.integers("mlp_only_layers") or ()):
        return False
    name, frequency = config.first(("moe_layer_freq",))
    if isinstance(frequency, list):
        flags = config.integers(name) or []
        return layer >= len(flags) or bool(flags[layer])
    if "expert_layer_period" in config:
        offset = config.integer("expert_layer_offset", default=0, low=0)
        return layer % config.integer("expert_layer_period") == offset
    step = config.integer("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", default=1)
    return (layer + 1) % step == 0


_SAME_DTYPE = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
_SAME_DTYPE |= dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "float8_e4m3fn", "float8_e5m2", "float8"), "fp8")


@dataclass(frozen=True)
class ModelShape:
    """What a model keeps per token, and what a prompt token costs to compute.

    Attributes
    ----------
    name, model_type : str
    kv_dtype : str
        One of `pagedkv.spec.DTYPE_BYTES`. The scales of int8 and fp8 are not counted.
    layers : tuple of LayerShape
    parameters : Parameters
    window_as_full : bool
        Count a windowed layer like one that keeps every token, as engines do that page all layers alike.
    notes : tuple of str
        What the config left open and how it was filled in.
    """

    name: str
    model_type: str
    kv_dtype: DtypeName
    layers: tuple[LayerShape, ...]
    parameters: Parameters
    window_as_full: bool = False
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that every token takes, over the layers that keep all tokens."""
        return self._bytes(layer for layer in self.layers if self.window_as_full or layer.window is None)

    @property
    def bytes_per_token_all_layers(self) -> int:
        """Bytes that a token takes while it is inside every window."""
        return self._bytes(self.layers)

    @property
    def window_bytes_per_sequence(self) -> int:
        """Bytes that the windowed layers of one running sequence take at most, whatever its length."""
        if self.window_as_full:
            return 0
        return sum(layer.elements_per_token * (layer.window or 0) for layer in self.layers) * DTYPE_BYTES[self.kv_dtype]

    @property
    def state_bytes_per_sequence(self) -> int:
        """Bytes of recurrent states, convolutions and compressors that one running sequence keeps."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of one running sequence that do not grow with it: its windows and its states."""
        return self.window_bytes_per_sequence + self.state_bytes_per_sequence

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def num_layers_of(self, kind: str) -> int:
        """Return how many layers are ``"full"``, ``"window"`` or ``"none"``."""
        return sum(layer.kind == kind for layer in self.layers)

    def bytes_of(self, tokens: int, sequences: int = 0) -> int:
        """Return the bytes of `tokens` cached tokens, and the windows and states of `sequences` running sequences."""
        return tokens * self.bytes_per_token + sequences * self.bytes_per_sequence

    def prefill_flops(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the FLOPs that the first `tokens` tokens of a prompt cost, elementwise.

        A token costs ``2 · parameters.per_token`` for the matrices. In every attention layer it costs
        ``2 · c · H · (Dk + Dv)`` more (``4 · c · H · D`` where K and V heads have one size D) for the ``c`` tokens in
        its sight, itself included, at most the window or what a sparse indexer picks; that indexer costs
        ``2 · c · heads · size`` beside it. The output head, once per prompt, is left out, and so are linear-attention
        states.

        Parameters
        ----------
        tokens : array_like of int

        Returns
        -------
        float64 array, the shape of `tokens`
        """
        n = np.asarray(tokens, np.float64)
        flops = 2.0 * self.parameters.per_token * n
        widths: dict[int | None, int] = {}
        for layer in self.layers:
            limit = layer.window or layer.most_in_sight
            widths[limit] = widths.get(limit, 0) + layer.attention_width
            widths[None] = widths.get(None, 0) + layer.index_width
        for limit, width in widths.items():
            inside = n if limit is None else np.minimum(n, limit)
            in_sight = inside * (inside + 1) / 2 + (n - inside) * inside
            flops = flops + 2.0 * width * in_sight
        return np.asarray(flops, np.float64)

    def _bytes(self, layers: Iterable[LayerShape]) -> int:
        return sum(layer.elements_per_token for layer in layers) * DTYPE_BYTES[self.kv_dtype]


def read_model(
    model: str | Path | Mapping[str, Any], *, kv_dtype: DtypeName | None = None, window_as_full: bool = False
) -> ModelShape:
    """Read the shape of a model.

    Parameters
    ----------
    model : str, Path or mapping
        A preset's name (`preset_names`), a ``config.json``, a folder with one, JSON text, or the config as a dict.
    kv_dtype : str, optional
        Element type of the cache, where it is not that of the config: one of `pagedkv.spec.DTYPE_BYTES`.
    window_as_full : bool
        Count windowed layers like those that keep every token. A model with nothing but windowed layers is always
        counted so.

    Returns
    -------
    ModelShape

    Raises
    ------
    ModelConfigError
        The config cannot be read, or a field is missing or makes no sense; the text names it.
    InvalidOperation
        `kv_dtype` is not one of them.

    Examples
    --------
    >>> read_model("llama-3.1-8b").bytes_per_token
    131072
    """
    name, config = load_config(model)
    notes: list[str] = []
    dtype = _dtype(config, kv_dtype, notes)
    heads, layers = read_heads(config), layer_shapes(config)
    kinds = {layer.kind for layer in layers if layer.elements_per_token}
    if kinds == {"window"} and not window_as_full:
        window_as_full = True
        notes.append("every layer has a window: all tokens are counted, so that any prefix can be found again")
    if any(has_state(config, layer, shape.kind) for layer, shape in enumerate(layers)):
        known = recurrent_state(config) is not None
        notes.append(
            "layers without attention keep a state per sequence"
            + ("; their FLOPs are estimates" if known else " that is not counted; their FLOPs are estimates")
        )
    return ModelShape(
        name, config.model_type, dtype, layers, count_parameters(config, heads, layers), window_as_full, tuple(notes)
    )


def _dtype(config: ConfigFields, wanted: str | None, notes: list[str]) -> DtypeName:
    if wanted is not None:
        return require_choice("kv_dtype", _SAME_DTYPE.get(str(wanted), str(wanted)), DTYPE_BYTES)
    field = "dtype" if "dtype" in config else "torch_dtype"
    stated = config.text(field, default="").removeprefix("torch.")
    if stated in ("", "auto"):
        notes.append("the config states no dtype: bfloat16 is assumed")
        return "bfloat16"
    name = _SAME_DTYPE.get(stated, stated)
    if name not in DTYPE_BYTES:
        raise config.error(field, f"expected one of {', '.join(DTYPE_BYTES)}, got {stated!r}")
    return name
