"""A bounded store that owners share: what does not fit any more is the oldest of the owner that has most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[V]):
    value: V
    parts: Mapping[Hashable, int]


class FairStore(Generic[V]):
    """Values by owner and key, each made of parts; a part that several values of an owner have counts once.

    Parameters
    ----------
    most : int
        What all parts together may count.

    Attributes
    ----------
    used : int
        What they count.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._entries: dict[str, dict[Hashable, _Entry[V]]] = {}  # of each owner the oldest first
        self._parts: dict[str, Counter[Hashable]] = {}  # how many of an owner's values have a part
        self._used_by: Counter[str] = Counter()

    def get(self, owner: str, key: Hashable) -> V | None:
        """Return an owner's value; None if there is none."""
        entry = self._entries.get(owner, {}).get(key)
        return None if entry is None else entry.value

    def items(self, owner: str) -> list[tuple[Hashable, V]]:
        """Return all keys and values of an owner, the oldest first."""
        return [(key, entry.value) for key, entry in self._entries.get(owner, {}).items()]

    def owners(self) -> list[str]:
        """Return who has values."""
        return list(self._entries)

    def put(self, owner: str, key: Hashable, value: V, parts: Mapping[Hashable, int]) -> list[V]:
        """Store a value, as the newest of its owner, and return those that had to go, which may be itself.

        Parameters
        ----------
        owner : str
        key : hashable
            One that the owner has not.
        value : object
        parts : mapping
            What it is made of, and what each of them counts.
        """
        self._entries.setdefault(owner, {})[key] = _Entry(value, parts)
        counts = self._parts.setdefault(owner, Counter())
        for part, size in parts.items():
            counts[part] += 1
            if counts[part] == 1:
                self._count(owner, size)
        gone: list[V] = []
        while self.used > self.most:
            richest = max(self._entries, key=lambda other: self._used_by[other])
            oldest = self.pop(richest, next(iter(self._entries[richest])))
            gone += [] if oldest is None else [oldest]
        return gone

    def pop(self, owner: str, key: Hashable) -> V | None:
        """Take a value out and return it; None if there is none."""
        entries = self._entries.get(owner, {})
        entry = entries.pop(key, None)
        if entry is None:
            return None
        counts = self._parts[owner]
        for part, size in entry.parts.items():
            counts[part] -= 1
            if not counts[part]:
                del counts[part]
                self._count(owner, -size)
        if not entries:
            del self._entries[owner], self._parts[owner], self._used_by[owner]
        return entry.value

    def _count(self, owner: str, size: int) -> None:
        self.used += size
        self._used_by[owner] += size
