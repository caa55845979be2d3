"""A tier of your own: blocks beyond the pool in an SQLite file, found again by the next process.

Five methods, none of which waits: each answers with a future. Each block is kept under a hash of all token ids up to
its end, of the salt and of the model, and is verified as it is read: what cannot be given is a miss.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedkv.engine import LLM, SamplingParams
from pagedkv.models import shipped_model_path
from pagedkv.tiers import BlockFormat
from pagedkv.typing import TokenIds


class SqliteTier:
    medium = "DISK"

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)  # the connection belongs to it
        self._path = path

    def open(self, block: BlockFormat) -> SqliteTier:
        """Learn which model's blocks these are; an engine calls it."""
        self._block = block
        self._thread.submit(self._connect).result()
        return self

    def _connect(self) -> None:
        self._db = sqlite3.connect(self._path)
        self._db.execute("CREATE TABLE IF NOT EXISTS blocks (key BLOB PRIMARY KEY, check_sum BLOB, bytes BLOB)")

    def _keys(self, token_ids: TokenIds, cache_salt: str) -> list[bytes]:
        """Return the key of every whole block: each goes on from the one before it."""
        size, ids = self._block.block_size, np.asarray(token_ids, np.int64)
        sofar, keys = hashlib.sha256(f"{self._block}\0{cache_salt}".encode()), []
        for start in range(0, len(ids) - size + 1, size):
            sofar.update(ids[start : start + size].tobytes())
            keys.append(sofar.digest())
        return keys

    def _read(self, key: bytes) -> bytes | None:
        row = self._db.execute("SELECT check_sum, bytes FROM blocks WHERE key = ?", (key,)).fetchone()
        return row[1] if row and hashlib.sha256(row[1]).digest() == row[0] else None

    def _count(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if self._read(key) is None), len(keys))

    def match(self, token_ids: TokenIds, cache_salt: str = "") -> Future[int]:
        return self._thread.submit(self._count, self._keys(token_ids, cache_salt))

    def load(self, token_ids: TokenIds, rows: npt.NDArray[np.uint8], cache_salt: str = "") -> Future[int]:
        def read() -> int:
            for place, key in enumerate(keys[len(keys) - len(rows) :]):
                found = self._read(key)
                if found is None:
                    return place
                rows[place] = np.frombuffer(found, np.uint8)
            return len(rows)

        keys = self._keys(token_ids, cache_salt)
        return self._thread.submit(read)

    def store(self, token_ids: TokenIds, rows: npt.NDArray[np.uint8], cache_salt: str = "") -> Future[int]:
        def write() -> int:
            first = len(keys) - len(rows)
            if self._count(keys[:first]) == first:  # blocks before those of `rows` must be there
                kept = [(k, hashlib.sha256(r).digest(), r.tobytes()) for k, r in zip(keys[first:], rows, strict=True)]
                with self._db:
                    self._db.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", kept)
            return self._count(keys)

        keys = self._keys(token_ids, cache_salt)
        return self._thread.submit(write)

    def clear(self) -> None:
        self._thread.submit(lambda: self._db.execute("DELETE FROM blocks").connection.commit()).result()

    def close(self) -> None:
        self._thread.submit(lambda: self._db.close()).result()
        self._thread.shutdown()


def main() -> list[int]:
    prompt = "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot = items[0]\n"
    params, cached = SamplingParams(max_tokens=8), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second engine knows nothing but the file
            llm = LLM(str(shipped_model_path()), num_blocks=64, block_size=4, tiers=[SqliteTier(Path(folder, "kv.db"))])
            (output,) = llm.generate(prompt, params)
            llm.close()
            cached.append(output.num_cached_tokens)
            print(f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were there")
    return cached


if __name__ == "__main__":
    main()
