"""Namespaces: every cache_salt is a root of the prefix index of its own, so isolation is structural."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from pagedkv.control.state import State
from pagedkv.errors import bad_argument


def checked_salt(cache_salt: Any) -> str:
    """Return the salt; what is no str is InvalidOperation."""
    if not isinstance(cache_salt, str):
        raise bad_argument("cache_salt", "a str", f"{cache_salt!r}")
    return cache_salt


def name_of(cache_salt: str) -> int:
    """Return a 32-bit number for a salt that stays the same when the salt comes back under another number."""
    return int.from_bytes(blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=4).digest(), signed=True)


class Namespaces:
    """Numbers for salts. A number is used again once no block and no sequence belongs to it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._salts: dict[int, str] = {}
        self._spare: list[int] = []
        self._sweep_at = 16

    def find(self, cache_salt: str) -> int | None:
        """Return the number of a salt that is in use, else None."""
        return self._numbers.get(checked_salt(cache_salt))

    def salt_of(self, number: int) -> str:
        """Return the salt behind a number."""
        return self._salts[number]

    def enter(self, cache_salt: str, state: State) -> int:
        """Return the number of a salt, a new one if need be; the caller makes room for it in the roots."""
        number = self._numbers.get(checked_salt(cache_salt))
        if number is not None:
            return number
        if len(self._numbers) >= self._sweep_at:
            self._sweep(state)
        number = self._spare.pop() if self._spare else len(self._numbers)
        self._numbers[cache_salt] = number
        self._salts[number] = cache_salt
        return number

    def _sweep(self, state: State) -> None:
        """Let go of the salts that nothing belongs to; each sweep pays for the next one to come at twice the size."""
        for salt, number in list(self._numbers.items()):
            if state.roots[number, 0] == 0 and state.roots[number, 2] == 0:
                del self._numbers[salt], self._salts[number]
                self._spare.append(number)
        self._sweep_at = max(16, 2 * len(self._numbers))
