"""Tiers that a user might write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np


class DictTier:
    """Five methods over a dict, by the token ids themselves; a thread answers, as over a network."""

    medium = "REMOTE"

    def __init__(self, block_size, limit=10**9):
        self.block_size, self.limit, self.blocks = block_size, limit, {}
        self.thread = ThreadPoolExecutor(1)

    def _keys(self, token_ids, cache_salt):
        ids = [int(token) for token in token_ids]
        count = len(ids) // self.block_size
        return [(cache_salt, tuple(ids[: (i + 1) * self.block_size])) for i in range(count)]

    def _count(self, keys):
        return next((i for i, key in enumerate(keys) if key not in self.blocks), len(keys))

    def _load(self, keys, rows):
        first, count = len(keys) - len(rows), self._count(keys)
        for i in range(first, count):
            rows[i - first] = self.blocks[keys[i]]
        return max(0, count - first)

    def _store(self, keys, rows):
        first = len(keys) - len(rows)
        for i in range(first, len(keys)):
            if self._count(keys) == i and len(self.blocks) < self.limit:
                self.blocks[keys[i]] = rows[i - first].copy()
        return self._count(keys)

    def match(self, token_ids, cache_salt=""):
        return self.thread.submit(self._count, self._keys(token_ids, cache_salt))

    def load(self, token_ids, rows, cache_salt=""):
        return self.thread.submit(self._load, self._keys(token_ids, cache_salt), rows)

    def store(self, token_ids, rows, cache_salt=""):
        return self.thread.submit(self._store, self._keys(token_ids, cache_salt), rows)

    def clear(self):
        self.thread.submit(self.blocks.clear).result()

    def close(self):
        self.thread.shutdown()


class ListSlots:
    """Slots for a BookTier: a list of bytes."""

    medium, is_read_only = "REMOTE", False

    def __init__(self, num_slots):
        self.slots = [b""] * num_slots

    def open(self, block):
        from pagedkv.tiers.book_tier import Kept

        return Kept(len(self.slots), None, (), np.zeros(len(self.slots), np.uint64))

    def name_of_salt(self, cache_salt):
        return cache_salt

    def read(self, slots, rows, places):
        for slot, place in zip(slots, places, strict=True):
            rows[place] = np.frombuffer(self.slots[slot], np.uint8)

    def write(self, slots, rows, places):
        for slot, place in zip(slots, places, strict=True):
            self.slots[slot] = rows[place].tobytes()

    def prepared(self, entries):
        return None

    def forget(self):
        pass

    def close(self, blocks):
        pass
