"""The allocations behind a storage: pools of layers of one shape, and the moving of rows inside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.data.quantised import dequantised, quantised, torch_dtype
from pagedkv.errors import BlockNotFound, InvalidOperation, OutOfMemory
from pagedkv.spec import KvCacheSpec

__all__ = ["LayerSide", "Pool", "as_int64", "checked_device", "require_copies", "require_slots"]

_WIDE = torch.complex128
"""The widest element that torch can move. Indexed writes cost per element, so rows are moved 16 bytes at a time."""


@dataclass(slots=True, eq=False)
class LayerSide:
    """The keys, or the values, of one layer.

    ``blocks`` is ``[num_blocks, *block]`` in the storage's layout. ``rows`` shows the same memory with one entry per
    token and the widest element that fits: ``[num_slots, width]`` (NHD) or ``[num_blocks, block_size, heads, width]``.
    ``scales`` is blocks without their last dimension, ``scale_rows`` that by token; None where nothing is quantised.
    """

    blocks: Tensor
    rows: Tensor
    token_shape: tuple[int, int]
    scales: Tensor | None
    scale_rows: Tensor | None

    @classmethod
    def over(cls, blocks: Tensor, scales: Tensor | None, is_hnd: bool) -> LayerSide:
        """Return the side that shows this memory, ``[num_blocks, *block]``."""
        nhd = blocks.transpose(1, 2) if is_hnd else blocks
        rows = _widened(blocks).transpose(1, 2) if is_hnd else _widened(blocks.flatten(0, 1).flatten(1))
        scale_rows = None
        if scales is not None:
            scale_rows = scales.transpose(1, 2) if is_hnd else scales.flatten(0, 1)
        return cls(blocks, rows, (nhd.shape[2], nhd.shape[3]), scales, scale_rows)

    def stored(self, name: str, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``[n, heads, head_dim]`` as :meth:`write` takes it; `name` is for an error."""
        if self.scales is None:
            return tokens.to(self.blocks.dtype).contiguous(), None
        return quantised(name, tokens, self.blocks.dtype)

    def write(self, tokens: Tensor, scales: Tensor | None, places: tuple[Tensor, ...]) -> None:
        """Scatter ``[n, heads, head_dim]``, contiguous and of our dtype, and the scales."""
        if self.scale_rows is not None and scales is not None:
            self.scale_rows.index_put_(places, scales)
        rows = tokens if len(places) == 2 else tokens.flatten(1)
        if rows.dtype != self.rows.dtype:
            rows = _aligned(rows).view(self.rows.dtype)
        self.rows.index_put_(places, rows)

    def read(self, slots: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        """Gather ``[n, heads, head_dim]``, in float32 where they are quantised."""
        return dequantised(self._read(slots, places), None if self.scale_rows is None else self.scale_rows[places])

    def _read(self, slots: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        if not len(slots):
            return self.blocks.new_empty(0, *self.token_shape)
        if len(places) == 2:
            return self.rows[places].view(self.blocks.dtype)
        return self.rows.index_select(0, slots).view(self.blocks.dtype).view(len(slots), *self.token_shape)


@dataclass(slots=True, eq=False)
class Pool:
    """One allocation for layers of one shape: ``tensors`` are ``[layers, 2, num_blocks, *block]``, K and V together.

    Where K and V differ in size they are two tensors ``[layers, 1, num_blocks, *block]``. ``scales`` holds one tensor
    ``[layers, 2, num_blocks, *block without its last dimension]`` where they are quantised, else none.
    """

    tensors: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    wide: tuple[Tensor, ...]

    @classmethod
    def allocate(cls, spec: KvCacheSpec, device: torch.device) -> Pool:
        """Allocate all layers of a spec whose layers are of one shape."""
        shapes = [spec.block_shape(0), spec.block_shape(0, values=True)]
        parts = [(2, shapes[0])] if shapes[0] == shapes[1] else [(1, shape) for shape in shapes]
        dtype = torch_dtype(spec.dtype)
        scale_shape = (spec.num_layers, 2, spec.num_blocks, *shapes[0][:2])
        try:
            # empty, not zeros: the system commits memory as it is written.
            tensors = tuple(
                torch.empty((spec.num_layers, sides, spec.num_blocks, *shape), dtype=dtype, device=device)
                for sides, shape in parts
            )
            scales = (torch.empty(scale_shape, device=device),) if spec.is_quantised else ()
        except (RuntimeError, MemoryError) as error:
            hint = f"{spec.total_memory_bytes:,} bytes cannot be allocated on {device}"
            raise OutOfMemory(spec.num_blocks, 0, hint) from error
        return cls(tensors, scales, tuple(_widened(tensor.flatten(3)) for tensor in (*tensors, *scales)))

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All tensors, ``[layers, sides, num_blocks, …]``."""
        return self.tensors + self.scales

    def copy_blocks(self, sources: Tensor, destinations: Tensor) -> None:
        """Copy blocks over all layers; every source is read before anything is written."""
        for wide in self.wide:
            wide.index_copy_(2, destinations, wide.index_select(2, sources))

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, ``[num_blocks, *block]`` each."""
        return self.tensors[0][layer, 0], self.tensors[-1][layer, -1]

    def layer(self, layer: int, is_hnd: bool) -> tuple[LayerSide, LayerSide]:
        """Return keys and values of a layer with their scales."""
        keys, values = self.sides(layer)
        key_scales, value_scales = self.scales[0][layer] if self.scales else (None, None)
        return LayerSide.over(keys, key_scales, is_hnd), LayerSide.over(values, value_scales, is_hnd)

    def block(self, block_id: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a block, ``[layers, *block]`` each: views, or in float32 where quantised."""
        scales = self.scales[0][:, :, block_id].unbind(1) if self.scales else (None, None)
        keys, values = self.tensors[0][:, 0, block_id], self.tensors[-1][:, -1, block_id]
        return dequantised(keys, scales[0]), dequantised(values, scales[1])


def _widened(tensor: Tensor) -> Tensor:
    """Return the tensor with the widest element that its rows divide into."""
    if tensor.shape[-1] * tensor.element_size() % _WIDE.itemsize:
        return tensor.view(torch.int8) if tensor.itemsize == 1 else tensor
    return tensor.view(_WIDE)


def _aligned(rows: Tensor) -> Tensor:
    """Return rows whose memory may be read in the widest element."""
    offset = rows.storage_offset() * rows.element_size()
    return rows.clone() if offset % _WIDE.itemsize or rows.data_ptr() % _WIDE.itemsize else rows


def checked_device(device: Any) -> torch.device:
    """Return the device with its index, or refuse one that torch cannot use here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidOperation(
            f"device: expected a device that torch can use here, got {device!r} ({reason})"
        ) from error


def as_int64(name: str, numbers: Any) -> Tensor:
    """Return integers as an int64 tensor, without a copy where that is possible."""
    if isinstance(numbers, np.ndarray):
        if numbers.dtype.kind not in "iu":
            raise InvalidOperation(f"{name}: expected integers, got {numbers.dtype}")
        if numbers.dtype != np.int64 or not (numbers.flags.c_contiguous and numbers.flags.writeable):
            # torch can share neither negative strides nor memory that must not be written.
            numbers = numbers.astype(np.int64, order="C")
        return torch.from_numpy(numbers)
    if not isinstance(numbers, Tensor):
        raise InvalidOperation(f"{name}: expected an integer array or tensor, got {type(numbers).__name__}")
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise InvalidOperation(f"{name}: expected integers, got {numbers.dtype}")
    return numbers.to(torch.int64)


def require_slots(slots: np.ndarray[Any, Any], num_slots: int) -> None:
    """Refuse int64 slots outside of the pool."""
    # As unsigned numbers negative slots are huge: one pass finds both kinds.
    numbers = slots.view(np.uint64)
    if len(numbers) and int(numbers.max()) >= num_slots:
        wrong = int(slots[numbers >= num_slots][0])
        raise InvalidOperation(f"slot_mapping: expected slots in 0 … {num_slots - 1}, got {wrong}")


def require_copies(pairs: np.ndarray[Any, Any], num_blocks: int) -> None:
    """Refuse pairs (source, destination) of blocks outside of the pool, or with one destination twice."""
    outside = (pairs < 0) | (pairs >= num_blocks)
    if outside.any():
        raise BlockNotFound(int(pairs[outside][0]))
    destinations, counts = np.unique(pairs[:, 1], return_counts=True)
    if len(destinations) != len(pairs):
        raise InvalidOperation(f"copies: expected distinct destinations, got B{destinations[counts > 1][0]} twice")
