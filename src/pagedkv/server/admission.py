"""Admission control: how many sequences may be under way at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pagedkv.server.errors import ApiError


class Admission:
    """Counts the sequences that are under way and turns away those beyond the limit.

    Parameters
    ----------
    running : int
        Sequences that the engine runs at once.
    waiting : int
        Sequences that may wait beside them.

    Attributes
    ----------
    inside : int
        Sequences that are under way.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.running, self.waiting = running, waiting
        self.inside = 0
        self._seconds = 1.0

    @property
    def limit(self) -> int:
        """The most sequences that may be under way."""
        return self.running + self.waiting

    @property
    def retry_after(self) -> float:
        """Seconds after which there may be room: what a request takes of late, for each round of those that wait."""
        rounds = max(1.0, (self.inside - self.running) / self.running)
        return min(60.0, max(1.0, self._seconds * rounds))

    @contextmanager
    def entered(self, sequences: int) -> Iterator[None]:
        """Hold places for as long as the body runs.

        Raises
        ------
        ApiError
            429: there is no room now. 400: there never is.
        """
        if sequences > self.limit:
            raise ApiError(
                400,
                f"the request asks for {sequences} texts, the server takes at most {self.limit} at a time",
                code="too_many_sequences",
            )
        if self.inside + sequences > self.limit:
            raise ApiError(
                429,
                f"the server is busy: {self.inside} texts are under way and at most {self.limit} may be",
                code="queue_full",
                retry_after=self.retry_after,
            )
        self.inside += sequences
        try:
            yield
        finally:
            self.inside -= sequences

    def took(self, seconds: float) -> None:
        """Learn how long a request took."""
        self._seconds += 0.1 * (seconds - self._seconds)
