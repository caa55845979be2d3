"""The pool of a model: a PagedKvCache that learns the shapes of its layers as the model runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagedkv.cache import PagedKvCache
from pagedkv.control.plan import BatchPlan
from pagedkv.data.storage import KvStorage


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


def by_token(states: Tensor) -> Tensor:
    """Turn ``[batch, heads, tokens, dim]`` into ``[batch * tokens, heads, dim]``."""
    return states.transpose(1, 2).flatten(0, 1)


def visible_slots(plan: BatchPlan, block_size: int, chosen: slice = slice(None)) -> npt.NDArray[np.int64]:
    """Return the slots of all tokens that the (chosen) sequences of a plan see, one sequence after the other."""
    lengths, holes = plan.seq_lens[chosen].astype(np.int64), plan.holes[chosen].astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places += np.where(places >= holes[rows, 0], (holes[:, 1] - holes[:, 0])[rows], 0)
    blocks = plan.block_tables[chosen][rows, places // block_size].astype(np.int64)
    slots: npt.NDArray[np.int64] = blocks * block_size + places % block_size
    return slots
