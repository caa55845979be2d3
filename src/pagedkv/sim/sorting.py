"""Bring requests into another order, and number their blocks anew by first appearance."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled

__all__ = ["renumber_sessions", "reorder_ids"]

Array = npt.NDArray[Any]
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


def reorder_ids(
    order: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    parents: npt.NDArray[np.int32],
    moved: npt.NDArray[np.int32],
) -> npt.NDArray[np.int32]:
    """Write the blocks of every request, in the new order and with new numbers, to `moved`.

    Parameters
    ----------
    order : int64 [num_requests]
        The old places of the requests, in their new order.
    counts : int64 [num_requests]
        Blocks of every request, in the old order.
    ids : int32 [num_accesses]
    parents : int32 [num_distinct]
        Every block occurs in `ids`; a negative number is a root.
    moved : int32 [num_accesses]
        Where the result goes.

    Returns
    -------
    int32 [num_distinct]
        The parents in the new numbers; roots stay as they are.
    """
    rank = np.full(len(parents), UNSEEN, np.int32)
    firsts = np.empty(len(parents), np.int32)
    _reorder(order, np.cumsum(counts) - counts, counts, ids, moved, rank, firsts)
    renumbered = parents[firsts]
    has_parent = renumbered >= 0
    renumbered[has_parent] = rank[renumbered[has_parent]]
    return renumbered


def renumber_sessions(sessions: npt.NDArray[np.int64]) -> None:
    """Number sessions anew in the order of their first appearance, in place; −1 stays −1."""
    seen, firsts, places = np.unique(sessions, return_index=True, return_inverse=True)
    has_number = seen >= 0
    rank = seen.copy()
    rank[has_number] = np.argsort(np.argsort(firsts[has_number]))
    sessions[:] = rank[places]
