"""A minimal block manager out of a dict and a deque, for comparison: what most engines' bookkeeping looks like."""

from __future__ import annotations

from collections import deque

import numpy as np


class DictAndDeque:
    """Block tables as lists in a dict, free blocks in a deque; no prefix index, no eviction, no checks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = deque(range(num_blocks))
        self.ref_counts = [0] * num_blocks
        self.tables: dict[int, list[int]] = {}
        self.num_tokens: dict[int, int] = {}

    def _take(self) -> int:
        block = self.free.popleft()
        self.ref_counts[block] = 1
        return block

    def allocate(self, seq_id: int, num_tokens: int) -> None:
        """Start a sequence."""
        self.tables[seq_id] = [self._take() for _ in range(-(-num_tokens // self.block_size))]
        self.num_tokens[seq_id] = num_tokens

    def append_batch(self, seq_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Add a token to every sequence; returns slots, block tables, lengths and positions."""
        slots, rows, lens = [], [], []
        for seq_id in seq_ids:
            table, position = self.tables[seq_id], self.num_tokens[seq_id]
            if position % self.block_size == 0:
                table.append(self._take())
            self.num_tokens[seq_id] = position + 1
            slots.append(table[-1] * self.block_size + position % self.block_size)
            rows.append(table)
            lens.append(position + 1)
        tables = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for i, row in enumerate(rows):
            tables[i, : len(row)] = row
        seq_lens = np.array(lens, np.int32)
        return np.array(slots), tables, seq_lens, seq_lens.astype(np.int64) - 1
