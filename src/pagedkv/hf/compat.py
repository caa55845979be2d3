"""Everything that pagedkv takes from inside of transformers: these seams move often, so they are all here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from pagedkv.errors import MissingExtra, bad_argument

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
    from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise MissingExtra("transformers", "hf") from error

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "attention_by",
    "has_changing_rope",
    "is_causal_mask",
    "is_pageable",
    "is_stateless",
    "stock_layers",
]


@contextmanager
def attention_by(name: str, config: Any) -> Iterator[None]:
    """Let the attention function `name` serve the model of a config, for the time being."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def has_changing_rope(config: Any) -> bool:
    """Tell whether the rotary frequencies depend on the highest position of a forward pass."""
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return any(
        "dynamic" in str(one.get("rope_type")) or one.get("rope_type") == "longrope"
        for one in (given, *given.values())
        if isinstance(one, dict)
    )


def stock_layers(config: Any) -> list[Any]:
    """Return the cache layers that transformers itself would make for a model of this config."""
    if not hasattr(config, "get_text_config"):
        raise bad_argument("config", "a model's config of transformers", f"{type(config).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise bad_argument("config", "a decoder-only model", f"{type(config).__name__}")
    layers: list[Any] = DynamicCache(config=config).layers
    return layers


def is_pageable(layer: Any) -> bool:
    """Tell whether a stock layer holds plain K and V of every token, or of a window of them."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def is_stateless(layer: Any) -> bool:
    """Tell whether a stock layer keeps nothing: layers that share the K and V of others, or have no attention."""
    return isinstance(layer, DummyLayer)


def is_causal_mask(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Tell whether a mask function of transformers is the plain causal one, cut to `window` tokens if there is one.

    Mask functions are closures, so they are compared by code and by what they close over. A chunked mask, or one that
    a model has changed by a function of its own, is not equal.
    """
    if window is None:
        return mask_function is causal_mask_function
    return _same(mask_function, sliding_window_causal_mask_function(window))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ is b.__code__ and _same(*cells)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (type(a) is type(b) is int and a == b)
