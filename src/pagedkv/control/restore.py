"""Records of what the blocks of a pool hold, and filling the books of an empty pool from them, as after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import BlockManager
from pagedkv.control.prefix import find_child, link_child
from pagedkv.control.protocol import block_scores, block_view
from pagedkv.control.reclaim import offer
from pagedkv.control.state import State
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.jit import borrowed, call_kernel, compiled

NO_PARENT, NO_BLOCK = -1, -2

_UNKNOWN, _LINKED, _LOST = range(3)


class BlockRecords(NamedTuple):
    """What is known of the blocks of a pool, one entry for each.

    Attributes
    ----------
    parents : int32 [num_blocks]
        The block before it, ``NO_PARENT`` for the first of a prefix, ``NO_BLOCK`` where nothing is known.
    salts : int32 [num_blocks]
        For the first block of a prefix, which salt it belongs to: a place in a list.
    token_ids : int64 [num_blocks, block_size]
    last_access : int64 [num_blocks]
        Ticks, at least 0; the books go on from the highest.
    access_counts : int32 [num_blocks]
    """

    parents: npt.NDArray[np.int32]
    salts: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int64]
    last_access: npt.NDArray[np.int64]
    access_counts: npt.NDArray[np.int32]


def records_of(books: BlockManager) -> tuple[BlockRecords, list[str]]:
    """Return what `restore_blocks` needs to make the findable blocks of a pool findable in another one.

    Parameters
    ----------
    books : BlockManager

    Returns
    -------
    BlockRecords, list of str
        The records, and the salts that they count.
    """
    with books._lock:
        blocks, contents = books._state.blocks, books._state.contents
        exists, is_root = blocks["indexed"] != 0, blocks["parent"] < 0
        namespaces = -1 - blocks["parent"]
        used = np.unique(namespaces[exists & is_root])
        records = BlockRecords(
            parents=np.where(exists, np.where(is_root, NO_PARENT, blocks["parent"]), NO_BLOCK).astype(np.int32),
            salts=(np.searchsorted(used, namespaces) * (exists & is_root)).astype(np.int32),
            token_ids=contents.reshape(-1, books.block_size).copy(),
            last_access=blocks["last_access"].copy(),
            access_counts=blocks["access_count"].copy(),
        )
        return records, [books._namespaces.salt_of(number) for number in used.tolist()]


def restore_blocks(books: BlockManager, records: BlockRecords, salts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Make the blocks of a pool findable that records tell of; of two that hold the same, one.

    A block whose chain of parents has a gap, or never ends, is left free. It takes linear time; the strategy sees the
    blocks stored in the order of their last use.

    Parameters
    ----------
    books : BlockManager
        Of a pool that was never used.
    records : BlockRecords
    salts : sequence of str
        What ``records.salts`` counts.

    Returns
    -------
    bool [num_blocks]
        Which blocks are findable now: cached, held by nobody.

    Raises
    ------
    InvalidOperation
        If the pool was used already or has recurrent states, or the records do not fit it.
    """
    num_blocks = books.total_blocks
    expected = {name: (num_blocks,) for name in BlockRecords._fields} | {"token_ids": (num_blocks, books.block_size)}
    for name, array in records._asdict().items():
        if array.shape != expected[name]:
            raise bad_argument(f"records.{name}", f"shape {expected[name]}", f"{array.shape}")
    exists = records.parents != NO_BLOCK
    if exists.any() and not 0 <= records.salts[exists].min() <= records.salts[exists].max() < len(salts):
        raise bad_argument("records.salts", f"numbers of {len(salts)} salts")
    if exists.any() and not NO_PARENT <= records.parents[exists].min() <= records.parents.max() < num_blocks:
        raise bad_argument("records.parents", f"blocks below {num_blocks}, NO_PARENT or NO_BLOCK")
    with books._lock:
        if books._state.counter("fresh") or books.total_states:
            raise InvalidOperation("restore_blocks: expected a pool that was never used and has no recurrent states")
        books._begin()
        is_findable = _restore(books, records, exists, salts)
        books._finish(0)
    return is_findable


def _restore(
    books: BlockManager, records: BlockRecords, exists: npt.NDArray[np.bool_], salts: Sequence[str]
) -> npt.NDArray[np.bool_]:
    """Link the blocks, let a strategy in NumPy score them, and offer them to be reclaimed."""
    namespaces = np.array([books._enter_namespace(salt) for salt in salts] or [0], np.int32)[records.salts * exists]
    known = np.flatnonzero(exists)
    order = known[np.argsort(records.last_access[known], kind="stable")]
    linked = np.where(exists, _UNKNOWN, _LOST).astype(np.int8)
    books._state.counters[0].tick = max(0, records.last_access[known].max(initial=0))
    link_blocks(
        books._state.packed,
        np.ascontiguousarray(records.parents),
        namespaces,
        np.ascontiguousarray(records.token_ids),
        np.ascontiguousarray(records.last_access),
        np.ascontiguousarray(records.access_counts),
        order,
        linked,
    )
    is_findable = linked == _LINKED
    order = order[is_findable[order]]
    if books._is_scored_in_numpy and len(order):
        scores = block_scores(books._strategy, block_view(books._state, order), books._state.counter("tick"))
        books._state.blocks["score"][order] = scores
    offer_blocks(books._state.packed, linked, order)
    return is_findable


@compiled
def link_blocks(
    state: State,
    parents: npt.NDArray[np.int32],
    namespaces: npt.NDArray[np.int32],
    ids: npt.NDArray[np.int64],
    last_access: npt.NDArray[np.int64],
    access_counts: npt.NDArray[np.int32],
    order: npt.NDArray[np.int64],
    linked: npt.NDArray[np.int8],
) -> None:
    """Link every block of `order` whose parents are there, the parents first, and say so in `linked`."""
    state, parents, namespaces, ids = borrowed(state), borrowed(parents), borrowed(namespaces), borrowed(ids)
    last_access, access_counts = borrowed(last_access), borrowed(access_counts)
    size = state.counters[0].block_size
    path = np.empty(len(order), np.int32)
    for first in order:
        length, at = 0, np.int64(first)
        while at >= 0 and linked[at] == _UNKNOWN:
            linked[at] = _LOST  # until it is linked: so a chain that runs into itself is lost
            path[length] = at
            length += 1
            at = parents[at]
        if at >= 0 and linked[at] == _LOST:
            continue
        for place in range(length - 1, -1, -1):
            block = path[place]
            parent = parents[block] if parents[block] >= 0 else -1 - namespaces[block]
            for j in range(size):
                state.contents[block * size + j] = ids[block, j]
            if find_child(state, parent, state.contents, block * size) >= 0:
                break  # its twin stays, and has no part in what follows
            record = state.blocks[block]
            record.num_tokens = size
            record.access_count = access_counts[block]
            record.last_access = last_access[block]
            record.created = last_access[block]
            link_child(state, parent, block)
            linked[block] = _LINKED


@compiled
def offer_blocks(state: State, linked: npt.NDArray[np.int8], order: npt.NDArray[np.int64]) -> None:
    """Let the blocks of `order` be cached, and those that are not linked be free."""
    state, linked, order = borrowed(state), borrowed(linked), borrowed(order)
    counters = state.counters[0]
    for block in order:
        counters.fresh = max(counters.fresh, block + 1)
    for block in range(counters.fresh - 1, -1, -1):  # so that the lowest one is taken first
        if linked[block] != _LINKED:
            state.free_stack[counters.free_top] = block
            counters.free_top += 1
    counters.cached = len(order)
    for block in order:
        if state.kernels.on_release:
            call_kernel(state.kernels.on_release, state, block)
        offer(state, block)
