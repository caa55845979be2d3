"""Layers of a model: what each keeps per token and per sequence, from its config."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagedkv.sim.model_config import MAX_COUNT, ConfigFields
from pagedkv.spec import DTYPE_BYTES

# Which layers attend to all, to a window, or not at all.

_FULL, _WINDOW, _NONE = "full", "window", "none"

# The words that configs use for a layer.
_KINDS = {
    **dict.fromkeys(("full_attention", "global_attention", "attention", "hybrid", "deepseek_sparse_attention"), _FULL),
    **dict.fromkeys(("indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"), _FULL),
    **dict.fromkeys(("sliding_attention", "local_attention", "chunked_attention", "local"), _WINDOW),
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "conv", "recurrent", "lightning", "moe", "mlp"), _NONE),
    "global": _FULL,
}
# Of every so many layers the last one attends to all, in families whose configs leave the pattern out.
_WINDOW_PATTERN = {
    **dict.fromkeys(("gemma2", "gpt_oss"), 2),
    **dict.fromkeys(("cohere2", "olmo3", "exaone4"), 4),
    "gemma3n_text": 5,
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma4_text"), 6),
}
_WINDOW_ON_REQUEST = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_vl_text", "qwen2_5_vl_text", "smollm3")
_LINEAR_INTERVAL = dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 4)
_WINDOW_FIELDS = tuple(
    "sliding_window attention_chunk_size window_size attention_window_size sliding_window_size".split()
)
_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class LayerShape:
    """One layer.

    Attributes
    ----------
    kind : str
        ``"full"``: keeps every token; ``"window"``: keeps the last `window` tokens of a running sequence; ``"none"``:
        no attention (a linear-attention, state-space or convolution layer), so nothing per token.
    elements_per_token : int
        Elements that one token takes in the cache, K and V together; 0 in a layer that reads another layer's.
    window : int or None
        Tokens that the layer sees; None for all.
    attention_width : int
        Query heads × (key size + value size): a token with c tokens in sight costs ``2 · attention_width · c`` FLOPs.
    state_bytes : int
        What the layer keeps of a running sequence whatever its length: a recurrent state with the last inputs of its
        convolution, or the window and the unfinished entries of an attention that compresses.
    most_in_sight : int or None
        Tokens that a sparse indexer leaves in sight at most; None for all.
    index_width : int
        Query heads × key size of that indexer, which looks at every token.
    """

    kind: str
    elements_per_token: int
    window: int | None
    attention_width: int
    state_bytes: int = 0
    most_in_sight: int | None = None
    index_width: int = 0


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer."""

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    latent: int = 0  # elements that one vector for all heads takes per token instead of K and V
    index: int = 0  # elements of the key of a sparse indexer

    @property
    def elements_per_token(self) -> int:
        """Elements that one token takes in a layer."""
        return (self.latent or self.num_kv_heads * (self.head_dim + self.v_head_dim)) + self.index


def num_layers_of(config: ConfigFields) -> int:
    """Return the number of decoder layers."""
    if config.flag("is_encoder_decoder"):
        raise config.error("is_encoder_decoder", "expected a decoder-only model, got an encoder with a decoder")
    listed = len(config.text("hybrid_override_pattern", default="")) or len(config.items("layers_block_type") or ())
    count = config.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers", default=listed or None)
    if count > _MAX_LAYERS:
        raise config.error("num_hidden_layers", f"expected an int in 1 … {_MAX_LAYERS}, got {count}")
    return count


def read_heads(config: ConfigFields) -> Heads:
    """Read head counts and sizes, under the names of all families.

    Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) keeps one latent vector and one rotary key per token and
    layer, ``kv_lora_rank + qk_rope_head_dim`` elements, whatever its number of heads.
    """
    hidden = config.integer("hidden_size", "n_embd", "d_model", "dim")
    q_heads = config.integer("num_attention_heads", "n_head", "n_heads", "num_heads")
    if "kv_lora_rank" in config:
        rope = config.integer("qk_rope_head_dim", low=0)
        head_dim = config.integer("qk_nope_head_dim", default=config.optional("head_dim") or hidden // q_heads) + rope
        value = config.integer("v_head_dim", default=head_dim - rope)
        latent, index = config.integer("kv_lora_rank") + rope, config.integer("index_head_dim", default=0)
        return Heads(hidden, q_heads, q_heads, head_dim, value, latent, index)
    if is_compressed(config):
        head_dim = config.integer("head_dim")
        return Heads(hidden, q_heads, 1, head_dim, head_dim, latent=head_dim)
    head_dim = config.integer("head_dim", "attention_head_dim", "kv_channels", default=0) or hidden // q_heads
    if not head_dim:
        raise config.error("num_attention_heads", f"expected at most hidden_size = {hidden}, got {q_heads}")
    kv_heads = _num_kv_heads(config, q_heads)
    if q_heads % kv_heads:
        reason = f"expected a divisor of the {q_heads} attention heads, got {kv_heads}"
        raise config.error("num_key_value_heads", reason)
    return Heads(hidden, q_heads, kv_heads, head_dim, config.integer("v_head_dim", default=head_dim))


def _num_kv_heads(config: ConfigFields, q_heads: int) -> int:
    if config.model_type in ("falcon", "RefinedWeb", "RefinedWebModel") and not config.flag("new_decoder_architecture"):
        return 1 if config.flag("multi_query", default=True) else q_heads
    attention = config.nested("attn_config") if "attn_config" in config else config
    stated = attention.optional("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
    if stated:
        return stated
    if config.flag("multi_query_attention"):
        return config.integer("multi_query_group_num", default=1)
    return 1 if config.flag("multi_query", default=config.model_type == "gpt_bigcode") else q_heads


def is_compressed(config: ConfigFields) -> bool:
    """Say whether one vector of K and V at once is kept per token, or per so many tokens (DeepSeek-V4)."""
    return config.model_type == "deepseek_v4" or "compress_ratios" in config


def compress_ratios(config: ConfigFields, count: int) -> list[int]:
    """Return of every layer for how many tokens it keeps one entry; 0 for a window alone.

    The list in the config may go on with the layers that predict further tokens.
    """
    ratios = config.integers("compress_ratios")
    if ratios is not None:
        if len(ratios) < count:
            raise config.error("compress_ratios", f"expected an entry for each of {count} layers, got {len(ratios)}")
        return ratios[:count]
    rates = config.nested("compress_rates")
    ratio = {
        "sliding_attention": 0,
        "compressed_sparse_attention": rates.integer("compressed_sparse_attention", default=4),
        "heavily_compressed_attention": rates.integer("heavily_compressed_attention", default=128),
    }
    words = config.items("layer_types", count) or []
    if not words or any(word not in ratio for word in words):
        raise config.error("compress_ratios", f"expected an entry for each of {count} layers, got nothing")
    return [ratio[word] for word in words]


FINE_RATIO = 16
"""Up to this ratio a sparse indexer picks entries, and neighbouring entries overlap; above, all are in sight."""


def layer_shapes(config: ConfigFields) -> tuple[LayerShape, ...]:
    """Return the shape of every decoder layer."""
    count, heads = num_layers_of(config), read_heads(config)
    if is_compressed(config):
        return tuple(_compressed(config, heads, ratio) for ratio in compress_ratios(config, count))
    kinds = _kinds(config, count)
    window = config.integer(*_WINDOW_FIELDS) if _WINDOW in kinds else None
    last_with_own = count - config.integer("num_kv_shared_layers", default=0, low=0)
    index = _index(config) if heads.index else None
    shapes = []
    for layer, kind in enumerate(kinds):
        here = heads_of(config, heads, kind)
        width = 0 if kind == _NONE else here.num_q_heads * (here.head_dim + here.v_head_dim)
        elements = here.elements_per_token if kind != _NONE and layer < last_with_own else 0
        shape = LayerShape(
            kind, elements, window if kind == _WINDOW else None, width, _state_bytes(config, layer, kind)
        )
        if index and kind == _FULL:
            shape = replace(shape, most_in_sight=index[0], index_width=index[1])
        shapes.append(shape)
    if not any(shape.elements_per_token for shape in shapes):
        raise config.error("layer_types", "expected at least one layer with attention: there is no KV cache to plan")
    return tuple(shapes)


def _index(config: ConfigFields) -> tuple[int, int]:
    """Return how many tokens a sparse indexer leaves in sight, and what it costs to look at one."""
    width = config.integer("index_n_heads", default=1) * config.integer("index_head_dim")
    return config.integer("index_topk", default=MAX_COUNT), width


def _compressed(config: ConfigFields, heads: Heads, ratio: int) -> LayerShape:
    """DeepSeek-V4: a window of tokens, and beyond it one entry for `ratio` of them.

    Beside the window a running sequence keeps the values and gates of the tokens whose entry is not finished; where
    entries overlap, those of the entry before and twice as wide.
    """
    window, width, size = (
        config.integer("sliding_window"),
        heads.num_q_heads * 2 * heads.head_dim,
        _element_bytes(config),
    )
    if not ratio:
        return LayerShape(_WINDOW, heads.latent, window, width)
    if ratio > FINE_RATIO:
        state = window * heads.latent + ratio * 2 * heads.latent
        return LayerShape(_FULL, _per_token(config, heads.latent, ratio), None, width // ratio, state * size)
    topk, index_width = _index(config)
    entry = heads.latent + config.integer("index_head_dim")
    state = window * heads.latent + 2 * ratio * 2 * 2 * entry
    elements = _per_token(config, entry, ratio)
    return LayerShape(_FULL, elements, None, width // ratio, state * size, topk * ratio, index_width // ratio)


def _per_token(config: ConfigFields, elements: int, ratio: int) -> int:
    if elements % ratio:
        raise config.error("compress_ratios", f"expected divisors of {elements} elements, got {ratio}")
    return elements // ratio


def _element_bytes(config: ConfigFields) -> int:
    """Return the bytes of an element of the model's own type; two where it has one that is not known here."""
    stated = config.text("dtype" if "dtype" in config else "torch_dtype", default="").removeprefix("torch.")
    return 4 if stated == "float32" else DTYPE_BYTES["bfloat16"]


def recurrent_state(config: ConfigFields) -> tuple[int, int] | None:
    """Return the elements that a layer without attention keeps of a sequence, or None where that is not known.

    The first number is the recurrent state, the second the last inputs of a convolution of width w: w − 1 of them.
    """
    hidden = config.integer("hidden_size", "n_embd", "d_model", "dim")
    kda = config.nested("linear_attn_config")
    if "linear_num_value_heads" in config:  # the gated delta rule of Qwen3-Next and Qwen3.5
        key_dim, value_dim = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
        keys, heads = config.integer("linear_num_key_heads") * key_dim, config.integer("linear_num_value_heads")
        past = config.integer("linear_conv_kernel_dim", default=4) - 1
        return heads * key_dim * value_dim, past * (2 * keys + heads * value_dim)
    if "head_dim" in kda or "linear_num_heads" in config:  # Kimi Delta Attention
        heads, size = delta_heads(config)
        past = kda.integer("short_conv_kernel_size", default=config.integer("linear_conv_kernel_dim", default=4)) - 1
        return heads * size * size, past * 3 * heads * size
    if any(name in config for name in ("mamba_num_heads", "mamba_n_heads")):
        heads, size, groups, state = mamba2(config)
        past = config.integer("conv_kernel", "mamba_d_conv", default=4) - 1
        return heads * size * state, past * (heads * size + 2 * groups * state)
    if "mamba_d_state" in config:
        inner = hidden * config.integer("mamba_expand", default=2)
        return inner * config.integer("mamba_d_state"), inner * (config.integer("mamba_d_conv", default=4) - 1)
    if "conv_L_cache" in config:
        return 0, hidden * (config.integer("conv_L_cache") - 1)
    if config.model_type in ("minimax", "minimax_text_01"):
        size = config.integer("head_dim", default=hidden // config.integer("num_attention_heads"))
        return config.integer("num_attention_heads") * size * size, 0
    return None


def delta_heads(config: ConfigFields) -> tuple[int, int]:
    """Return the heads of Kimi Delta Attention and their size."""
    inner = config.nested("linear_attn_config")
    heads = inner.optional("num_heads") or config.integer("linear_num_heads")
    return heads, inner.optional("head_dim") or config.integer("linear_head_dim", default=128)


def mamba2(config: ConfigFields) -> tuple[int, int, int, int]:
    """Return the heads of a Mamba-2 layer, their size, its groups, and the size of a head's state."""
    return (
        config.integer("mamba_num_heads", "mamba_n_heads"),
        config.integer("mamba_head_dim", "mamba_d_head", default=64),
        config.integer("n_groups", "mamba_n_groups", "mamba_ngroups", default=1),
        config.integer("ssm_state_size", "mamba_d_state", default=128),
    )


_STATE_BESIDE_ATTENTION = ("falcon_h1", "zamba2")
_STATE_DTYPE = ("mamba_ssm_cache_dtype", "mamba_ssm_dtype")


def has_state(config: ConfigFields, layer: int, kind: str) -> bool:
    """Say whether a layer keeps a recurrent state: one without attention that is no feed-forward of its own."""
    letter = config.text("hybrid_override_pattern", default="")[layer : layer + 1]
    words = config.items("layers_block_type") or config.items("layer_types") or []
    is_feed_forward = letter in ("-", "E", "O") or (layer < len(words) and words[layer] in ("moe", "mlp"))
    beside = config.model_type in _STATE_BESIDE_ATTENTION
    return beside or (kind == _NONE and not is_feed_forward and "cross_attention_layers" not in config)


def _state_bytes(config: ConfigFields, layer: int, kind: str) -> int:
    """Return the bytes of a layer's state; the recurrent part in float32 where the config says nothing else."""
    found = recurrent_state(config) if has_state(config, layer, kind) else None
    if found is None:
        return 0
    name, stated = config.first(_STATE_DTYPE)
    wide = 4 if stated in (None, "float32") else _element_bytes(config)
    return found[0] * wide + found[1] * _element_bytes(config)


def heads_of(config: ConfigFields, heads: Heads, kind: str) -> Heads:
    """Return the heads of a layer: Gemma 4 gives those that attend to all heads of their own."""
    head_dim = config.optional("global_head_dim") if kind == _FULL else None
    if head_dim is None:
        return heads
    kv_heads = config.integer("num_global_key_value_heads", default=heads.num_kv_heads)
    return replace(heads, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim)


def _kinds(config: ConfigFields, count: int) -> list[str]:
    """Say of every layer what it attends to; the first rule that finds its field decides."""
    for rule in (_named_kinds, _lettered_kinds, _listed_kinds, _periodic_kinds, _chunked_kinds, _windowed_kinds):
        found = rule(config, count)
        if found is not None:
            return found
    return [_FULL] * count


def _named_kinds(config: ConfigFields, count: int) -> list[str] | None:
    for name in ("layer_types", "layers_block_type"):
        words = config.items(name, count)
        if words is not None:
            return [_kind(config, name, word) for word in words]
    words = config.items("block_types")
    if words:
        # RecurrentGemma repeats its blocks; its attention is local.
        cycle = [_WINDOW if _kind(config, "block_types", word) == _FULL else _NONE for word in words]
        return [cycle[layer % len(cycle)] for layer in range(count)]
    groups = config.items("attention_types")
    return None if groups is None else _expanded(config, groups, count)


def _kind(config: ConfigFields, field: str, word: object) -> str:
    if not isinstance(word, str) or word not in _KINDS:
        raise config.error(field, f"expected one of {', '.join(sorted(_KINDS))}, got {str(word)[:60]!r}")
    return _KINDS[word]


def _expanded(config: ConfigFields, groups: list[object], count: int) -> list[str]:
    """GPT-Neo: ``[[["global", "local"], 12]]`` says a pattern and how often it comes."""
    kinds: list[str] = []
    for group in groups:
        match group:
            case [[*words], int(times)] if 0 <= times * len(words) <= count:
                kinds += [_kind(config, "attention_types", word) for word in words] * times
            case _:
                raise config.error("attention_types", f"expected [[…], times] groups of {count} layers in all")
    if len(kinds) != count:
        raise config.error("attention_types", f"expected {count} layers in all, got {len(kinds)}")
    return kinds


def _lettered_kinds(config: ConfigFields, count: int) -> list[str] | None:
    """Nemotron-H: one letter a layer, ``*`` for attention."""
    pattern = config.text("hybrid_override_pattern", default="")
    if not pattern:
        return None
    if len(pattern) != count:
        raise config.error("hybrid_override_pattern", f"expected {count} letters, one a layer, got {len(pattern)}")
    return [_FULL if letter == "*" else _NONE for letter in pattern]


def _listed_kinds(config: ConfigFields, count: int) -> list[str] | None:
    flags = config.integers("attn_type_list", count)
    if flags is not None:
        return [_FULL if flag else _NONE for flag in flags]
    crossing = config.integers("cross_attention_layers")
    if crossing is not None:
        # They keep the image, not the text.
        return [_NONE if layer in set(crossing) else _FULL for layer in range(count)]
    for name in ("attn_layer_indices", "full_attn_idxs"):
        listed = config.integers(name)
        if listed is not None:
            return [_FULL if layer in set(listed) else _NONE for layer in range(count)]
    listed = config.nested("linear_attn_config").integers("full_attn_layers", low=1)
    return None if listed is None else [_FULL if layer + 1 in set(listed) else _NONE for layer in range(count)]


def _periodic_kinds(config: ConfigFields, count: int) -> list[str] | None:
    if "attn_layer_period" in config:
        period = config.integer("attn_layer_period")
        offset = config.integer("attn_layer_offset", default=0, low=0)
        return [_FULL if layer % period == offset else _NONE for layer in range(count)]
    interval = config.integer("full_attention_interval", default=_LINEAR_INTERVAL.get(config.model_type, 0))
    return [_NONE if (layer + 1) % interval else _FULL for layer in range(count)] if interval else None


def _chunked_kinds(config: ConfigFields, count: int) -> list[str] | None:
    """Llama 4: layers with rotary positions attend within a chunk, the others to all."""
    if "attention_chunk_size" not in config:
        return None
    rotary = config.integers("no_rope_layers") or []
    if len(rotary) != count:
        interval = config.integer("no_rope_layer_interval", default=4)
        rotary = [(layer + 1) % interval for layer in range(count)]
    return [_WINDOW if flag else _FULL for flag in rotary]


def _windowed_kinds(config: ConfigFields, count: int) -> list[str] | None:
    family = config.model_type
    on_request = family in _WINDOW_ON_REQUEST
    if "sliding_window" not in config or not config.flag("use_sliding_window", default=not on_request):
        return None
    if "max_window_layers" in config:
        first = config.integer("max_window_layers", low=0)
        return [_FULL if layer < first else _WINDOW for layer in range(count)]
    name, pattern = config.first(("sliding_window_pattern", "_sliding_window_pattern"))
    if isinstance(pattern, str) and pattern:
        # "LLLG": three local layers, then a global one, and again.
        return [_FULL if pattern[layer % len(pattern)] == "G" else _WINDOW for layer in range(count)]
    every = config.checked(name, _WINDOW_PATTERN.get(family, 0) if pattern is None else pattern, low=0)
    return [_WINDOW if not every or (layer + 1) % every else _FULL for layer in range(count)]
