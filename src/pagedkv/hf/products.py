"""The matrix products of a model's linear layers by oneDNN, while an engine runs the model.

For float32, torch hands them to MKL, which leaves the wide vectors of other makers' processors unused: on an AMD
processor with AVX-512, oneDNN multiplies twice as fast. Its results are also the same bits for every number of rows
but one, in any number of threads, where MKL's need four rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, functional

__all__ = ["Products"]


class Products:
    """A context in which the plain linear layers of a model multiply by oneDNN, where that is worth it.

    The layers and their weights stay as they are; outside of the context the model is torch's own again.

    Parameters
    ----------
    model : Module
        Whose layers these are. Layers of other classes, and those whose ``forward`` somebody replaced, are left alone.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        layers = [layer for layer in model.modules() if _is_plain(layer)] if _is_worth_it(model) else []
        self._forwards = [(vars(layer), _forward(layer)) for layer in layers]

    def __enter__(self) -> None:
        for attributes, forward in self._forwards:
            attributes["forward"] = forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attributes, _ in self._forwards:
            attributes.pop("forward", None)


def _is_worth_it(model: Any) -> bool:
    has_operator = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operator and torch.backends.cpu.get_cpu_capability() == "AVX512" and model.device.type == "cpu"


def _is_plain(layer: Any) -> bool:
    return type(layer) is Linear and "forward" not in vars(layer)


def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        if x.dtype is not torch.float32 or layer.weight.dtype is not torch.float32 or not x.numel():
            return functional.linear(x, layer.weight, layer.bias)
        product: Tensor = multiply(x, layer.weight, layer.bias, "none", [], "")
        return product

    return forward
