"""Weights in 8 bits, and weights as panels, in the order in which they are multiplied.

In 8 bits the matrices of a decoder are int8, with a float32 scale for each row: symmetric, without a zero point,
``scale = amax / 127`` over the inputs of one output, ``number = round(weight / scale)``, half to even. A product is
that of the numbers, multiplied by the scale once all is summed up. Vectors (norms, biases, sinks) and learned positions
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.data.decoder import Attention, Decoder, Experts, Layer, Linear, Mlp
from pagedkv.data.huge_pages import HugePages
from pagedkv.data.quantised import GREATEST
from pagedkv.data.simd_llvm import has_bfloat16_products
from pagedkv.data.simd_products import AXES, PANEL, unit_of
from pagedkv.errors import bad_argument

WEIGHTS = ("int8",)
"""What weights can be quantised to."""
CHUNK = 1 << 20
"""Elements that are held in float32 at once."""

Quantised = tuple[Tensor, Tensor]
LetGo = Callable[[list[Tensor]], None]


class Room:
    """Where matrices are quantised: the numbers go into huge pages, and all take turns in the same two buffers.

    The allocator would not find the holes again that buffers for each of them leave behind.
    """

    def __init__(self) -> None:
        self._pages = HugePages()
        self._buffers = torch.empty(2, 0)

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        """Return an int8 tensor that is not written yet."""
        return self._pages.empty(shape, torch.int8)

    def buffers(self, num_rows: int, size: int) -> tuple[Tensor, Tensor]:
        """Return two float32 matrices."""
        count = num_rows * size
        if self._buffers.shape[1] < count:
            self._buffers = torch.empty(2, max(count, CHUNK))
        first, second = self._buffers[:, :count].view(2, num_rows, size)
        return first, second


def quantised_rows(weight: Tensor, room: Room | None = None) -> Quantised:
    """Return a matrix ``[num_out, num_in]`` as contiguous int8, in `room`, and float32 scales ``[num_out]``.

    A row of zeros has scale 0. Raises InvalidOperation for NaN or an infinity.
    """
    room, (num_rows, size) = room or Room(), weight.shape
    numbers, scales = room.numbers((num_rows, size)), torch.empty(num_rows)
    greatest, step = GREATEST[torch.int8], max(1, CHUNK // max(1, size))
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        rows, sizes = room.buffers(count, size)
        rows.copy_(weight[first : first + count])
        scale = torch.abs(rows, out=sizes).amax(1) / greatest
        if not torch.isfinite(scale).all():
            raise bad_argument("weights", "None for a model with NaN or infinities in its weights", "'int8'")
        rows.div_(torch.where(scale > 0, scale, 1.0)[:, None]).clamp_(-greatest, greatest).round_()
        numbers[first : first + count], scales[first : first + count] = rows, scale
    return numbers, scales


def quantised(decoder: Decoder, let_go: LetGo | None = None) -> Decoder:
    """Return a decoder whose matrices are int8.

    Parameters
    ----------
    decoder : Decoder
        Left without layers, so that their memory may go as soon as theirs are quantised.
    let_go : callable, optional
        Given the matrices that are done with, after each layer and at the end.

    Returns
    -------
    Decoder

    Raises
    ------
    InvalidOperation
        If a weight is NaN or infinite.
    """
    matrices, layers = _Matrices(), []
    while decoder.layers:
        layer = decoder.layers.pop(0)
        layers.append(_changed(layer, matrices.linear))
        del layer
        matrices.leave(let_go)
    embedding, row_scale = matrices.matrix(decoder.embedding)
    head = matrices.linear(decoder.head)
    matrices.leave(let_go)
    return replace(decoder, embedding=embedding, embedding_row_scale=row_scale, layers=layers, head=head)


def _changed(part: Any, change: Callable[[Linear], Linear]) -> Any:
    """Return a part of a decoder with all of its products changed."""
    if isinstance(part, Linear):
        return change(part)
    if isinstance(part, list):
        return [_changed(each, change) for each in part]
    if isinstance(part, (Layer, Attention, Mlp, Experts)):
        return replace(part, **{one.name: _changed(getattr(part, one.name), change) for one in fields(part)})
    return part


class _Matrices:
    """What was quantised, so that a matrix in several places stays one."""

    def __init__(self) -> None:
        self._found: dict[Any, Quantised] = {}
        self._done: list[Tensor] = []
        self._room = Room()

    def matrix(self, weight: Tensor) -> Quantised:
        key = _place_of(weight)
        if key not in self._found:
            self._found[key] = quantised_rows(weight, self._room)
        self._done.append(weight)
        return self._found[key]

    def linear(self, linear: Linear) -> Linear:
        weight, scale = self.matrix(linear.weight)
        return Linear(weight, linear.bias, scale)

    def leave(self, let_go: LetGo | None) -> None:
        """Hand on what is done with, and hold it no longer."""
        done, self._done = self._done, []
        if let_go is not None:
            let_go(done)


def acts_dtype(weights: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return what weights are multiplied by: float32, or uint16 for bfloat16 where the processor multiplies that.

    Parameters
    ----------
    weights, dtype : torch.dtype
        Of the weights; of the model, which counts where they are int8.
    """
    kind = dtype if weights == torch.int8 else weights
    return torch.uint16 if kind == torch.bfloat16 and has_bfloat16_products() else torch.float32


def packed(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """Return a decoder whose matrices are panels, of 32 outputs each, for the processor at hand.

    Panels are read as one stream, and their sums need no adding up. Matrices are packed where they lie, whoever else
    holds them: nothing is copied. Left as they are: the last rows that make no panel, matrices whose rows lie apart or
    are no whole units (see :func:`pagedkv.data.simd_products.unit_of`), and those of which others share a part.

    Parameters
    ----------
    decoder : Decoder
    dtype : torch.dtype
        Of the model.

    Returns
    -------
    Decoder
    """
    matrices: list[Tensor] = []

    def note(linear: Linear) -> Linear:
        matrices.append(linear.weight)
        return linear

    _changed([*decoder.layers, decoder.head], note)
    unit = unit_of(acts_dtype(decoder.embedding.dtype, dtype).itemsize, decoder.embedding.dtype == torch.int8)
    multiplied, done = {_place_of(each) for each in matrices}, set[Any]()
    for weight in _apart([*matrices, decoder.embedding]):
        whole = unit if weight.dtype != torch.int8 else 4  # what `widen` copies at once
        if _place_of(weight) in multiplied and weight.is_contiguous() and weight.shape[1] % whole == 0:
            _pack(weight, unit)
            done.add(_place_of(weight))

    def packed_linear(linear: Linear) -> Linear:
        return replace(linear, is_packed=_place_of(linear.weight) in done)

    return replace(
        decoder,
        layers=_changed(decoder.layers, packed_linear),
        head=packed_linear(decoder.head),
        embedding_is_packed=_place_of(decoder.embedding) in done,
    )


def num_packed(weight: Tensor, is_packed: bool) -> int:
    """Return how many of the first rows of a matrix are panels, if it is packed."""
    return len(weight) // PANEL * PANEL if is_packed else 0


def _place_of(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.shape, weight.stride()


def _apart(weights: list[Tensor]) -> list[Tensor]:
    """Return each matrix once, but none that shares a part of its memory with another one."""
    found = sorted({_place_of(each): each for each in weights}.values(), key=Tensor.data_ptr)
    ends = [each.data_ptr() + each.element_size() * (1 + _last_of(each)) for each in found]
    reached = np.maximum.accumulate([0, *ends[:-1]])
    begins = [*(each.data_ptr() for each in found[1:]), 1 << 63]
    triples = zip(found, reached, ends, begins, strict=True)
    return [each for each, before, end, after in triples if each.data_ptr() >= before and end <= after]


def _last_of(weight: Tensor) -> int:
    return sum((size - 1) * apart for size, apart in zip(weight.shape, weight.stride(), strict=True))


def _pack(weight: Tensor, unit: int) -> None:
    """Make panels of all rows but the last ones, in their place."""
    shape, order = AXES[unit]
    split, back = [shape[axis] for axis in order], [1 + order.index(axis) for axis in range(len(order))]
    num_rows = num_packed(weight, True)
    step = PANEL * max(1, CHUNK // (PANEL * weight.shape[1]))
    for first in range(0, num_rows, step):
        rows = weight[first : min(num_rows, first + step)]
        panels = rows.view(len(rows) // PANEL, *split).permute(0, *back)
        rows.copy_(panels.contiguous().view(rows.shape))
