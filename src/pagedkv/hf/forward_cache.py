"""The caches that a ModelRunner hands to a model for one forward pass: over a ragged batch, or over one sequence.

transformers knows one way from a model to keys and values: ``Cache.update()``. Behind it stands a writer, which knows
the plan of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pagedkv.control.plan import BatchPlan
from pagedkv.data.storage import SlotIndex
from pagedkv.errors import InvalidOperation
from pagedkv.hf.compat import Cache, CacheLayerMixin
from pagedkv.hf.direct import PagedStates, Plan
from pagedkv.hf.pages import LayerTable, ModelKvCache, by_token, visible_slots

__all__ = ["GatherWriter", "RaggedWriter", "forward_cache"]

Slots = npt.NDArray[np.int64]


class Writer(Protocol):
    """Takes the new K and V of each layer of one forward pass."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V ``[1, heads, tokens, dim]`` and return what attention is to get."""

    def length(self, layer: int) -> int:
        """Tell how many tokens the model believes the layer to hold."""


class ForwardLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One attention layer; it holds nothing itself."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, writer: Writer, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writer, self._layer = writer, number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory comes with the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens."""
        return self._writer.write(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        """Return how many tokens the layer holds."""
        return self._writer.length(self._layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `query_length` new tokens will see, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: only the pool is a limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Leave it to the block manager."""


def forward_cache(stock: list[Any], paged: set[int], writer: Writer) -> Cache:
    """Return a cache whose paged layers go to `writer` and whose other layers are the stock ones."""
    layers = [ForwardLayer(writer, number) if number in paged else layer for number, layer in enumerate(stock)]
    return Cache(layers=layers)


class RaggedWriter:
    """All sequences of a plan in one row: attention gets handles and reads the blocks by the plan.

    The model is made to believe that the row is one prompt with nothing before it; who sees whom is in the plan, and
    positions are told. The row may be longer than the plan: what is behind is padding.

    Parameters
    ----------
    pool : ModelKvCache
    table : LayerTable
    backend : str
        Of :func:`pagedkv.paged_attention`.
    """

    def __init__(self, pool: ModelKvCache, table: LayerTable, backend: str) -> None:
        self._pool, self._table, self._backend = pool, table, backend
        self.plan: Plan | None = None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V; the handles stand for everything that the sequences see."""
        plan = self.plan
        if plan is None:
            raise InvalidOperation("past_key_values: expected a forward pass of its ModelRunner")
        number = self._table.place(layer, keys, values)
        total = plan.total_tokens
        self._pool.write(number, by_token(keys)[:total], by_token(values)[:total], plan)
        where = (self._pool, number, plan, keys.shape[2], self._backend)
        return PagedStates.of(keys, *where), PagedStates.of(values, *where)

    def length(self, layer: int) -> int:
        """Tell the model that there is nothing yet."""
        return 0


class GatherWriter:
    """One sequence of a plan after the other: attention gets all K and V of the sequence as dense tensors."""

    def __init__(self, pool: ModelKvCache, table: LayerTable) -> None:
        self._pool, self._table = pool, table
        self._past = 0
        self._new: Slots = np.empty(0, np.int64)
        self._all: Slots = np.empty(0, np.int64)
        self._written: set[int] = set()
        self._index: tuple[SlotIndex, SlotIndex] | None = None

    def sequences(self, plan: BatchPlan) -> Iterator[int]:
        """Turn to the sequences of a plan, one after the other, and yield how many tokens each has behind it."""
        every = visible_slots(plan, self._pool.block_size)
        first = 0
        for i, length in enumerate(plan.seq_lens.tolist()):
            self._new = plan.slot_mapping[plan.cu_seqlens_q[i] : plan.cu_seqlens_q[i + 1]]
            self._all = every[first : first + length]
            self._past = length - len(self._new)
            self._written.clear()
            self._index = None
            first += length
            yield self._past

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store K and V and gather what the sequence sees."""
        number = self._table.place(layer, keys, values)
        storage = self._pool.storage
        if self._index is None:
            self._index = storage.slot_index(self._new), storage.slot_index(self._all)
        storage.write(number, by_token(keys), by_token(values), self._index[0])
        self._written.add(layer)
        if not self._past and keys.dtype == storage.dtype:
            return keys, values
        all_keys, all_values = storage.gather(number, self._index[1])
        return all_keys.transpose(0, 1)[None].to(keys), all_values.transpose(0, 1)[None].to(values)

    def length(self, layer: int) -> int:
        """Tell how many tokens of the sequence the layer holds by now."""
        return len(self._all) if layer in self._written else self._past
