"""SequenceBatch: the sequences behind the rows of one ``generate()`` call, and what is known of their token ids."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import BlockManager
from pagedkv.control.plan import BatchPlan
from pagedkv.errors import InvalidOperation, OutOfMemory

__all__ = ["SequenceBatch"]

Ids = npt.NDArray[np.int64]


class SequenceBatch:
    """One sequence of the manager for each row of the batch, all of one length.

    Parameters
    ----------
    manager : BlockManager
    cache_salt : str
        Given to every sequence.
    """

    def __init__(self, manager: BlockManager, cache_salt: str) -> None:
        self._manager = manager
        self._salt = cache_salt
        self._numbers = itertools.count()
        self._clear()

    def _clear(self) -> None:
        self.seq_ids: Ids = np.empty(0, np.int64)
        self.length = 0
        self._is_known = np.empty(0, bool)  # rows that may be given ids: no padding
        self._coming: Ids | None = None  # [rows, n]: ids of the next tokens

    def __len__(self) -> int:
        return len(self.seq_ids)

    def start(self, ids: Ids, is_padded: npt.NDArray[np.bool_]) -> int:
        """Begin a sequence for each row with what is cached of its ids; returns how many tokens all rows have cached.

        One number has to hold for the whole batch, so longer matches are cut to the shortest one.
        """
        rows, width = ids.shape
        reused = 0
        if rows and width and not is_padded.any():
            reused = min(self._manager.match_prefix(row, self._salt) for row in ids)
        try:
            for row in ids:
                # One token more than is cached, because allocate never counts the last one as cached.
                info = self._open(row[: reused + 1] if reused else 0)
                reused = min(reused, info.num_cached_tokens)
            for seq_id in self.seq_ids.tolist():
                self._manager.truncate(seq_id, min(reused, self._manager.get_sequence(seq_id).num_tokens))
        except OutOfMemory:
            self.release()
            raise
        self.length = reused
        self._is_known = ~is_padded
        self._coming = ids[:, reused:]
        return reused

    def expect(self, ids: Ids) -> None:
        """Tell the ids [rows, n] of the next tokens to come."""
        self._coming = ids

    def forget(self) -> None:
        """Store tokens by count from here on."""
        self._is_known[:] = False

    def grow(self, rows: int, num_tokens: int) -> BatchPlan:
        """Make room for `num_tokens` new tokens in each of `rows` rows; all or nothing."""
        if not len(self):
            self._open_rows(rows)
        elif rows != len(self):
            self._repeat_to(rows)
        coming = self._take_coming(rows, num_tokens)
        try:
            plan = self._append(coming, num_tokens)
        except OutOfMemory as error:
            size = self._manager.block_size
            total = rows * -(-(self.length + num_tokens) // size)
            hint = f"{rows} sequences of {self.length + num_tokens} tokens take {total} blocks of {size} tokens"
            if not self.length:
                self.release()
            raise OutOfMemory(error.requested, error.available, hint) from None
        self.length += num_tokens
        self._coming = None if self._coming is None else self._coming[:, num_tokens:]
        return plan

    def _append(self, coming: Ids, num_tokens: int) -> BatchPlan:
        known = self._is_known if coming.shape[1] else np.zeros(len(self), bool)
        if not known.any():
            return self._manager.append_batch(self.seq_ids, num_tokens)
        if known.all() and coming.shape[1] == num_tokens:
            return self._manager.append_batch(self.seq_ids, coming)
        return self._append_mixed(coming, known, num_tokens)

    def _append_mixed(self, coming: Ids, known: npt.NDArray[np.bool_], num_tokens: int) -> BatchPlan:
        """Append ids where they are known, a count for the rest."""
        try:
            self._manager.append_batch(self.seq_ids[known], coming[known])
            counts = np.where(known, num_tokens - coming.shape[1], num_tokens)
            self._manager.append_batch(self.seq_ids, counts)
        except OutOfMemory:
            for seq_id in self.seq_ids.tolist():
                self._manager.truncate(seq_id, self.length)
            raise
        return self._manager.plan(self.seq_ids, num_tokens)

    def _take_coming(self, rows: int, num_tokens: int) -> Ids:
        if self._coming is None:
            return np.empty((rows, 0), np.int64)
        if len(self._coming) != rows:
            raise InvalidOperation(f"token ids: expected {rows} rows as the keys have, got {len(self._coming)}")
        expected = self._coming.shape[1]
        if self.length and 0 < expected < num_tokens:
            raise InvalidOperation(
                f"keys: expected at most the {expected} tokens of the prompt that are not cached, got {num_tokens}: "
                "assisted decoding hands over the whole prompt, use pagedkv.hf.generate()"
            )
        return np.ascontiguousarray(self._coming[:, :num_tokens])

    def select(self, rows: Ids) -> None:
        """Let row ``i`` go on as the old row ``rows[i]``: forks where a row is taken twice, nothing is copied."""
        taken: set[int] = set()
        chosen = []
        for row in rows.tolist():
            seq_id = int(self.seq_ids[row])
            if row in taken:
                twin = self._next_number()
                self._manager.fork(seq_id, twin)
                seq_id = twin
            taken.add(row)
            chosen.append(seq_id)
        for row in set(range(len(self))) - taken:
            self._manager.free(int(self.seq_ids[row]))
        self.seq_ids = np.array(chosen, np.int64)
        self._is_known = self._is_known[rows]
        self._coming = None if self._coming is None else self._coming[rows]

    def truncate(self, num_tokens: int) -> None:
        """Take back every token from position `num_tokens` on."""
        for seq_id in self.seq_ids.tolist():
            self._manager.truncate(seq_id, num_tokens)
        self.length = num_tokens
        self._coming = None

    def release(self) -> None:
        """Free every sequence."""
        for seq_id in self.seq_ids.tolist():
            if seq_id in self._manager:  # the caller may have freed or evicted it
                self._manager.free(seq_id)
        self._clear()

    def _open(self, tokens: Any) -> Any:
        number = self._next_number()
        info = self._manager.allocate(number, tokens, cache_salt=self._salt)
        self.seq_ids = np.append(self.seq_ids, number)
        return info

    def _open_rows(self, rows: int) -> None:
        for _ in range(rows):
            self._open(0)
        self._is_known = np.zeros(rows, bool)

    def _repeat_to(self, rows: int) -> None:
        """Follow generate(), which repeats every prompt for beams and parallel samples before the first forward."""
        times, rest = divmod(rows, len(self))
        if rest or self._coming is None:
            raise InvalidOperation(f"keys: expected a batch of {len(self)}, as this cache holds, got {rows}")
        coming = self._coming
        if len(coming) == rows:  # told for every row already
            self._coming = None
        self.select(np.repeat(np.arange(len(self)), times))
        self._coming = coming if len(coming) == rows else self._coming

    def _next_number(self) -> int:
        return next(number for number in self._numbers if number not in self._manager)
