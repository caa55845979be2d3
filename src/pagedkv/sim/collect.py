"""From single requests to the arrays of a `Trace`: batch by batch, chained, sorted by time."""

from __future__ import annotations

import logging
import shutil
import weakref
from array import array
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.sim.columns import Columns
from pagedkv.sim.interning import Interner
from pagedkv.sim.sorting import renumber_sessions, reorder_ids
from pagedkv.sim.source import BadRecord
from pagedkv.sim.trace import NO_PARENT, NO_SESSION, Trace

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

    Parameters
    ----------
    in_order : bool
        Whether the format promises ascending timestamps; then requests that break the promise are counted.
    ticks_per_second : int
        The unit of the timestamps: 1000 for milliseconds.

    Attributes
    ----------
    in_order : bool
        A reader that learns better on the way says so here.
    """

    def __init__(self, *, in_order: bool = True, ticks_per_second: int = 1) -> None:
        self._ticks_per_second = ticks_per_second
        self.in_order = in_order
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
        ids: Sequence[Any] = (),
        root: int = NO_PARENT,
    ) -> None:
        """Take one request; nothing of it is kept when it is refused.

        Parameters
        ----------
        time : float
            In ticks, from any beginning.
        session : hashable, optional
            Whatever names the session in the file.
        ids : sequence of int, str or bytes
            Raw ids of the blocks, the root's first.
        root : int
            Requests with different (negative) roots share nothing.

        Raises
        ------
        BadRecord
        """
        if not -LIMIT < time < LIMIT:
            raise BadRecord(f"the timestamp must be a finite number below 2**53, got {time}")
        if not 0 <= input_tokens < LIMIT:
            raise BadRecord(f"the input length must be 0 … 2**53 - 1, got {input_tokens}")
        if not 0 <= output_tokens < LIMIT:
            raise BadRecord(f"the output length must be 0 … 2**53 - 1, got {output_tokens}")
        raw_ids = self._numbers(ids)
        self._times.append(time)
        self._lengths.extend((input_tokens, output_tokens, self.session(session)))
        self._counts.append(len(raw_ids))
        self._raw_ids.extend(raw_ids)
        self._roots.append(root)
        if len(self._raw_ids) >= BATCH or len(self._times) >= BATCH:
            self._flush()

    def _numbers(self, ids: Sequence[Any]) -> array[int]:
        try:
            numbers = array("q", ids)
        except (TypeError, OverflowError):
            return array("q", [self.number(name) for name in ids])
        if len(numbers) and min(numbers) < LOWEST_NUMBER:
            return array("q", [self.number(name) for name in ids])
        return numbers

    def number(self, name: Hashable) -> int:
        """Return the number of an id: itself, or one from a range that no such number lies in."""
        if isinstance(name, int) and LOWEST_NUMBER <= name < 2**63:
            return name
        return self._names.setdefault(name, FIRST_NAME + len(self._names))

    def _flush(self) -> None:
        counts = np.frombuffer(self._counts, np.int64)
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        lengths = np.frombuffer(self._lengths, np.int64).reshape(-1, 3)
        self._columns.extend(
            times=np.frombuffer(self._times, np.float64),
            input_tokens=lengths[:, 0].copy(),
            output_tokens=lengths[:, 1].copy(),
            sessions=lengths[:, 2].copy(),
            counts=counts,
            ids=self._interner.intern(
                np.frombuffer(self._raw_ids, np.int64), offsets, np.frombuffer(self._roots, np.int32)
            ),
        )
        self._clear()

    def close(self) -> None:
        """Give up: remove what lies on disk."""
        self._columns.close()

    def finish(self, *, name: str, format: str, block_tokens: int, has_content: bool, num_skipped: int) -> Trace:
        """Return the trace, sorted by time, from second 0 on.

        Raises
        ------
        BadRecord
            There is no request.
        """
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
        counts = arrays.pop("counts")
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
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

    def _late(self, times: npt.NDArray[np.float64], name: str) -> int:
        if not self.in_order:
            return 0
        late = int(np.count_nonzero(times < np.maximum.accumulate(times)))
        logger.warning("%s: %d of %d timestamps go backwards; the requests were sorted", name, late, len(times))
        return late

    def _sort(self, arrays: dict[str, npt.NDArray[Any]], parents: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Sort the requests by time, equal times in the order of the file; return the parents in new numbers."""
        order = np.argsort(arrays["times"], kind="stable")
        moved = self._columns.empty("moved_ids", arrays["ids"])
        parents = reorder_ids(order, arrays["counts"], arrays["ids"], parents, moved)
        arrays["ids"] = moved
        for column in ("times", "input_tokens", "output_tokens", "sessions", "counts"):
            arrays[column][:] = arrays[column][order]
        renumber_sessions(arrays["sessions"])
        return parents
