"""Raw block ids to dense chained ids: equal ids stand for equal blocks behind equal prefixes.

A block is known by (dense id of the block before it, its raw id), compared exactly. The table is open addressing with
linear probing over int32 slots; the raw ids and parents lie in two arrays beside it. Together they take 12 bytes for a
block, 5 to 10 more for its slot, and what the arrays have grown ahead: at most a quarter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled

__all__ = ["MAX_DISTINCT", "Interner", "TooManyBlocks"]

Array = npt.NDArray[Any]

MAX_DISTINCT = 2**31 - 2
FULL = 0.8  # of the slots, then they double
AHEAD = 1.25  # the arrays grow by a quarter, as they are the larger part
EMPTY = -1
FIRST_SLOTS = 1024


@compiled
def _slot_of(parent: int, raw: int, raws: Array, parents: Array, table: Array) -> int:
    """Return the slot that holds the block, or the empty one where it belongs."""
    mask = np.uint64(len(table) - 1)
    # Parents are dense and raw ids often consecutive: multiply, fold and multiply again (the finalizer of splitmix64).
    mixed = raw + np.uint64(parent) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    slot = (mixed ^ (mixed >> np.uint64(31))) & mask
    while True:
        block = table[slot]
        if block == EMPTY or (raws[block] == raw and parents[block] == parent):
            return slot
        slot = (slot + np.uint64(1)) & mask


@compiled
def _intern(
    raw_ids: Array, offsets: Array, roots: Array, raws: Array, parents: Array, table: Array, count: int, ids: Array
) -> int:
    """Write the dense id of every block to `ids`; return how many blocks are known now."""
    for request in range(len(offsets) - 1):
        parent = roots[request]
        for place in range(offsets[request], offsets[request + 1]):
            raw = raw_ids[place]
            slot = _slot_of(parent, raw, raws, parents, table)
            if table[slot] == EMPTY:
                table[slot] = count
                raws[count] = raw
                parents[count] = parent
                count += 1
            parent = table[slot]
            ids[place] = parent
    return count


@compiled
def _rehash(raws: Array, parents: Array, count: int, table: Array) -> None:
    for block in range(count):
        table[_slot_of(parents[block], raws[block], raws, parents, table)] = block


class TooManyBlocks(Exception):
    """There are more different blocks than an int32 can number."""


class Interner:
    """A growing set of blocks, numbered in the order of their first appearance.

    Attributes
    ----------
    count : int
        Different blocks so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._raws = np.empty(FIRST_SLOTS, np.uint64)
        self._parents = np.empty(FIRST_SLOTS, np.int32)
        self._table = np.full(FIRST_SLOTS, EMPTY, np.int32)

    @property
    def parents(self) -> npt.NDArray[np.int32]:
        """Of every block the block before it, or the (negative) root that its request named."""
        return self._parents[: self.count]

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return self._raws.nbytes + self._parents.nbytes + self._table.nbytes

    def intern(
        self, raw_ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], roots: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        """Return the dense ids of a batch of requests.

        Parameters
        ----------
        raw_ids : int64 [num_blocks]
        offsets : int64 [num_requests + 1]
            Request i owns ``raw_ids[offsets[i] : offsets[i + 1]]``.
        roots : int32 [num_requests]
            What stands before the first block: a negative number; requests with different roots share no block.

        Raises
        ------
        TooManyBlocks
            Nothing has changed then.
        """
        needed = self.count + len(raw_ids)
        if needed > MAX_DISTINCT:
            raise TooManyBlocks(f"more than {MAX_DISTINCT} different blocks")
        self._make_room(needed)
        ids = np.empty(len(raw_ids), np.int32)
        self.count = int(
            _intern(raw_ids.view(np.uint64), offsets, roots, self._raws, self._parents, self._table, self.count, ids)
        )
        return ids

    def _make_room(self, needed: int) -> None:
        if needed > len(self._raws):
            capacity = max(needed, int(len(self._raws) * AHEAD))
            self._raws = _grown(self._raws, self.count, capacity)
            self._parents = _grown(self._parents, self.count, capacity)
        slots = len(self._table)
        while needed > slots * FULL:
            slots *= 2
        if slots > len(self._table):
            self._table = np.full(slots, EMPTY, np.int32)
            _rehash(self._raws, self._parents, self.count, self._table)


def _grown(array: Array, count: int, capacity: int) -> Array:
    larger = np.empty(capacity, array.dtype)
    larger[:count] = array[:count]
    return larger
