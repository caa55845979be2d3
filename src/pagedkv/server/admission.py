"""Admission control by tenant: how much of something may be under way at a time, and whose turn is next."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from pagedkv.server.errors import ApiError


class Budget:
    """An amount of something that tenants take and give back: requests, bytes or texts that are under way.

    Parameters
    ----------
    total : int
        What all may have together.
    each : int
        What one tenant may have.

    Attributes
    ----------
    taken : int
        What all have together.
    """

    def __init__(self, total: int, each: int) -> None:
        self.total, self.each = total, each
        self.taken = 0
        self._of: Counter[str] = Counter()

    def has_room(self, amount: int = 1) -> bool:
        """Whether all together may have so much more."""
        return self.taken + amount <= self.total

    def take(self, tenant: str, amount: int = 1) -> bool:
        """Take an amount, if there is so much for this tenant."""
        if not self.has_room(amount) or self._of[tenant] + amount > self.each:
            return False
        self.taken += amount
        self._of[tenant] += amount
        return True

    def give(self, tenant: str, amount: int = 1) -> None:
        """Give an amount back."""
        self.taken -= amount
        self._of[tenant] -= amount
        if not self._of[tenant]:
            del self._of[tenant]


class Admission:
    """Counts the sequences that are under way and turns away those beyond the limits.

    Parameters
    ----------
    running : int
        Sequences that the engine runs at once.
    waiting : int
        Sequences that may wait beside them.
    share : float
        The part of both that one tenant may have.
    """

    def __init__(self, running: int, waiting: int, share: float = 1.0) -> None:
        self.running, self.waiting = running, waiting
        self._places = Budget(running + waiting, max(1, int((running + waiting) * share)))
        self._seconds = 1.0

    @property
    def inside(self) -> int:
        """Sequences that are under way."""
        return self._places.taken

    @property
    def limit(self) -> int:
        """The most sequences that may be under way."""
        return self._places.total

    @property
    def retry_after(self) -> float:
        """Seconds after which there may be room: what a request takes of late, for each round of those that wait."""
        rounds = max(1.0, (self.inside - self.running) / self.running)
        return min(60.0, max(1.0, self._seconds * rounds))

    @contextmanager
    def entered(self, sequences: int, tenant: str = "") -> Iterator[None]:
        """Hold places for as long as the body runs.

        Raises
        ------
        ApiError
            429: there is no room now. 400: there never is.
        """
        most = self._places.each
        if sequences > most:
            raise ApiError(
                400,
                f"the request asks for {sequences} texts, the server takes at most {most} at a time",
                code="too_many_sequences",
            )
        if not self._places.take(tenant, sequences):
            known = f"{self.inside} texts are under way and at most {self.limit} may be"
            if self._places.has_room(sequences):
                known = f"at most {most} texts of one key may be under way"
            raise ApiError(429, f"the server is busy: {known}", code="queue_full", retry_after=self.retry_after)
        try:
            yield
        finally:
            self._places.give(tenant, sequences)

    def took(self, seconds: float) -> None:
        """Learn how long a request took."""
        self._seconds += 0.1 * (seconds - self._seconds)


class Turns:
    """Lets so many in at a time; of those that wait, one of each tenant after the other, round and round.

    Parameters
    ----------
    places : int
        How many may be in.
    each : int
        How many of one tenant.
    """

    def __init__(self, places: int, each: int) -> None:
        self._places, self._each = places, each
        self._inside: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of whose turn it is

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn and hold it for as long as the body runs."""
        await self.enter(tenant)
        try:
            yield
        finally:
            self.leave(tenant)

    async def enter(self, tenant: str) -> None:
        """Wait for a turn; `leave` ends it."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._let_in()
        try:
            await turn
        except BaseException:
            # One whose wait was cancelled may have been let in meanwhile.
            if not turn.cancelled():
                self.leave(tenant)
            elif turn in (line := self._waiting.get(tenant, deque())):
                line.remove(turn)
            raise

    def leave(self, tenant: str) -> None:
        """End a turn."""
        self._inside[tenant] -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._inside.total() < self._places and (tenant := self._next()) is not None:
            line = self._waiting.pop(tenant)
            turn = line.popleft()
            if line:
                self._waiting[tenant] = line  # behind all others
            if not turn.cancelled():
                self._inside[tenant] += 1
                turn.set_result(None)

    def _next(self) -> str | None:
        self._inside = +self._inside
        for tenant, line in list(self._waiting.items()):
            if not line:
                del self._waiting[tenant]
            elif self._inside[tenant] < self._each:
                return tenant
        return None
