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
        if ids.ndim != 1 or ids.dtype not in (np.int32, np.int64):
            raise InvalidOperation(f"ids expects a flat int32 or int64 array, got {ids.dtype} of shape {ids.shape}")
        lengths = np.diff(offsets)
        if offsets.ndim != 1 or not len(offsets) or offsets[0] < 0 or (lengths < 0).any() or offsets[-1] > len(ids):
            raise InvalidOperation(f"offsets expects int64 [num_requests + 1], ascending, up to {len(ids)}")
        path = np.zeros(int(lengths.max(initial=0)), np.int32)
        hits = np.zeros(len(lengths), np.int32)
        ids = np.ascontiguousarray(ids)
        with self._lock:
            if self._state.counters[0].rule == CUSTOM or self._state.counters[0].logging:
                self._run_observed(ids, offsets, path, hits)
            else:
                contents.run_requests(self._state, ids, offsets, path, hits)
        return hits

    def _run_observed(
        self, ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64], path: npt.NDArray[np.int32], hits: Any
    ) -> None:
        """Run requests one by one: a strategy in NumPy scores the blocks of each, subscribers hear of each."""
        is_custom = self._state.counters[0].rule == CUSTOM
        for place, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            self._reclaim_for(0, stop - start, ids[start:stop].astype(np.int64), True)
            found, held = contents.begin_request(self._state, ids, start, stop, path)
            try:
                self._hooks.hit(self._state, path[:found])
                self._publish()
                if is_custom:
                    self._score_blocks(path[:held])
            finally:
                contents.end_request(self._state, path, found, held)
            hits[place] = found
