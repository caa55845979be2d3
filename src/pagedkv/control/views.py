"""The views that strategies score: the fields of many records as arrays, by the names of KvBlock and SequenceInfo."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation

__all__ = ["BlockView", "SequenceView"]


class _Column:
    """One field of the records under a view, as an array."""

    def __init__(self, field_name: str, doc: str) -> None:
        self._field = field_name
        self.__doc__ = doc

    def __get__(self, view: _RecordView, owner: type | None = None) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = view._records[self._field]
        return column


class _RecordView:
    __slots__ = ("_ids", "_records")

    def __init__(self, records: npt.NDArray[np.void], ids: npt.NDArray[Any]) -> None:
        self._records = records
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)


class BlockView(_RecordView):
    """Cached blocks to be scored, each field an array ``[n]``."""

    last_access = _Column("last_access", "tick of the last use")
    access_count = _Column("access_count", "how many sequences used the block")
    num_tokens = _Column("num_tokens", "tokens stored")
    ref_count = _Column("ref_count", "how many sequences hold the block")
    priority = _Column("priority", "highest priority of a sequence that used it")
    depth = _Column("depth", "blocks before it in its prefix")
    created = _Column("created", "tick at which it was filled")
    num_children = _Column("num_children", "blocks that continue it in the index")

    __slots__ = ("_paths",)

    def __init__(
        self, records: npt.NDArray[np.void], ids: npt.NDArray[Any], paths: npt.NDArray[np.int64] | None = None
    ) -> None:
        super().__init__(records, ids)
        self._paths = paths

    @property
    def id(self) -> npt.NDArray[np.int32]:
        """The ids of the blocks, ``block_id`` by the name that ``KvBlock`` has for it."""
        return self._ids

    @property
    def block_id(self) -> npt.NDArray[np.int32]:
        """The ids of the blocks."""
        return self._ids

    @property
    def path(self) -> npt.NDArray[np.int64]:
        """A number for the content of each block and of all that precedes it, for strategies with hooks."""
        if self._paths is None:
            raise InvalidOperation("path is kept for strategies with hooks (StrategyHooks) only")
        return self._paths


class SequenceView(_RecordView):
    """Live sequences to be scored, each field an array ``[n]``."""

    last_access = _Column("last_access", "tick of the last access")
    access_count = _Column("access_count", "number of accesses")
    num_tokens = _Column("num_tokens", "visible tokens")
    num_blocks = _Column("num_blocks", "blocks held")
    num_cached_tokens = _Column("num_cached", "tokens found cached at allocation")
    num_committed_tokens = _Column("num_committed", "leading tokens whose K and V are written")
    num_dropped_tokens = _Column("num_dropped", "tokens that streaming gave up")
    priority = _Column("priority", "the sequence's priority")
    created = _Column("created", "tick of the allocation")

    @property
    def seq_id(self) -> npt.NDArray[np.uint64]:
        """The ids of the sequences."""
        ids: npt.NDArray[np.uint64] = self._records["seq_id"].view(np.uint64)
        return ids
