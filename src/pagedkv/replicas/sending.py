"""Requests on their way to replicas, and what the router of a fleet shares with its door."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.replicas.messages import Asked


@dataclass(eq=False, slots=True)
class Sent:
    """A request on its way: the replica gets `asked`, the rest is for the router.

    Attributes
    ----------
    asked : Asked
    avoid : collection of str
        Replicas that it does not go to.
    replica : str
        Where it went.
    """

    asked: Asked
    avoid: Collection[str] = ()
    replica: str = ""

    def __reduce__(self) -> Any:
        return Sent, (self.asked,)


class Fleet:
    """The replicas that are ready, and which of them requests go to; any thread may call it."""

    def __init__(self) -> None:
        self._ready: tuple[str, ...] = ()
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def ready(self) -> tuple[str, ...]:
        """The replicas that take requests."""
        return self._ready

    def order(self, sent: Sent, names: Sequence[str]) -> list[str]:
        """Return the replicas in the order in which they are to be asked."""
        with self._lock:
            place = self._turn % len(names)
            self._turn += 1
        return [*names[place:], *names[:place]]

    def routed(self, sent: Sent, replica: str) -> None:
        """Note where a request went."""
        sent.replica = replica

    def done(self, sent: Sent) -> None:
        """Note that a request is over, however it ended."""

    def update(self, replicas: Mapping[str, Mapping[str, str]]) -> None:
        """Take note of the replicas that there are, and of where each publishes its KV events."""
        self._ready = tuple(replicas)


fleets: dict[str, Fleet] = {}
"""Of this process, by the names of their apps."""


def fleet_of(app: str) -> Fleet:
    """Return what the router of an app shares with its door; one that shares it with nobody in another process."""
    return fleets.get(app) or Fleet()
