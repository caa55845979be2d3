"""RequestNames: what the engine calls the requests, so that operators and clients speak of the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

__all__ = ["RequestNames"]


class RequestNames:
    """Hands out the ids of answers as names for the engine, each to one request at a time.

    An id is the client's to choose (the header x-request-id), so it may come twice. What is appended here cannot be
    part of such an id: ``~2`` where it is in use already, ``/0``, ``/1`` … where a request has several prompts.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()

    @contextmanager
    def taken(self, name: str, prompts: int) -> Iterator[list[str]]:
        """Hold a name for each prompt of a request for as long as the body runs."""
        candidates = (name if turn == 1 else f"{name}~{turn}" for turn in count(1))
        chosen = next(candidate for candidate in candidates if candidate not in self._used)
        self._used.add(chosen)
        try:
            yield [chosen] if prompts == 1 else [f"{chosen}/{place}" for place in range(prompts)]
        finally:
            self._used.discard(chosen)
