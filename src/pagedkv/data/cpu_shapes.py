"""What the CPU kernels are told: sizes, distances, rules; and how long their rows are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.data.simd import LANES, ROWS
from pagedkv.jit import compiled

__all__ = [
    "Array",
    "Floats",
    "Ints",
    "NOTHING",
    "Rules",
    "Shape",
    "Strides",
    "padded",
    "partial_size",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
NOTHING = np.float32(-np.inf)


class Shape(NamedTuple):
    """Sizes of the pool and the heads."""

    block_size: int
    num_kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    item_bytes: int


class Strides(NamedTuple):
    """Distances in elements."""

    query: int
    query_head: int
    key_block: int
    key: int
    key_head: int
    value_block: int
    value: int
    value_head: int
    out: int
    out_head: int
    scale_block: int
    scale: int
    scale_head: int


class Rules(NamedTuple):
    """What happens to a score, and which keys a query sees."""

    scale: np.float32
    cap: np.float32
    causal: bool
    window: int


@compiled
def padded(dim: int) -> int:
    """Return a row's length in whole lanes."""
    return (dim + LANES - 1) // LANES * LANES


@compiled
def partial_size(v_head_dim: int) -> int:
    """Return the floats that four rows leave behind: maximum and sum by lane, then the weighted values."""
    return 2 * LANES + ROWS * padded(v_head_dim)
