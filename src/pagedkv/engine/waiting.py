"""The queue of what waits for its turn: by priority, then by arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from pagedkv.engine.request import Branch

__all__ = ["WaitingQueue"]


def _rank(branch: Branch) -> tuple[int, int, int]:
    return branch.rank


class WaitingQueue:
    """Branches in the order of their rank. A preempted branch keeps its rank: it goes before whoever came later."""

    def __init__(self) -> None:
        self._branches: list[Branch] = []

    def add(self, branch: Branch) -> None:
        """Put a branch in its place, O(log n) comparisons."""
        insort(self._branches, branch, key=_rank)

    def remove(self, branch: Branch) -> None:
        """Take a branch out."""
        place = bisect_left(self._branches, branch.rank, key=_rank)
        while self._branches[place] is not branch:
            place += 1
        del self._branches[place]

    def __len__(self) -> int:
        return len(self._branches)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._branches)
