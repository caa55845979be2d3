"""Model configs: ``config.json`` of all families, and the shape of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from pagedkv.errors import ModelConfigError

_PRESETS = Path(__file__).resolve().parent / "presets"
_MAX_BYTES = 16 * 2**20
_MAX_COUNT = 2**31 - 1
_OUTSIDE = ("dtype", "torch_dtype", "tie_word_embeddings")  # of a nested config, where that is silent
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
# What published configs leave to the defaults of their family.
_FAMILY_DEFAULTS = {
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208},
}


class ConfigFields:
    """The fields of a config, typed: a wrong or missing one is a `ModelConfigError` that names it and the `source`.

    The values are as read from JSON; null counts as missing.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._values = {name: value for name, value in values.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def model_type(self) -> str:
        """The family, ``"llama"`` say; empty where the config does not tell."""
        return self.text("model_type", default="")

    def error(self, field: str, reason: str) -> ModelConfigError:
        """Return the error to raise for a field."""
        return ModelConfigError(self.source, field, reason)

    def first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Return the first of the names that is there, and its value; the first name and None where none is."""
        return next(((name, self._values[name]) for name in names if name in self._values), (names[0], None))

    def integer(self, *names: str, default: int | None = None, low: int = 1) -> int:
        """Return an int in ``low … 2**31 − 1`` that the config keeps under one of the names."""
        name, value = self.first(names)
        if value is None:
            if default is None:
                others = f" (or {', '.join(names[1:])})" if names[1:] else ""
                raise self.error(name, f"expected an int ≥ {low}{others}, got nothing: the field is missing")
            return default
        return self.checked(name, value, low)

    def checked(self, name: str, value: object, low: int = 1) -> int:
        """Return a value as an int in ``low … 2**31 − 1``."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MAX_COUNT:
            raise self.error(name, f"expected an int in {low} … {_MAX_COUNT}, got {_shown(value)}")
        return value

    def optional(self, *names: str, low: int = 1) -> int | None:
        """Return an int, or None where the config has none of the names."""
        return self.integer(*names, low=low) if any(name in self for name in names) else None

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {_shown(value)}")
        return value

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"expected a string, got {_shown(value)}")
        return value

    def items(self, name: str, count: int | None = None) -> list[Any] | None:
        """Return a list, of `count` entries where that is given, or None where the field is missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or (count is not None and len(value) != count):
            wanted = "a list" if count is None else f"a list with one entry for each of {count} layers"
            got = f"{len(value)} entries" if isinstance(value, list) else _shown(value)
            raise self.error(name, f"expected {wanted}, got {got}")
        return value

    def integers(self, name: str, count: int | None = None, low: int = 0) -> list[int] | None:
        """Return a list of ints, or None where the field is missing."""
        found = self.items(name, count)
        return None if found is None else [self.checked(name, value, low) for value in found]

    def nested(self, name: str) -> ConfigFields:
        """Return the fields of an object inside the config; no fields where it is missing."""
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"expected an object, got {_shown(value)}")
        return ConfigFields(value, self.source)


def preset_names() -> tuple[str, ...]:
    """Return the names of the model shapes that come with the package."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def load_config(model: str | Path | Mapping[str, Any]) -> tuple[str, ConfigFields]:
    """Return a short name and the fields of a language model: those of the text part of a multimodal config.

    A model is a preset's name, a ``config.json``, a folder with one, JSON text that begins with ``{``, or the config.
    """
    source, name = "inline JSON", ""
    if isinstance(model, Mapping):
        values = dict(model)
    elif (text := str(model)).lstrip().startswith("{"):
        values = _decoded(text.encode(), source)
    elif text in preset_names():
        source = name = text
        values = _decoded((_PRESETS / f"{text}.json").read_bytes(), source)
    else:
        file, raw = _read(Path(text))
        source, values = str(file), _decoded(raw, str(file))
        name = file.resolve().parent.name if file.name == "config.json" else file.stem
    fields = _language_part(values, source)
    return name or fields.model_type or "model", fields


def _read(path: Path) -> tuple[Path, bytes]:
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        names = ", ".join(preset_names())
        raise ModelConfigError(
            _shown(str(path)), "", f"expected a config.json, a folder with one, or one of {names}; {reason}"
        ) from None
    if len(raw) > _MAX_BYTES:
        raise ModelConfigError(str(file), "", f"expected a config of at most {_MAX_BYTES >> 20} MiB, this is larger")
    return file, raw


def _decoded(raw: bytes, source: str) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelConfigError(source, "", f"expected a JSON object, this is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelConfigError(source, "", f"expected a JSON object, got {_shown(values)}")
    return values


def _language_part(values: dict[str, Any], source: str) -> ConfigFields:
    """Step into the text part of a multimodal config; what is said outside of it holds where it is silent."""
    for name in _NESTED:
        inner = values.get(name)
        if isinstance(inner, dict):
            outer: dict[str, Any] = {k: values[k] for k in _OUTSIDE if k in values}
            stated: dict[str, Any] = {key: value for key, value in inner.items() if value is not None}
            return _language_part({**outer, **stated}, source)
    defaults: dict[str, Any] = _FAMILY_DEFAULTS.get(str(values.get("model_type")), {})
    return ConfigFields({**defaults, **values}, source)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# What every layer of a model keeps per token: which layers attend to all, to a window, or not at all.

_FULL, _WINDOW, _NONE = "full", "window", "none"

# The words that configs use for a layer.
_KINDS = {
    **dict.fromkeys(("full_attention", "global_attention", "attention", "hybrid", "deepseek_sparse_attention"), _FULL),
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
    """

    kind: str
    elements_per_token: int
    window: int | None
    attention_width: int


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer."""

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    latent: int = 0  # elements that multi-head latent attention keeps per token instead of K and V

    @property
    def elements_per_token(self) -> int:
        """Elements that one token takes in a layer."""
        return self.latent or self.num_kv_heads * (self.head_dim + self.v_head_dim)


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
        rope = config.integer("qk_rope_head_dim")
        head_dim = config.integer("qk_nope_head_dim", default=config.optional("head_dim") or hidden // q_heads) + rope
        value = config.integer("v_head_dim", default=head_dim - rope)
        latent = config.integer("kv_lora_rank") + rope + config.integer("index_head_dim", default=0)
        return Heads(hidden, q_heads, q_heads, head_dim, value, latent)
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


def layer_shapes(config: ConfigFields) -> tuple[LayerShape, ...]:
    """Return the shape of every decoder layer."""
    count, heads = num_layers_of(config), read_heads(config)
    kinds = _kinds(config, count)
    window = config.integer(*_WINDOW_FIELDS) if _WINDOW in kinds else None
    last_with_own = count - config.integer("num_kv_shared_layers", default=0, low=0)
    full = _global_heads(config, heads)
    shapes = []
    for layer, kind in enumerate(kinds):
        here = full if kind == _FULL else heads
        width = 0 if kind == _NONE else here.num_q_heads * (here.head_dim + here.v_head_dim)
        elements = here.elements_per_token if kind != _NONE and layer < last_with_own else 0
        shapes.append(LayerShape(kind, elements, window if kind == _WINDOW else None, width))
    if not any(shape.elements_per_token for shape in shapes):
        raise config.error("layer_types", "expected at least one layer with attention: there is no KV cache to plan")
    return tuple(shapes)


def _global_heads(config: ConfigFields, heads: Heads) -> Heads:
    """Gemma 4 gives the layers that attend to all heads of their own."""
    head_dim = config.optional("global_head_dim")
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
