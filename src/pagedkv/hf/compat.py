"""Everything that pagedkv takes from inside of transformers: these seams move often, so they are all here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pagedkv.errors import MissingExtra, bad_argument

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        Cache,
        DynamicCache,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import (
        CacheLayerMixin,
        DummyLayer,
        DynamicIndexedLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionCacheLayerMixin,
        LinearAttentionLayer,
    )
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
    from transformers.pytorch_utils import Conv1D
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise MissingExtra("transformers", "hf") from error

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "Conv1D",
    "DynamicCache",
    "LayerStore",
    "ModuleState",
    "PagedLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "StatePart",
    "attention_by",
    "common_window",
    "forget_long_texts",
    "has_changing_rope",
    "has_states",
    "is_causal_mask",
    "is_hooked",
    "longest_text",
    "module_states",
    "paged_layer",
    "paged_layers",
    "record_past",
    "require_cache_argument",
    "restarts_beyond",
    "state_parts",
    "stock_layers",
]


def require_cache_argument(model: Any) -> None:
    """Refuse a model of transformers whose ``forward`` takes no ``past_key_values``: it has another cache, or none."""
    if isinstance(model, PreTrainedModel) and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise bad_argument("model", "one whose forward() takes past_key_values", type(model).__name__)


@contextmanager
def attention_by(name: str, config: Any) -> Iterator[None]:
    """Let the attention function `name` serve the model of a config, for the time being."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _rope_types(config: Any) -> set[str]:
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return {str(one.get("rope_type")) for one in (given, *given.values()) if isinstance(one, dict)}


def is_hooked(module: Any) -> bool:
    """Tell whether a module has hooks, but for those by which transformers returns inner states, or another forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    others = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    return bool(others) or "forward" in vars(module)


def has_changing_rope(config: Any) -> bool:
    """Tell whether the rotary frequencies depend on the highest position of a forward pass."""
    return any("dynamic" in name or name == "longrope" for name in _rope_types(config))


def forget_long_texts(model: Any) -> None:
    """Let rotary frequencies that grew with the longest text a model has seen be those of a new model."""
    if not has_changing_rope(model.config):
        return
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            first = getattr(module, f"{prefix}original_inv_freq", None)
            if first is not None:
                device = getattr(module, f"{prefix}inv_freq").device
                setattr(module, f"{prefix}inv_freq", first.to(device, copy=True))  # transformers writes into it
                setattr(module, name, module.original_max_seq_len)


def restarts_beyond(model: Any) -> int | None:
    """Return the length beyond which ``generate()`` computes a whole text anew, as the Phi-3 family does; or None.

    It is asked with a cache that pretends to be as long.
    """
    limit = getattr(model.config, "original_max_position_embeddings", None)
    if not isinstance(limit, int) or not has_changing_rope(model.config):
        return None
    cache = DynamicCache(config=model.config)
    cache.get_seq_length = lambda layer_idx=0: limit  # type: ignore[method-assign]
    ids = torch.zeros(1, limit + 1, dtype=torch.int64)
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, next_sequence_length=1)
    return None if inputs.get("past_key_values") is cache else limit


def stock_layers(config: Any) -> list[Any]:
    """Return the cache layers that transformers itself would make for a model of this config."""
    if not hasattr(config, "get_text_config"):
        raise bad_argument("config", "a model's config of transformers", f"{type(config).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise bad_argument("config", "a decoder-only model", f"{type(config).__name__}")
    try:
        layers: list[Any] = DynamicCache(config=config).layers
    except Exception as error:  # transformers has no cache layers for it either
        name = type(config).__name__
        raise bad_argument("config", "a model that DynamicCache has layers for", f"{name}: {error!r}") from error
    return layers


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
_WITH_STATE = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_WITHOUT_KV = (LinearAttentionLayer, DummyLayer)


def paged_layers(argument: str, config: Any) -> tuple[set[int], bool]:
    """Return which layers of a model hold K and V of every token, or of a window, and if nothing else is kept.

    Layers that share the K and V of others, or have no attention, keep nothing.

    Raises
    ------
    InvalidOperation
        If there is no such layer, tokens see later ones, or the model has an encoder; names the argument.
    """
    layers = stock_layers(config)
    _require_causal(argument, config)
    paged = {number for number, layer in enumerate(layers) if type(layer) in _PLAIN + _WITH_STATE}
    unknown = {type(layer).__name__ for layer in layers if type(layer) not in _PLAIN + _WITH_STATE + _WITHOUT_KV}
    if unknown:
        name = f"{type(config).__name__}, whose layers keep {' and '.join(sorted(unknown))}"
        raise bad_argument(argument, "a model with attention layers whose K and V are kept token by token", name)
    if not paged:
        raise bad_argument(argument, "a model with attention layers", type(config).__name__)
    return paged, all(type(layer) in _PLAIN or isinstance(layer, DummyLayer) for layer in layers)


def common_window(config: Any) -> int | None:
    """Return how many tokens any layer sees at most, the token itself included, where all have a sliding window."""
    layers = [layer for layer in stock_layers(config) if isinstance(layer, CacheLayerMixin)]
    text = config.get_text_config(decoder=True)
    if getattr(text, "attention_chunk_size", None) is not None or not layers:
        return None
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return None if None in windows else max(windows)  # type: ignore[type-var]


def _require_causal(argument: str, config: Any) -> None:
    """Refuse a model whose tokens see later ones: what is kept of a text would change with every token."""
    text = config.get_text_config(decoder=True)
    for name, wrong in (("is_causal", (False,)), ("use_bidirectional_attention", (True, "all"))):
        given = getattr(text, name, None)
        if any(given is value or (isinstance(value, str) and given == value) for value in wrong):
            name = f"{type(config).__name__} with {name}={given!r}: its tokens see later ones"
            raise bad_argument(argument, "a causal model", name)


def longest_text(config: Any) -> int | None:
    """Return the longest text that a model was made for, in tokens; None if its config has no limit.

    Dynamic rotary frequencies stretch with the text.
    """
    if any("dynamic" in name for name in _rope_types(config)):
        return None
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


class IndexedPagedLayer(PagedLayer):  # type: ignore[no-untyped-call]
    """A layer of sparse attention, whose indexer has keys of its own: they are in blocks as a further layer."""

    indexer_position_ids: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store the indexer's keys ``[batch, tokens, dim]`` of the new tokens and return those of all."""
        half = indexer_key_states.shape[-1] // 2
        states = indexer_key_states[:, None]
        parts = self._store.write(-1 - self._layer, states[..., :half], states[..., half:])
        return torch.cat(parts, dim=-1)[:, 0]


class LinearPagedLayer(PagedLayer):  # type: ignore[no-untyped-call]
    """A layer with attention and a recurrent state: K and V are in blocks, the state is the stock layer's matter."""

    def __init__(self, store: LayerStore, number: int, state: Any) -> None:
        super().__init__(store, number)
        self._state = state

    def __getattr__(self, name: str) -> Any:
        if "_state" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._state, name)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the state can be brought back."""
        return bool(self._state.is_croppable)

    def reset(self) -> None:
        """Reset the state."""
        self._state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Bring the state back by so many tokens, a negative number."""
        self._state.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let the state of row ``i`` be that of the old row ``beam_idx[i]``."""
        self._state.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the state of every row."""
        self._state.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the state of these rows."""
        self._state.batch_select_indices(indices)


LinearAttentionCacheLayerMixin.register(LinearPagedLayer)


def paged_layer(store: LayerStore, number: int, stock: Any) -> PagedLayer:
    """Return the layer that takes the place of a stock one, whose K and V go to `store`."""
    if isinstance(stock, LinearAttentionCacheLayerMixin):
        return LinearPagedLayer(store, number, stock)
    return (IndexedPagedLayer if type(stock) is DynamicIndexedLayer else PagedLayer)(store, number)


# Recurrent states, one tensor by one: ``layer.conv_states[number]`` and ``layer.recurrent_states[number]``.


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of the state of a text, ``[1, …]``.

    Attributes
    ----------
    layer : int
    name : {"conv", "recurrent"}
    number : int
        Of the state within its layer.
    """

    layer: int
    name: str
    number: int

    def _of(self, layers: list[Any], what: str) -> dict[int, Any]:
        found: dict[int, Any] = getattr(layers[self.layer], what)
        return found

    def get(self, layers: list[Any]) -> Tensor:
        """Return what a layer holds."""
        held: Tensor = self._of(layers, f"{self.name}_states")[self.number]
        return held

    def width(self, layers: list[Any]) -> int:
        """Return how many columns of it are kept, where it is a convolution's; else 0."""
        return int(self._of(layers, "conv_kernel_size")[self.number]) if self.name == "conv" else 0

    def set(self, layers: list[Any], state: Tensor, has_past: bool) -> None:
        """Let a layer hold `state`, in place if it can; without a past it has the shape only."""
        layer = layers[self.layer]
        layer.dtype, layer.device = state.dtype, state.device
        self._of(layers, f"{self.name}_states")[self.number] = state
        self._of(layers, f"is_{self.name}_states_initialized")[self.number] = True
        if self.name == "conv":
            layer.conv_kernel_size[self.number] = state.shape[-1]
            layer.has_previous_state[self.number] = has_past


@dataclass(frozen=True, slots=True)
class ModuleState:
    """A tensor ``[1, …]`` of the state of a text that a module of the model keeps as an attribute of itself."""

    module: Any
    attribute: str
    name: ClassVar[str] = "module"

    def get(self, layers: list[Any]) -> Tensor:
        """Return what the module holds."""
        held: Tensor = getattr(self.module, self.attribute)
        return held

    def width(self, layers: list[Any]) -> int:
        """Return 0: all of it is kept."""
        return 0

    def set(self, layers: list[Any], state: Tensor | None, has_past: bool) -> None:
        """Let the module hold `state`, or nothing without a past."""
        setattr(self.module, self.attribute, state if has_past else None)


def module_states(model: Any) -> list[ModuleState]:
    """Return where modules of a model keep the state of a text in themselves, as RecurrentGemma's do."""
    if not getattr(model, "_is_stateful", False):
        return []
    return [
        ModuleState(module, name)
        for module in model.modules()
        for name, held in vars(module).items()
        if "state" in name and (held is None or isinstance(held, Tensor))
    ]


def has_states(model: Any) -> bool:
    """Tell whether a model keeps a state of a text besides K and V, in the layers of its cache or in its modules."""
    _, keeps_only_kv = paged_layers("model", model.config)
    return not keeps_only_kv or bool(module_states(model))


def state_parts(layers: list[Any]) -> list[StatePart]:
    """Return the parts of a state that the stock layers of a text hold."""
    return [
        StatePart(place, name, number)
        for place, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        for name in ("conv", "recurrent")
        for number, is_there in getattr(layer, f"is_{name}_states_initialized").items()
        if is_there
    ]


def record_past(layers: list[Any], wanted: bool) -> None:
    """Let convolution layers hold all columns of the next forward pass instead of the last ones, or not."""
    for layer in layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.record_past = wanted


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
