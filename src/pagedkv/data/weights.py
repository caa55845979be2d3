"""Weights in 8 bits: the matrices of a decoder as int8, with a float32 scale for each row.

Symmetric and without a zero point: ``scale = amax / 127`` over the inputs of one output, ``number = round(weight /
scale)``, half to even. A product is that of the numbers, multiplied by the scale once all is summed up. Vectors (norms,
biases, sinks) and learned positions stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pagedkv.data.decoder import Attention, Decoder, Experts, Layer, Linear, Mlp
from pagedkv.data.huge_pages import HugePages
from pagedkv.data.quantised import GREATEST
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
        layers.append(matrices.part(layer))
        del layer
        matrices.leave(let_go)
    embedding, row_scale = matrices.matrix(decoder.embedding)
    head = matrices.linear(decoder.head)
    matrices.leave(let_go)
    return replace(decoder, embedding=embedding, embedding_row_scale=row_scale, layers=layers, head=head)


class _Matrices:
    """What was quantised, so that a matrix in several places stays one."""

    def __init__(self) -> None:
        self._found: dict[Any, Quantised] = {}
        self._done: list[Tensor] = []
        self._room = Room()

    def matrix(self, weight: Tensor) -> Quantised:
        key = weight.data_ptr(), weight.shape, weight.stride()
        if key not in self._found:
            self._found[key] = quantised_rows(weight, self._room)
        self._done.append(weight)
        return self._found[key]

    def linear(self, linear: Linear) -> Linear:
        weight, scale = self.matrix(linear.weight)
        return Linear(weight, linear.bias, scale)

    def part(self, part: Any) -> Any:
        """Return a part of a layer with all of its matrices in int8."""
        if isinstance(part, Linear):
            return self.linear(part)
        if isinstance(part, list):
            return [self.part(each) for each in part]
        if isinstance(part, (Layer, Attention, Mlp, Experts)):
            return replace(part, **{one.name: self.part(getattr(part, one.name)) for one in fields(part)})
        return part

    def leave(self, let_go: LetGo | None) -> None:
        """Hand on what is done with, and hold it no longer."""
        done, self._done = self._done, []
        if let_go is not None:
            let_go(done)
