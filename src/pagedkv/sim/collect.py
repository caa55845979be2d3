"""Collector of requests: block ids made dense and chained, columns on disk where they are large, sorted by time."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled, mix64
from pagedkv.sim.source import BadRecord
from pagedkv.sim.trace import NO_PARENT, NO_SESSION, Floats, Int32s, Int64s, Trace

Array = npt.NDArray[Any]

# Arrays that grow chunk by chunk, and move to disk when all together pass a size.


class _Column:
    """One growing array: chunks in memory, or a file."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.chunks: list[Array] = []
        self.file: BinaryIO | None = None

    def extend(self, chunk: Array) -> None:
        if self.file is None:
            self.chunks.append(chunk)
        else:
            chunk.tofile(self.file)

    def move_to(self, path: Path) -> None:
        self.file = path.open("wb")
        for chunk in self.chunks:
            chunk.tofile(self.file)
        self.chunks.clear()

    def finish(self) -> Array:
        if self.file is None:
            chunks, self.chunks = self.chunks, []
            return np.concatenate([np.zeros(0, self.dtype), *chunks])
        self.file.close()
        if Path(self.file.name).stat().st_size == 0:  # cannot be mapped
            return np.zeros(0, self.dtype)
        return np.memmap(self.file.name, self.dtype, mode="r+")


class Columns:
    """Growing arrays that stay in memory up to `memory_bytes` together and go to a temporary folder beyond that."""

    def __init__(self, dtypes: dict[str, type[np.generic]], memory_bytes: int) -> None:
        self.folder: Path | None = None  # whoever takes the arrays removes it: `close`
        self._columns = {name: _Column(dtype) for name, dtype in dtypes.items()}
        self._memory_bytes = memory_bytes
        self._held = 0

    def extend(self, **chunks: Array) -> None:
        """Append to columns; the arrays are kept, not copied."""
        for name, chunk in chunks.items():
            self._columns[name].extend(chunk)
            self._held += chunk.nbytes
        if self.folder is None and self._held > self._memory_bytes:
            self.folder = Path(tempfile.mkdtemp(prefix="pagedkv-trace-"))
            for name, column in self._columns.items():
                column.move_to(self.folder / f"{name}.bin")

    def finish(self) -> dict[str, Array]:
        """Return the arrays, in memory or mapped; nothing can be appended afterwards."""
        return {name: column.finish() for name, column in self._columns.items()}

    def empty(self, name: str, like: Array) -> Array:
        """Return an array of the same size and kind: in memory, or mapped from a new file."""
        if self.folder is None or len(like) == 0:
            return np.empty_like(like)
        return np.memmap(self.folder / f"{name}.bin", like.dtype, mode="w+", shape=like.shape)

    def close(self) -> None:
        """Remove the temporary folder; arrays that are still mapped stay readable where the system allows it."""
        for column in self._columns.values():
            if column.file is not None:
                column.file.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


# Bring requests into another order, and number their blocks anew by first appearance.

UNSEEN = -1


@compiled
def _reorder(order: Array, starts: Array, counts: Array, ids: Array, moved: Array, rank: Array, firsts: Array) -> None:
    place = 0
    distinct = 0
    for request in order:
        for old_place in range(starts[request], starts[request] + counts[request]):
            old = ids[old_place]
            if rank[old] == UNSEEN:
                rank[old] = distinct
                firsts[distinct] = old
                distinct += 1
            moved[place] = rank[old]
            place += 1


def reorder_ids(order: Int64s, counts: Int64s, ids: Int32s, parents: Int32s, moved: Int32s) -> Int32s:
    """Write the blocks of every request, in the new order and with new numbers, to `moved`; return the new parents.

    `order` holds the old places of the requests in their new order, `counts` the blocks of every request in the old
    one. Every block occurs in `ids`; a negative parent is a root and stays as it is.
    """
    rank = np.full(len(parents), UNSEEN, np.int32)
    firsts = np.empty(len(parents), np.int32)
    _reorder(order, np.cumsum(counts) - counts, counts, ids, moved, rank, firsts)
    renumbered = parents[firsts]
    has_parent = renumbered >= 0
    renumbered[has_parent] = rank[renumbered[has_parent]]
    return renumbered


def renumber_sessions(sessions: Int64s) -> None:
    """Number sessions anew in the order of their first appearance, in place; −1 stays −1."""
    seen, firsts, places = np.unique(sessions, return_index=True, return_inverse=True)
    has_number = seen >= 0
    rank = seen.copy()
    rank[has_number] = np.argsort(np.argsort(firsts[has_number]))
    sessions[:] = rank[places]


# Raw block ids to dense chained ids: equal ids stand for equal blocks behind equal prefixes.
#
# A block is known by (dense id of the block before it, its raw id), compared exactly. The table is open addressing
# with linear probing over int32 slots; the raw ids and parents lie in two arrays beside it. Together they take 12
# bytes for a block, 5 to 10 more for its slot, and what the arrays have grown ahead: at most a quarter.

MAX_DISTINCT = 2**31 - 2
FULL = 0.8  # of the slots, then they double
AHEAD = 1.25  # the arrays grow by a quarter, as they are the larger part
EMPTY = -1
FIRST_SLOTS = 1024


@compiled
def _slot_of(parent: int, raw: int, raws: Array, parents: Array, table: Array) -> int:
    """Return the slot that holds the block, or the empty one where it belongs."""
    mask = np.uint64(len(table) - 1)
    # Parents are dense and raw ids often consecutive: they need to be mixed well.
    slot = mix64(raw + np.uint64(parent) * np.uint64(0x9E3779B97F4A7C15)) & mask
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
    """A growing set of blocks, numbered in the order of their first appearance."""

    def __init__(self) -> None:
        self.count = 0  # different blocks so far
        self._raws = np.empty(FIRST_SLOTS, np.uint64)
        self._parents = np.empty(FIRST_SLOTS, np.int32)
        self._table = np.full(FIRST_SLOTS, EMPTY, np.int32)

    @property
    def parents(self) -> Int32s:
        """Of every block the block before it, or the (negative) root that its request named."""
        return self._parents[: self.count]

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return self._raws.nbytes + self._parents.nbytes + self._table.nbytes

    def intern(self, raw_ids: Int64s, offsets: Int64s, roots: Int32s) -> Int32s:
        """Return the dense ids of requests, each behind its (negative) root; nothing has changed where it raises.

        Request i owns ``raw_ids[offsets[i] : offsets[i + 1]]``. Requests with different roots share no block.
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


logger = logging.getLogger("pagedkv")

SPILL_BYTES = 512 * 2**20
LIMIT = 2**53  # of lengths and timestamps: what a float64 holds exactly
BATCH = 2**17  # blocks, or requests, that are interned at once
LOWEST_NUMBER = -(2**62)
FIRST_NAME = -(2**63)
_COLUMNS: dict[str, type[np.generic]] = {
    "times": np.float64,
    "input_tokens": np.int64,
    "output_tokens": np.int64,
    "sessions": np.int64,
    "counts": np.int64,
    "ids": np.int32,
}


class Collector:
    """Takes the requests of a trace one by one, in the order of the file.

    Where timestamps are expected to ascend, `in_order`, the requests that break the promise are counted.
    """

    def __init__(self, *, in_order: bool = True, ticks_per_second: int = 1) -> None:
        self._ticks_per_second = ticks_per_second
        self.in_order = in_order  # a reader that learns better on the way says so here
        self._columns = Columns(_COLUMNS, SPILL_BYTES)
        self._interner = Interner()
        self._names: dict[Hashable, int] = {}
        self._sessions: dict[Hashable, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._times, self._lengths = array("d"), array("q")
        self._counts, self._raw_ids, self._roots = array("q"), array("q"), array("i")

    def session(self, key: Hashable) -> int:
        """Return the dense number of a session; None has none."""
        return NO_SESSION if key is None else self._sessions.setdefault(key, len(self._sessions))

    def add(
        self,
        time: float,
        input_tokens: int,
        output_tokens: int,
        session: Hashable = None,
        ids: Sequence[Any] | Int64s = (),
        root: int = NO_PARENT,
    ) -> None:
        """Take one request; nothing of it is kept when it is refused with a `BadRecord`.

        The time is in ticks, from any beginning. Ids are ints, strings or bytes, the root's first; an array holds what
        `number` returned for them. Requests with different (negative) roots share nothing.
        """
        if not -LIMIT < time < LIMIT:
            raise BadRecord(f"timestamp: expected a finite number below 2**53, got {time}")
        if not 0 <= input_tokens < LIMIT:
            raise BadRecord(f"input length: expected 0 … 2**53 - 1, got {input_tokens}")
        if not 0 <= output_tokens < LIMIT:
            raise BadRecord(f"output length: expected 0 … 2**53 - 1, got {output_tokens}")
        raw_ids = self._numbers(ids)
        self._times.append(time)
        self._lengths.extend((input_tokens, output_tokens, self.session(session)))
        self._counts.append(len(raw_ids))
        self._raw_ids.extend(raw_ids)
        self._roots.append(root)
        if len(self._raw_ids) >= BATCH or len(self._times) >= BATCH:
            self._flush()

    def _numbers(self, ids: Sequence[Any] | Int64s) -> array[int]:
        if isinstance(ids, np.ndarray):
            return array("q", ids.tobytes())
        try:
            numbers = array("q", ids)
            if not numbers or min(numbers) >= LOWEST_NUMBER:
                return numbers
        except (TypeError, OverflowError):  # not all of them are numbers, or some are too large
            pass
        return array("q", [self.number(name) for name in ids])

    def number(self, name: Hashable) -> int:
        """Return the number of an id: itself, or one from a range that no such number lies in."""
        if isinstance(name, int) and LOWEST_NUMBER <= name < 2**63:
            return name
        return self._names.setdefault(name, FIRST_NAME + len(self._names))

    def _flush(self) -> None:
        counts, raw_ids = np.frombuffer(self._counts, np.int64), np.frombuffer(self._raw_ids, np.int64)
        inputs, outputs, sessions = np.frombuffer(self._lengths, np.int64).reshape(-1, 3).T.copy()
        self._columns.extend(
            times=np.frombuffer(self._times, np.float64),
            input_tokens=inputs,
            output_tokens=outputs,
            sessions=sessions,
            counts=counts,
            ids=self._interner.intern(raw_ids, _offsets(counts), np.frombuffer(self._roots, np.int32)),
        )
        self._clear()

    def close(self) -> None:
        """Give up: remove what lies on disk."""
        self._columns.close()

    def finish(self, *, name: str, format: str, block_tokens: int, has_content: bool, num_skipped: int) -> Trace:
        """Return the trace, sorted by time, from second 0 on; a `BadRecord` where there is no request."""
        if self._times:
            self._flush()
        arrays = self._columns.finish()
        if not len(arrays["times"]):
            raise BadRecord("holds no request")
        parents = self._interner.parents.copy()
        num_reordered = 0
        times = arrays["times"]
        if np.any(times[1:] < times[:-1]):
            num_reordered = self._late(times, name)
            parents = self._sort(arrays, parents)
        offsets = _offsets(arrays.pop("counts"))
        arrays["times"] -= arrays["times"][0]
        arrays["times"] /= self._ticks_per_second
        trace = Trace(
            name=name,
            format=format,
            block_tokens=block_tokens,
            offsets=offsets,
            parents=np.maximum(parents, NO_PARENT),
            has_content=has_content,
            num_skipped=num_skipped,
            num_reordered=num_reordered,
            **arrays,
        )
        if self._columns.folder is not None:
            weakref.finalize(trace, shutil.rmtree, self._columns.folder, ignore_errors=True)
        return trace

    def _late(self, times: Floats, name: str) -> int:
        if not self.in_order:
            return 0
        late = int(np.count_nonzero(times < np.maximum.accumulate(times)))
        logger.warning("%s: %d of %d timestamps go backwards; the requests were sorted", name, late, len(times))
        return late

    def _sort(self, arrays: dict[str, Array], parents: Int32s) -> Int32s:
        """Sort the requests by time, equal times in the order of the file; return the parents in new numbers."""
        order = np.argsort(arrays["times"], kind="stable")
        moved = self._columns.empty("moved_ids", arrays["ids"])
        parents = reorder_ids(order, arrays["counts"], arrays["ids"], parents, moved)
        arrays["ids"] = moved
        for column in ("times", "input_tokens", "output_tokens", "sessions", "counts"):
            arrays[column][:] = arrays[column][order]
        renumber_sessions(arrays["sessions"])
        return parents


def _offsets(counts: Int64s) -> Int64s:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
