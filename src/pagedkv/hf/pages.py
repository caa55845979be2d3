"""Pages: what the layers of a PagedCache share, and the forward pass that writes into it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.plan import BatchPlan
from pagedkv.data.storage import KvStorage, SlotIndex
from pagedkv.errors import InvalidOperation, SequenceNotFound
from pagedkv.hf.batch import SequenceBatch

__all__ = ["LayerTable", "ModelKvCache", "Pages", "Step", "by_token", "visible_slots"]


class ModelKvCache(PagedKvCache):
    """A PagedKvCache that takes its dtype and device from the first keys it sees."""

    def settle(self, dtype: Any, device: Any) -> None:
        """Fix dtype and device of the storage while it has no layers."""
        self._storage = KvStorage(replace(self._storage.spec, dtype=dtype), device)

    def are_private(self, block_ids: npt.NDArray[np.int64]) -> bool:
        """Tell whether these blocks are held once, not pinned and not findable, so that their keys may change."""
        records = self._state.blocks[block_ids]
        return bool(((records["ref_count"] == 1) & (records["pins"] == 0) & (records["indexed"] == 0)).all())


class LayerTable:
    """Which layer of a model is which layer of its pool: each gets its place, and its shape, with its first keys.

    Parameters
    ----------
    pool : ModelKvCache
    dtype, device : optional
        Of the storage; those of the first keys by default.
    """

    def __init__(self, pool: ModelKvCache, dtype: Any = None, device: Any = None) -> None:
        self._pool = pool
        self._dtype, self._device = dtype, device
        self.numbers: dict[int, int] = {}
        """layer of the model: layer of the pool, for layers that were written"""

    def place(self, layer: int, keys: Tensor, values: Tensor) -> int:
        """Return the place of a layer, made for K and V ``[batch, heads, tokens, dim]`` where it has none."""
        number = self.numbers.get(layer)
        if number is None:
            if not self.numbers:
                self._pool.settle(self._dtype or keys.dtype, self._device or keys.device)
            number = self._pool.add_layer(keys.shape[1], keys.shape[3], values.shape[3])
            self.numbers[layer] = number
        return number

    def follow(self, other: LayerTable) -> None:
        """Make the places, of the same shapes, that `other` has."""
        spec = other._pool.spec
        self._pool.settle(self._dtype or spec.dtype, self._device or other._pool.storage.device)
        for shape in spec.layer_specs:
            self._pool.add_layer(shape.num_kv_heads, shape.head_dim, shape.v_head_dim)
        self.numbers = dict(other.numbers)


@dataclass(slots=True)
class Step:
    """One forward pass: its tokens have slots, and layer after layer writes into them."""

    plan: BatchPlan
    past: int
    written: set[int] = field(default_factory=set)
    slots: SlotIndex | None = None  # of all tokens of all rows, made when a layer first gathers


class Pages:
    """What the layers of one cache share: the pool, the sequences and the forward pass that is under way."""

    def __init__(self, pool: ModelKvCache, cache_salt: str, expected: set[int], dtype: Any, device: Any) -> None:
        self.pool = pool
        self.batch = SequenceBatch(pool, cache_salt)
        self._step: Step | None = None
        self._expected = expected  # layers that a forward pass should write
        self._table = LayerTable(pool, dtype, device)

    def number(self, layer: int) -> int:
        """Return the number that a written layer has in the pool."""
        return self._table.numbers[layer]

    def length(self, layer: int) -> int:
        """Tokens that a layer holds: while a forward pass is under way, not all hold the same."""
        step = self._step
        if step is not None and layer in self._table.numbers and layer not in step.written:
            return step.past
        return self.batch.length

    def write(self, layer: int, keys: Tensor, values: Tensor) -> Step:
        """Store K and V ``[batch, heads, tokens, dim]``; the first layer of a forward pass makes the room."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise InvalidOperation("keys: a paged cache passes no gradients on; run the model under torch.no_grad()")
        step = self._step
        if step is None or layer in step.written:
            self.finish()
            past = self.batch.length
            step = self._step = Step(self.batch.grow(keys.shape[0], keys.shape[2]), past)
        if step.past and layer not in self._table.numbers:
            raise InvalidOperation(f"layer {layer}: expected K and V from the first token on, {step.past} are missing")
        number = self._table.place(layer, keys, values)
        self.pool.write(number, by_token(keys), by_token(values), step.plan)
        step.written.add(layer)
        return step

    def gather(self, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        """Return K and V of all tokens, ``[batch, heads, tokens, dim]``."""
        if step.slots is None:
            step.slots = self.pool.storage.slot_index(visible_slots(step.plan, self.pool.block_size))
        rows = step.plan.num_sequences
        keys, values = self.pool.storage.gather(self.number(layer), step.slots)
        return _by_row(keys, rows), _by_row(values, rows)

    def finish(self) -> None:
        """End the forward pass: what it wrote becomes findable, or is taken back if it did not come to its end."""
        step, self._step = self._step, None
        if step is None:
            return
        if step.written < self._table.numbers.keys():
            self.batch.truncate(step.past)
        elif self._expected <= step.written:
            self.pool.commit(step.plan)
        else:
            self.batch.forget()

    def release(self) -> None:
        """Free the sequences."""
        with contextlib.suppress(SequenceNotFound):  # the caller may have freed or evicted one
            self.finish()
        self.batch.release()


def by_token(states: Tensor) -> Tensor:
    """Turn ``[batch, heads, tokens, dim]`` into ``[batch * tokens, heads, dim]``."""
    return states.transpose(1, 2).flatten(0, 1)


def _by_row(states: Tensor, rows: int) -> Tensor:
    """Turn ``[batch * tokens, heads, dim]`` into ``[batch, heads, tokens, dim]``."""
    return states.view(rows, -1, *states.shape[1:]).transpose(1, 2)


def visible_slots(plan: BatchPlan, block_size: int, chosen: slice = slice(None)) -> npt.NDArray[np.int64]:
    """Return the slots of all tokens that the (chosen) sequences of a plan see, one sequence after the other."""
    lengths, holes = plan.seq_lens[chosen].astype(np.int64), plan.holes[chosen].astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places += np.where(places >= holes[rows, 0], (holes[:, 1] - holes[:, 0])[rows], 0)
    blocks = plan.block_tables[chosen][rows, places // block_size].astype(np.int64)
    slots: npt.NDArray[np.int64] = blocks * block_size + places % block_size
    return slots
