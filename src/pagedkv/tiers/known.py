"""What a tier that does not answer at once is known to have, so that what it has is not copied for it again."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import xxhash

MOST_KNOWN = 4096
"""Texts that are remembered of a tier."""


def chain_of(ids: Any, cache_salt: str, block_size: int) -> list[bytes]:
    """Return a digest of each leading part of a text that ends with a block."""
    digest = xxhash.xxh3_128(repr(cache_salt).encode(errors="surrogatepass"))
    tokens = np.asarray(ids, np.int64).tobytes()
    chain = []
    for start in range(0, len(tokens) // (8 * block_size) * 8 * block_size, 8 * block_size):
        digest.update(tokens[start : start + 8 * block_size])
        chain.append(digest.digest())
    return chain


class KnownTexts:
    """How many blocks of texts a tier had when it last answered. It may have given up some since then: whoever stores
    what lies behind them is told so by the tier. Any thread may use it.

    Parameters
    ----------
    most : int
        Texts to remember; the one that was heard of longest ago is forgotten.
    """

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._ends: dict[bytes, None] = {}
        self._lock = threading.Lock()

    def note(self, chain: list[bytes], count: int) -> None:
        """Note that the tier has so many leading blocks of a text, and no more."""
        with self._lock:
            for end in chain[max(0, count - 1) :]:
                self._ends.pop(end, None)
            if count:
                self._ends[chain[count - 1]] = None
            if len(self._ends) > self._most:
                del self._ends[next(iter(self._ends))]

    def leading(self, chain: list[bytes]) -> int:
        """Return how many leading blocks of a text it is known to have."""
        with self._lock:
            return next((count for count in range(len(chain), 0, -1) if chain[count - 1] in self._ends), 0)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._ends.clear()
