"""How Python calls compiled functions: with the addresses of the state's arrays, and one type for every argument."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pytest

from pagedkv import BlockManager
from pagedkv.control import sequences
from pagedkv.jit import borrowed, packed

needs_compiler = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the compiler nothing is packed")


class Inner(NamedTuple):
    cube: npt.NDArray[np.float64]


class Arrays(NamedTuple):
    records: npt.NDArray[np.void]
    inner: Inner
    empty: npt.NDArray[np.int32]
    table: npt.NDArray[np.int32]


def some_arrays(rows: int = 3) -> Arrays:
    records = np.zeros(rows, np.dtype((np.record, [("wide", "i8"), ("narrow", "u1")])))
    records["narrow"] = np.arange(rows)
    cube = np.arange(rows * 6, dtype=np.float64).reshape(rows, 2, 3)
    return Arrays(records, Inner(cube), np.zeros(0, np.int32), np.arange(rows * 5, dtype=np.int32).reshape(rows, 5))


@numba.njit
def look_and_write(arrays: Arrays) -> tuple[int, float, int, int]:
    arrays = borrowed(arrays)
    arrays.records[1].wide = arrays.table[2, 4]
    arrays.inner.cube[0, 1, 0] = -1.0
    return arrays.records[2].narrow, arrays.inner.cube[2, 1, 2], arrays.table.shape[1], len(arrays.empty)


@needs_compiler
def test_a_packed_tuple_is_the_same_arrays() -> None:
    arrays = some_arrays()
    assert look_and_write(packed(arrays)) == look_and_write(arrays) == (2, 17.0, 5, 0)
    assert arrays.records[1].wide == 14
    assert arrays.inner.cube[0, 1, 0] == -1.0


@needs_compiler
def test_numba_tells_packed_tuples_of_other_types_apart() -> None:
    arrays = some_arrays()
    wider = arrays._replace(table=arrays.table.astype(np.int64))
    assert numba.typeof(packed(arrays)) == numba.typeof(packed(some_arrays(7)))
    assert numba.typeof(packed(arrays)) != numba.typeof(packed(wider))
    assert look_and_write(packed(wider)) == (2, 17.0, 5, 0)


def test_a_replaced_state_is_packed_anew() -> None:
    manager = BlockManager(64, 4)
    first = manager._state.packed
    assert manager._state.packed is first
    for seq_id in range(40):
        manager.allocate(seq_id, 1, cache_salt=str(seq_id))  # more roots than there were at first
    for _ in range(24):
        manager.append(0, 4)
    manager.check()
    assert manager._state.packed is not first
    assert manager.get_sequence(0).num_tokens == 97


@needs_compiler
def test_arrays_that_cannot_be_written_compile_nothing_anew() -> None:
    manager = BlockManager(64, 4)
    ids = np.arange(12)
    manager.allocate(0, ids)
    manager.append_batch([0], ids.reshape(1, 12))
    compiled = len(sequences.allocate_row.signatures), len(sequences.grow_rows.signatures)
    ids.flags.writeable = False
    manager.allocate(1, ids)
    manager.append_batch([1], ids.reshape(1, 12))
    assert (len(sequences.allocate_row.signatures), len(sequences.grow_rows.signatures)) == compiled
