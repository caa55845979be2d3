"""A BlockManager whose blocks are named by content ids, as traces name them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control import contents
from pagedkv.control.manager import BlockManager
from pagedkv.control.rules import CUSTOM
from pagedkv.control.strategies import EvictionStrategy
from pagedkv.errors import InvalidOperation

__all__ = ["ContentCache"]

Ids = npt.NDArray[Any]


def _flat(name: str, array: object, dtypes: tuple[type, ...]) -> Ids:
    """Return the array, contiguous, if it is flat and of one of these types."""
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype not in dtypes:
        wanted = " or ".join(dtype.__name__ for dtype in dtypes)
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else repr(array)
        raise InvalidOperation(f"{name} expects a flat {wanted} array, got {got}")
    return np.ascontiguousarray(array)


class ContentCache(BlockManager):
    """The control plane over content ids: one id stands for a whole block of tokens.

    All of a BlockManager's calls work, with ids in place of token ids and a block size of 1; but where a model must
    compute the last token of a prompt again, a trace counts every block that was found, the last one too. `run` serves
    many requests in one call.

    Parameters
    ----------
    num_blocks : int
        Capacity.
    strategy : str or EvictionStrategy
        What is given up first.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.
    """

    def __init__(self, num_blocks: int, strategy: str | EvictionStrategy = "lru") -> None:
        super().__init__(num_blocks, 1, strategy=strategy)
        self._state.counters[0].whole_hits = 1

    def run(self, ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Run requests one after the other: match, allocate, commit, free.

        A request of more blocks than there is room for keeps its first ones.

        Parameters
        ----------
        ids : int32 or int64 [num_accesses]
            Content ids.
        offsets : int64 [num_requests + 1]
            Request i owns ``ids[offsets[i] : offsets[i + 1]]``.

        Returns
        -------
        int32 [num_requests]
            How many leading blocks of each request were found.

        Raises
        ------
        InvalidOperation
            If the arrays do not fit together, or the strategy returns something else than scores.
        """
        ids = _flat("ids", ids, (np.int32, np.int64))
        offsets = _flat("offsets", offsets, (np.int64,))
        lengths = np.diff(offsets)
        if not len(offsets) or offsets[0] < 0 or (lengths < 0).any() or offsets[-1] > len(ids):
            raise InvalidOperation(f"offsets expects num_requests + 1 numbers, ascending, 0 … {len(ids)}")
        path = np.zeros(int(lengths.max(initial=0)), np.int32)
        hits = np.zeros(len(lengths), np.int32)
        with self._lock:
            namespace = self._enter_namespace("")
            if self._state.counters[0].rule == CUSTOM or self._state.counters[0].logging:
                for i in range(len(lengths)):
                    hits[i] = self._run_observed(namespace, ids, int(offsets[i]), int(offsets[i + 1]), path)
            else:
                contents.run_requests(self._state, namespace, ids, offsets, path, hits)
        return hits

    def has_room(self, ids: Ids, more: int = 0) -> bool:
        """Tell whether a request of these content ids, and `more` blocks behind them, fits now; changes nothing."""
        ids = _flat("ids", ids, (np.int32, np.int64)).astype(np.int64)
        with self._lock:
            _, needed, available = self._room_for(self._enter_namespace(""), len(ids), ids, True)
            return needed + more <= available

    def _run_observed(self, namespace: int, ids: Ids, start: int, stop: int, path: npt.NDArray[np.int32]) -> int:
        """Run one request; a strategy in NumPy scores its blocks, hooks and subscribers hear of it."""
        self._reclaim_for(namespace, stop - start, ids[start:stop].astype(np.int64), True, as_far_as_it_fits=True)
        found, held = contents.begin_request(self._state, namespace, ids, start, stop, path)
        try:
            self._hooks.hit(self._state, path[:found])
            self._hooks.stored(self._state, self._stored_blocks())
            if self._state.counters[0].rule == CUSTOM:
                self._score_blocks(path[:held])
        finally:
            contents.end_request(self._state, path, found, held)
            self._feed.publish(self._state)
        return found
