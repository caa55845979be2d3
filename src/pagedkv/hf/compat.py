"""Everything that pagedkv takes from inside of transformers: these seams move often, so they are all here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol

from torch import Tensor

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
    "LayerStore",
    "PagedLayer",
    "attention_by",
    "has_changing_rope",
    "is_causal_mask",
    "longest_text",
    "paged_layers",
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


def paged_layers(argument: str, config: Any) -> tuple[set[int], bool]:
    """Return which layers of a model hold plain K and V of every token, or of a window, and if the others keep nothing.

    Layers that share the K and V of others, or have no attention, keep nothing.

    Raises
    ------
    InvalidOperation
        If there is no such layer, or the model has an encoder; names the argument.
    """
    layers = stock_layers(config)
    paged = {number for number, layer in enumerate(layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)}
    if not paged:
        raise bad_argument(argument, "a model with attention layers", f"{type(config).__name__}")
    return paged, all(number in paged or isinstance(layer, DummyLayer) for number, layer in enumerate(layers))


def longest_text(config: Any) -> int | None:
    """Return the longest text that a model was made for, in tokens; None if its config has no limit."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


class LayerStore(Protocol):
    """Takes the new K and V of each layer of a forward pass."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V ``[batch, heads, tokens, dim]`` and return what attention is to get."""

    def length(self, layer: int) -> int:
        """Tell how many tokens the model believes the layer to hold."""


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One attention layer of a cache of transformers, whose K and V are in blocks; it holds nothing itself.

    A sliding window is no matter of this layer: the mask, which transformers builds from the config, cuts it out.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: LayerStore, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store, self._layer = store, number

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return what attention is to get."""
        return self._store.write(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        """Return how many tokens the layer holds."""
        return self._store.length(self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` new tokens will see, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: only the pool is a limit."""
        return -1

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """Leave it to the owner of the blocks, which moves the sequences of all layers at once."""

    lazy_initialization = reset = crop = _do_nothing
    reorder_cache = batch_repeat_interleave = batch_select_indices = _do_nothing


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
