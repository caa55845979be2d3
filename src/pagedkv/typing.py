"""Types of what callers pass: token ids, lengths, names, dtypes. For type checkers; at run time everything is checked.

A type checker refuses ``strategy="lfru"``, floats or text for token ids, and one number where a batch is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, SupportsIndex, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class IntArray(Protocol):
    """An array of integers: of NumPy, or what can be had as one, a tensor for instance."""

    def __array__(self) -> npt.NDArray[np.integer]:
        """Return the integers."""
        ...


Ints: TypeAlias = Sequence[SupportsIndex] | IntArray
"""Whole numbers, one after the other: token ids, ids of sequences, counts, slots, blocks."""

TokenIds: TypeAlias = Ints

IntRows: TypeAlias = Sequence[Ints] | IntArray
"""Whole numbers in rows, of one length or of several: block tables, token ids of a batch."""

Tokens: TypeAlias = "int | np.integer | Ints"
"""A number of tokens, or their ids."""

DtypeName: TypeAlias = Literal["float16", "bfloat16", "float32", "int8", "fp8"]

Dtype: TypeAlias = "DtypeName | torch.dtype"
"""Of stored keys and values; the last two names are quantised."""

BlockContent: TypeAlias = "torch.Tensor | list[torch.Tensor]"
"""Keys, or values, of one block: ``[layers, *block]``, or one a layer where their shapes differ."""

Device: TypeAlias = "str | int | torch.device"

Layout: TypeAlias = Literal["NHD", "HND"]

OnFull: TypeAlias = Literal["raise", "evict"]

Backend: TypeAlias = Literal["auto", "cpu", "cpu_invariant", "flashinfer", "reference", "triton"]

MemoryBackend: TypeAlias = Literal["auto", "torch", "triton"]

Mode: TypeAlias = Literal["auto", "compiled", "ragged", "gather"]

Weights: TypeAlias = Literal["int8"]

StrategyName: TypeAlias = Literal[
    "adaptive",
    "fifo",
    "gdsf",
    "lfu",
    "longest_first",
    "lru",
    "s3fifo",
    "sieve",
    "ttl",
]
"""The built-in strategies that need no numbers. For others write the object, or ``parse_strategy("priority:3")``."""
