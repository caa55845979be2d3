"""What subscribers hear, and the frozen snapshot that views are drawn from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from pagedkv.control.types import BlockId, CacheStats, SequenceInfo

__all__ = ["AllBlocksCleared", "BlockRemoved", "BlockStored", "CacheEvent", "CacheSnapshot"]


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A full block became findable.

    Attributes
    ----------
    block_id : BlockId
    parent_id : BlockId or None
        The block before it; None for the first block of a prefix.
    token_ids : tuple of int
        The ``block_size`` tokens of the block.
    cache_salt : str
        The namespace that it belongs to.
    """

    block_id: BlockId
    parent_id: BlockId | None
    token_ids: tuple[int, ...]
    cache_salt: str


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A block is not findable any more.

    Attributes
    ----------
    block_id : BlockId
    """

    block_id: BlockId


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing that was stored before is findable any more."""


CacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True, eq=False)
class CacheSnapshot:
    """The whole pool at one moment; arrays are read-only copies, one entry a block. Equal by value.

    Attributes
    ----------
    block_size : int
    strategy : str
    ref_count : int32 [num_blocks]
        Sequences that hold the block.
    cached : bool [num_blocks]
        Findable, but held by nobody.
    pinned : bool [num_blocks]
    indexed : bool [num_blocks]
        Findable by others.
    num_tokens, depth : int32 [num_blocks]
    last_access : int64 [num_blocks]
    owner : int64 [num_blocks]
        Row of a sequence in ``sequences`` that holds the block, the lowest if several do; −1 if none does.
    sequences : tuple of SequenceInfo
    stats : CacheStats
    tick : int
    """

    block_size: int
    strategy: str
    ref_count: npt.NDArray[np.int32]
    cached: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_]
    indexed: npt.NDArray[np.bool_]
    num_tokens: npt.NDArray[np.int32]
    depth: npt.NDArray[np.int32]
    last_access: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    sequences: tuple[SequenceInfo, ...]
    stats: CacheStats
    tick: int

    def __post_init__(self) -> None:
        for value in self._values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CacheSnapshot):
            return NotImplemented
        return all(map(_is_equal, self._values(), other._values()))

    __hash__ = None  # type: ignore[assignment]

    def _values(self) -> list[object]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def total_blocks(self) -> int:
        """How many blocks the pool has."""
        return len(self.ref_count)


def _is_equal(a: object, b: object) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b
