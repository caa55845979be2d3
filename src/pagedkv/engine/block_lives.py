"""How long cached blocks live, how long they idle before they are given up, and how soon they are used again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import BlockManager, read_blocks

__all__ = ["BlockLives", "LifeSamples"]

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LifeSamples:
    """What was learned since the last look, in seconds.

    Attributes
    ----------
    lifetimes : float64
        Of blocks that can no longer be found: from being stored until then.
    idle_before_evict : float64
        Of the same blocks: from the last use until then.
    reuse_gaps : float64
        Between two uses of a block by different sequences.
    """

    lifetimes: Seconds
    idle_before_evict: Seconds
    reuse_gaps: Seconds


class BlockLives:
    """Follows a sample of the blocks by looking at them now and then; times are as exact as the looks are frequent.

    Parameters
    ----------
    cache : BlockManager
    most : int
        Blocks in the sample, spread evenly over the pool.
    """

    def __init__(self, cache: BlockManager, most: int = 1024) -> None:
        self._cache = cache
        self._ids = np.unique(np.linspace(0, max(0, cache.total_blocks - 1), min(most, cache.total_blocks), dtype=int))
        size = len(self._ids)
        self._lives = np.zeros(size, bool)
        self._created, self._last_access, self._uses = (np.zeros(size, np.int64) for _ in range(3))
        self._born, self._touched = np.zeros(size), np.zeros(size)

    def look(self, now: float) -> LifeSamples:
        """Compare with the last look; `now` is in seconds of any steady clock."""
        records = read_blocks(self._cache, self._ids)
        lives, created, uses = records["indexed"] != 0, records["created"], records["access_count"]
        goes_on = self._lives & lives & (created == self._created)
        ended, begun = self._lives & ~goes_on, lives & ~goes_on
        reused = goes_on & (uses > self._uses)
        samples = LifeSamples(
            lifetimes=now - self._born[ended],
            idle_before_evict=now - self._touched[ended],
            reuse_gaps=now - self._touched[reused],
        )
        self._born[begun] = now
        self._touched[begun | (goes_on & (records["last_access"] > self._last_access))] = now
        self._lives = lives
        self._created, self._uses, self._last_access = created, uses, records["last_access"]
        return samples
