"""The compiled way to run a model: its description, and one compiled call a step that reads its weights in place."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pagedkv.control.plan import BatchPlan
from pagedkv.data.forward import Forward
from pagedkv.errors import InvalidOperation
from pagedkv.hf.description import describe
from pagedkv.hf.pool import LayerTable, ModelKvCache

Ids = npt.NDArray[np.int64]


class CompiledModel:
    """A model over a pool, run by :class:`pagedkv.data.forward.Forward`.

    Parameters
    ----------
    model : PreTrainedModel
    cache : ModelKvCache
    table : LayerTable
        Of the pool; every layer gets the place of its number.

    Raises
    ------
    InvalidOperation
        If the model has no description, or nothing is compiled (``NUMBA_DISABLE_JIT=1``).
    """

    def __init__(self, model: Any, cache: ModelKvCache, table: LayerTable) -> None:
        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            raise InvalidOperation("Numba does not compile here")
        self._model, self._cache, self._table = model, cache, table
        self._decoder = describe(model)
        self._forward: Forward | None = None

    def reload(self) -> None:
        """Look at the model anew: its weights may be others."""
        self._decoder, self._forward = describe(self._model), None

    def forward(self, plan: BatchPlan, ids: Ids, positions: Ids, rows: Ids) -> Tensor:
        """Write K and V of the query tokens of a plan and return the logits of some of them, float32."""
        if self._forward is None:
            self._forward = self._made()
        batch, slots = self._cache.checked(plan)
        return self._forward(batch, slots, ids, positions, rows)

    def _made(self) -> Forward:
        for number, layer in enumerate(self._decoder.layers):
            if number not in self._table.numbers:
                sizes = layer.attention.head_dim, layer.attention.v_head_dim
                kept = (
                    torch.empty(1, layer.attention.num_kv_heads, 0, size, dtype=self._model.dtype) for size in sizes
                )
                self._table.place(number, *kept)
        storage = self._cache.storage
        if storage.spec.is_quantised:
            raise InvalidOperation("keys and values are quantised")
        return Forward(self._decoder, storage)
