"""KvStorage: the memory in which keys and values live, and every way of moving them.

Layers of one shape live in one allocation, so that a block is one view over all of them and copying blocks is one
gather and one scatter. Layers of their own shape have an allocation each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pagedkv.data.gpu_device import (
    checked_device,
    is_debugging,
    require_slots,
    shape_for,
    tensor_for,
    uses_triton,
)
from pagedkv.data.gpu_plan import DevicePlan, require_plan_of
from pagedkv.data.quantised import dequantised, quantised, torch_dtype
from pagedkv.errors import BlockNotFound, InvalidOperation, OutOfMemory, bad_argument
from pagedkv.spec import KvCacheSpec, LayerSpec
from pagedkv.typing import Device, IntArray, MemoryBackend
from pagedkv.validate import require_int

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

    def layer(self, layer: int, is_hnd: bool) -> tuple[LayerSide, LayerSide]:
        """Return keys and values of a layer with their scales."""
        keys, values = self.tensors[0][layer, 0], self.tensors[-1][layer, -1]
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


@dataclass(slots=True, eq=False)
class SlotIndex:
    """Slots that one storage has checked and brought to its device, to be used for all its layers.

    Made by :meth:`KvStorage.slot_index`. It may share memory with the array that it was made from.
    """

    owner: KvStorage
    slots: Tensor
    places: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.slots)


class KvStorage:
    """The keys and values of a pool of blocks.

    Memory comes uninitialised: what nobody wrote may hold anything, NaN included, and the system commits it only as it
    is written. Readers must therefore read slots that were written and no others; every reader in pagedkv does.

    A storage knows nothing about owners: it is handed slots (``block_id * block_size + offset``) and block ids. It
    takes no locks; threads may write different slots at once.

    Parameters
    ----------
    spec : KvCacheSpec
        Shapes, dtype and layout. With no layers the storage starts empty and grows by :meth:`add_layer`.
    device : str or torch.device
        Where the memory lives.
    backend : {"auto", "torch", "triton"}
        What moves the memory: ``"auto"`` takes Triton's kernels on CUDA devices where Triton is installed, torch's
        everywhere else.

    Raises
    ------
    InvalidOperation
        The spec is none, torch has no such device here, or the backend cannot use it.
    MissingExtra
        The backend is ``"triton"`` and it is not installed.
    OutOfMemory
        The device cannot give that much memory.

    Attributes
    ----------
    num_writes : int
        Grows with all that is written here, so that who computed with what was there can tell whether it still is.
    """

    def __init__(self, spec: KvCacheSpec, device: Device = "cpu", *, backend: MemoryBackend = "auto") -> None:
        if not isinstance(spec, KvCacheSpec):
            hint = "write KvStorage(KvCacheSpec(num_blocks, …))"
            raise bad_argument("spec", "a KvCacheSpec", f"{type(spec).__name__}", hint)
        self._base = replace(spec, num_layers=0, layers=())
        self._device = checked_device(device)
        self._uses_triton = uses_triton(backend, self._device)
        self._dtype = torch_dtype(spec.dtype)
        self._is_hnd = spec.layout == "HND"
        self._num_slots = spec.num_blocks * spec.block_size
        self.num_writes = 0
        self._pools: list[Pool] = []
        self._layers: list[tuple[LayerSide, LayerSide]] = []
        self._shapes: tuple[LayerSpec, ...] = ()
        self._spec = self._base
        runs = [spec.layer_specs] if spec.layers is None else [(layer,) for layer in spec.layers]
        for run in runs:
            if run:
                self._add(run)

    @property
    def spec(self) -> KvCacheSpec:
        """The present shape; it grows with :meth:`add_layer`."""
        return self._spec

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the memory lives."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The type of one element."""
        return self._dtype

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors; the system may have committed fewer."""
        return sum(tensor.nbytes for pool in self._pools for tensor in pool.memory)

    def __repr__(self) -> str:
        return f"KvStorage({self.spec}, device={str(self._device)!r})"

    def add_layer(self, layer: LayerSpec) -> int:
        """Add a layer of this shape behind the last one and return its index.

        Raises
        ------
        InvalidOperation
            The argument is no LayerSpec.
        OutOfMemory
            The device cannot give that much memory.
        """
        if not isinstance(layer, LayerSpec):
            raise bad_argument("layer", "a LayerSpec", f"{type(layer).__name__}")
        self._add((layer,))
        return self.num_layers - 1

    @torch.inference_mode(False)  # what is born in inference mode could not be written outside of it
    def _add(self, run: tuple[LayerSpec, ...]) -> None:
        pool = Pool.allocate(replace(self._base, layers=run, num_layers=len(run)), self._device)
        self._pools.append(pool)
        self._layers.extend(pool.layer(i, self._is_hnd) for i in range(len(run)))
        self._shapes += run
        self._spec = replace(self._base, num_layers=len(self._shapes), layers=self._shapes)

    def _layer(self, layer: int) -> tuple[LayerSide, LayerSide]:
        if type(layer) is int and 0 <= layer < len(self._layers):
            return self._layers[layer]
        if not self._layers:
            raise InvalidOperation(f"layer: the storage has no layers yet, got {layer!r}")
        return self._layers[require_int("layer", layer, 0, len(self._layers) - 1)]

    # --- views ---------------------------------------------------------------------------------------------------

    def keys(self, layer: int) -> Tensor:
        """Return the keys of a layer, a live view; of a quantised storage the numbers without their scales.

        Returns
        -------
        Tensor
            ``[num_blocks, block_size, num_kv_heads, head_dim]``; in the HND layout the middle two are swapped.

        Raises
        ------
        InvalidOperation
            There is no such layer.
        """
        return self._layer(layer)[0].blocks

    def values(self, layer: int) -> Tensor:
        """Return the values of a layer, a live view like :meth:`keys` with ``v_head_dim`` at the end."""
        return self._layer(layer)[1].blocks

    def key_scales(self, layer: int) -> Tensor | None:
        """Return what a layer's quantised keys have to be multiplied by, a live view, or None.

        Returns
        -------
        float32 Tensor or None
            ``[num_blocks, block_size, num_kv_heads]``; in the HND layout the last two are swapped.
        """
        return self._layer(layer)[0].scales

    def value_scales(self, layer: int) -> Tensor | None:
        """Return what a layer's quantised values have to be multiplied by, like :meth:`key_scales`."""
        return self._layer(layer)[1].scales

    def layer_tensor(self, layer: int) -> Tensor:
        """Return keys and values of a layer as one live view, ``[2, num_blocks, …]`` in the storage's layout.

        Of a quantised storage they are the numbers without their scales.

        Raises
        ------
        InvalidOperation
            There is no such layer, or its keys and values differ in size and so are two tensors.
        """
        self._layer(layer)
        place = int(layer)
        for pool in self._pools:
            if place < len(pool.tensors[0]):
                break
            place -= len(pool.tensors[0])
        if len(pool.tensors) == 2:
            raise InvalidOperation(
                f"layer {layer}: keys and values differ in size and are two tensors: keys(), values()"
            )
        return pool.tensors[0][place]

    def block(self, block_id: int) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
        """Return :meth:`block_keys` and :meth:`block_values` of a block."""
        return self.block_keys(block_id), self.block_values(block_id)

    def block_keys(self, block_id: int) -> Tensor | list[Tensor]:
        """Return the keys of a block in all layers, live views in NHD order whatever the layout.

        Of a quantised storage they are copies, in float32 and multiplied by their scales: what is written to them goes
        nowhere.

        Returns
        -------
        Tensor or list of Tensor
            ``[num_layers, block_size, num_kv_heads, head_dim]``; where layers differ or were added one by one, a list
            with one ``[block_size, num_kv_heads, head_dim]`` per layer.

        Raises
        ------
        BlockNotFound
            The pool has no such block.
        """
        return self._block_side(block_id, 0)

    def block_values(self, block_id: int) -> Tensor | list[Tensor]:
        """Return the values of a block in all layers, like :meth:`block_keys` with ``v_head_dim`` at the end."""
        return self._block_side(block_id, 1)

    def _block_side(self, block_id: int, side: int) -> Tensor | list[Tensor]:
        block = self._checked_block(block_id)
        views = [pool.block(block)[side] for pool in self._pools]
        if self._is_hnd:
            views = [view.transpose(1, 2) for view in views]
        return views[0] if len(views) == 1 else [layer for view in views for layer in view]

    def _checked_block(self, block_id: int) -> int:
        block = require_int("block_id", block_id, -(2**63), 2**63)
        if not 0 <= block < self._base.num_blocks:
            raise BlockNotFound(block)
        return block

    # --- moving tokens -------------------------------------------------------------------------------------------

    def slot_index(self, slot_mapping: IntArray | SlotIndex) -> SlotIndex:
        """Check slots and bring them to the device once, to write or read many layers with them.

        Parameters
        ----------
        slot_mapping : integer array or tensor [n]
            ``block_id * block_size + offset`` of each token. Slots that are already on an accelerator are checked with
            ``PAGEDKV_DEBUG=1`` only: that makes the host wait for the device.

        Raises
        ------
        InvalidOperation
            Not one-dimensional integers, or a slot outside of the pool.
        """
        if isinstance(slot_mapping, SlotIndex):
            if slot_mapping.owner is not self:
                raise bad_argument("slot_mapping", "slots of this storage", "a SlotIndex of another one")
            return slot_mapping
        slots = as_int64("slot_mapping", slot_mapping)
        if slots.dim() != 1:
            raise bad_argument("slot_mapping", "shape [n]", f"{list(slots.shape)}")
        if slots.device.type == "cpu" or is_debugging():
            require_slots(slots.cpu().numpy(), self._num_slots)
        if slots.device != self._device:
            slots = slots.to(self._device, non_blocking=True)
        if not self._is_hnd:
            return SlotIndex(self, slots, (slots,))
        size = self._base.block_size
        return SlotIndex(self, slots, (slots.div(size, rounding_mode="floor"), slots.remainder(size)))

    def slots_of(self, plan: DevicePlan) -> SlotIndex:
        """Return the slots in the buffers of a plan; places behind its tokens are written nowhere.

        Raises
        ------
        InvalidOperation
            Not a DevicePlan for this storage, or torch moves the memory: it would write such tokens somewhere.
        """
        require_plan_of(plan, self._base.num_blocks, self._base.block_size, self._device)
        if not self._uses_triton:
            raise bad_argument("plan", "a BatchPlan, as this storage has no Triton kernels")
        return SlotIndex(self, plan.slot_mapping, ())

    def write(self, layer: int, keys: Tensor, values: Tensor, slot_mapping: IntArray | SlotIndex) -> None:
        """Write the keys and values of tokens into their slots.

        Parameters
        ----------
        layer : int
        keys : Tensor [total_tokens, num_kv_heads, head_dim]
            Any floating dtype and any strides; cast to the storage's dtype, or quantised with a scale for each head of
            each token; gradients are not followed.
        values : Tensor [total_tokens, num_kv_heads, v_head_dim]
        slot_mapping : integer array or tensor [total_tokens], or SlotIndex
            Where each token goes. Two tokens for one slot leave one of them there, undefined which.

        Raises
        ------
        InvalidOperation
            No such layer, a shape, dtype or device that does not fit, a slot outside of the pool, NaN or infinity where
            they are quantised (on a CPU). Nothing is written.
        """
        key_side, value_side = self._layer(layer)
        self.num_writes += 1
        index = self.slot_index(slot_mapping)
        new_keys = self._checked_tokens("keys", keys, len(index), key_side.token_shape)
        new_values = self._checked_tokens("values", values, len(index), value_side.token_shape)
        if self._uses_triton:
            scales = self._shown(key_side.scales), self._shown(value_side.scales)
            sides = self._shown(key_side.blocks), self._shown(value_side.blocks)
            _gpu_kernels().write_tokens(*sides, new_keys, new_values, index.slots, *scales)
            return
        stored_keys, stored_values = key_side.stored("keys", new_keys), value_side.stored("values", new_values)
        key_side.write(*stored_keys, index.places)
        value_side.write(*stored_values, index.places)

    def write_keys(self, layer: int, keys: Tensor, slot_mapping: IntArray | SlotIndex) -> None:
        """Write keys over those that are there and leave the values, like :meth:`write`."""
        self.num_writes += 1
        side, index = self._layer(layer)[0], self.slot_index(slot_mapping)
        side.write(*side.stored("keys", self._checked_tokens("keys", keys, len(index), side.token_shape)), index.places)

    def _checked_tokens(self, name: str, tokens: Tensor, count: int, token_shape: tuple[int, int]) -> Tensor:
        """Return the tokens without a gradient, of strides and a dtype that Triton's kernel takes if it is used."""
        if not isinstance(tokens, Tensor):
            raise bad_argument(name, "a torch.Tensor", f"{type(tokens).__name__}", tensor_for(tokens))
        if tokens.shape != (count, *token_shape):
            hint = shape_for(tuple(tokens.shape), (count, *token_shape))
            raise bad_argument(name, f"shape {[count, *token_shape]}", f"{list(tokens.shape)}", hint)
        if tokens.device != self._device:
            hint = f".to('{self._device}')"
            raise bad_argument(name, f"a tensor on {self._device}", f"one on {tokens.device}", hint)
        if not tokens.is_floating_point():
            raise bad_argument(name, "a floating dtype", f"{tokens.dtype}", f".to({self._dtype})")
        tokens = tokens.detach() if tokens.requires_grad else tokens
        if not self._uses_triton:
            return tokens
        if tokens.dtype == torch.float64:
            tokens = tokens.to(torch.float32 if self._base.is_quantised else self._dtype)
        return tokens if tokens.stride(-1) == 1 else tokens.contiguous()

    def _shown(self, memory: Tensor | None) -> Any:
        """Return the memory as ``[num_blocks, block_size, num_kv_heads, …]`` whatever the layout."""
        return memory.transpose(1, 2) if self._is_hnd and memory is not None else memory

    def gather(self, layer: int, slots: IntArray | SlotIndex) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of slots, in the order given.

        Parameters
        ----------
        layer : int
        slots : integer array or tensor [n], or SlotIndex

        Returns
        -------
        keys : Tensor [n, num_kv_heads, head_dim]
        values : Tensor [n, num_kv_heads, v_head_dim]
            Of the storage's dtype; in float32, multiplied by their scales, where they are quantised.

        Raises
        ------
        InvalidOperation
            No such layer, or a slot outside of the pool.
        """
        key_side, value_side = self._layer(layer)
        index = self.slot_index(slots if isinstance(slots, SlotIndex) else as_int64("slots", slots))
        return key_side.read(index.slots, index.places), value_side.read(index.slots, index.places)

    def copy_blocks(self, copies: IntArray) -> None:
        """Copy whole blocks over all layers, as if all at once: every source is read before any block is written.

        Parameters
        ----------
        copies : integer array or tensor [k, 2]
            Rows (source, destination). Chains and swaps are fine, two rows with one destination are not.

        Raises
        ------
        InvalidOperation
            Not integers of that shape, or a destination named twice. Nothing is copied.
        BlockNotFound
            The pool has no such block. Nothing is copied.
        """
        pairs = as_int64("copies", copies).cpu()
        if pairs.dim() != 2 or pairs.shape[1] != 2:
            raise bad_argument("copies", "shape [k, 2]", f"{list(pairs.shape)}")
        if not len(pairs):
            return
        require_copies(pairs.numpy(), self._base.num_blocks)
        self.num_writes += 1
        if self._uses_triton:
            for pool in self._pools:
                _gpu_kernels().copy_blocks(pool.memory, pairs.numpy())
            return
        pairs = pairs.to(self._device, non_blocking=True)
        for pool in self._pools:
            pool.copy_blocks(pairs[:, 0], pairs[:, 1])

    def read_blocks(self, blocks: IntArray) -> list[Tensor]:
        """Return copies of blocks, all that is stored of them, for :meth:`write_blocks`."""
        index = as_int64("blocks", blocks).to(self._device)
        return [wide.index_select(2, index) for pool in self._pools for wide in pool.wide]

    def write_blocks(self, blocks: IntArray, contents: list[Tensor]) -> None:
        """Write what :meth:`read_blocks` returned to other blocks."""
        self.num_writes += 1
        index = as_int64("blocks", blocks).to(self._device)
        for wide, rows in zip((wide for pool in self._pools for wide in pool.wide), contents, strict=True):
            wide.index_copy_(2, index, rows)


def as_int64(name: str, numbers: Any) -> Tensor:
    """Return integers as an int64 tensor, without a copy where that is possible."""
    if isinstance(numbers, np.ndarray):
        if numbers.dtype.kind not in "iu":
            raise bad_argument(name, "integers", f"{numbers.dtype}", ".astype(np.int64)")
        if numbers.dtype != np.int64 or not (numbers.flags.c_contiguous and numbers.flags.writeable):
            # torch can share neither negative strides nor memory that must not be written.
            numbers = numbers.astype(np.int64, order="C")
        return torch.from_numpy(numbers)
    if not isinstance(numbers, Tensor):
        hint = "np.array(…, np.int64) makes one"
        raise bad_argument(name, "an integer array or tensor", f"{type(numbers).__name__}", hint)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise bad_argument(name, "integers", f"{numbers.dtype}", ".to(torch.int64)")
    return numbers.to(torch.int64)


def require_copies(pairs: np.ndarray[Any, Any], num_blocks: int) -> None:
    """Refuse pairs (source, destination) of blocks outside of the pool, or with one destination twice."""
    outside = (pairs < 0) | (pairs >= num_blocks)
    if outside.any():
        raise BlockNotFound(int(pairs[outside][0]))
    destinations, counts = np.unique(pairs[:, 1], return_counts=True)
    if len(destinations) != len(pairs):
        raise bad_argument("copies", "distinct destinations", f"B{destinations[counts > 1][0]} twice")


def _gpu_kernels() -> Any:
    """Return the module that needs Triton."""
    from pagedkv.data import gpu_kernels

    return gpu_kernels
