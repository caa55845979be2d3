"""What a model's KV cache and its prefill cost, from its config alone: no weights, no torch, no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation
from pagedkv.sim.model_config import ConfigFields, load_config, preset_names
from pagedkv.sim.model_layers import LayerShape, layer_shapes, read_heads
from pagedkv.sim.model_parameters import Parameters, count_parameters

__all__ = ["KV_DTYPES", "LayerShape", "ModelShape", "Parameters", "preset_names", "read_model"]

KV_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "fp8": 1}
"""Bytes of one element of K or V."""

_SAME_DTYPE = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
_SAME_DTYPE |= dict.fromkeys(("fp8_e4m3", "fp8_e5m2", "float8_e4m3fn", "float8_e5m2", "float8"), "fp8")


@dataclass(frozen=True)
class ModelShape:
    """What a model keeps per token, and what a prompt token costs to compute.

    Attributes
    ----------
    name, model_type : str
    kv_dtype : str
        One of `KV_DTYPES`. The scales of int8 and fp8 are not counted.
    layers : tuple of LayerShape
    parameters : Parameters
    window_as_full : bool
        Count a windowed layer like one that keeps every token, as engines do that page all layers alike.
    notes : tuple of str
        What the config left open and how it was filled in.
    """

    name: str
    model_type: str
    kv_dtype: str
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
        return sum(layer.elements_per_token * (layer.window or 0) for layer in self.layers) * KV_DTYPES[self.kv_dtype]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def num_layers_of(self, kind: str) -> int:
        """Return how many layers are ``"full"``, ``"window"`` or ``"none"``."""
        return sum(layer.kind == kind for layer in self.layers)

    def bytes_of(self, tokens: int, sequences: int = 0) -> int:
        """Return the bytes of `tokens` cached tokens and the windows of `sequences` running sequences."""
        return tokens * self.bytes_per_token + sequences * self.window_bytes_per_sequence

    def prefill_flops(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the FLOPs that the first `tokens` tokens of a prompt cost, elementwise.

        A token costs ``2 · parameters.per_token`` for the matrices. In every attention layer it costs
        ``2 · c · H · (Dk + Dv)`` more (``4 · c · H · D`` where K and V heads have one size D) for the ``c`` tokens in
        its sight, itself included, at most the window. The output head, once per prompt, is left out, and so are
        linear-attention states.

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
            widths[layer.window] = widths.get(layer.window, 0) + layer.attention_width
        for window, width in widths.items():
            inside = n if window is None else np.minimum(n, window)
            in_sight = inside * (inside + 1) / 2 + (n - inside) * inside
            flops = flops + 2.0 * width * in_sight
        return np.asarray(flops, np.float64)

    def _bytes(self, layers: Iterable[LayerShape]) -> int:
        return sum(layer.elements_per_token for layer in layers) * KV_DTYPES[self.kv_dtype]


def read_model(
    model: str | Path | Mapping[str, Any], *, kv_dtype: str | None = None, window_as_full: bool = False
) -> ModelShape:
    """Read the shape of a model.

    Parameters
    ----------
    model : str, Path or mapping
        A preset's name (`preset_names`), a ``config.json``, a folder with one, JSON text, or the config as a dict.
    kv_dtype : str, optional
        Element type of the cache, where it is not that of the config: one of `KV_DTYPES`.
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
        `kv_dtype` is not one of `KV_DTYPES`.

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
    if "none" in {layer.kind for layer in layers}:
        notes.append(
            "layers without attention keep a state per sequence that is not counted; their FLOPs are estimates"
        )
    return ModelShape(
        name, config.model_type, dtype, layers, count_parameters(config, heads, layers), window_as_full, tuple(notes)
    )


def _dtype(config: ConfigFields, wanted: str | None, notes: list[str]) -> str:
    if wanted is not None:
        name = _SAME_DTYPE.get(str(wanted), str(wanted))
        if name not in KV_DTYPES:
            raise InvalidOperation(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {wanted!r}")
        return name
    field = "dtype" if "dtype" in config else "torch_dtype"
    stated = config.text(field, default="").removeprefix("torch.")
    if stated in ("", "auto"):
        notes.append("the config states no dtype: bfloat16 is assumed")
        return "bfloat16"
    name = _SAME_DTYPE.get(stated, stated)
    if name not in KV_DTYPES:
        raise config.error(field, f"expected one of {', '.join(KV_DTYPES)}, got {stated!r}")
    return name
