"""Requests on their way to replicas, and what the router of a fleet shares with its door."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.fleet import FleetRouter, FleetSubscriber, FleetView, RoutedRequest, RoutingPolicy
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
    routed : RoutedRequest, optional
        What the router said, as long as it counts as running there.
    """

    asked: Asked
    avoid: Collection[str] = ()
    replica: str = ""
    routed: RoutedRequest | None = None

    def __reduce__(self) -> Any:
        return Sent, (self.asked,)


class Fleet:
    """The replicas that are ready, and which of them requests go to; any thread may call it.

    Parameters
    ----------
    router : FleetRouter, optional
        Without one requests go to whoever stands first.
    subscriber : FleetSubscriber, optional
        What feeds the router's view.
    """

    def __init__(self, router: FleetRouter | None = None, subscriber: FleetSubscriber | None = None) -> None:
        self._router, self._subscriber = router, subscriber
        self._ready: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def ready(self) -> tuple[str, ...]:
        """The replicas that take requests."""
        return self._ready

    def order(self, sent: Sent, names: Sequence[str]) -> list[str]:
        """Return the replicas in the order in which they are to be asked; the first one counts as taken."""
        if self._router is None:
            return list(names)
        self.done(sent)
        with self._lock:
            routed = self._router.route(sent.asked.token_ids.tolist(), names, cache_salt=sent.asked.cache_salt)
            sent.routed, sent.replica = routed, routed.replicas[0]
            self._router.sent(routed, sent.replica)
        return list(routed.replicas)

    def went(self, sent: Sent, replica: str) -> None:
        """Note where a request went in the end."""
        if sent.replica == replica:
            return
        routed = sent.routed
        self.done(sent)
        with self._lock:
            sent.routed, sent.replica = routed, replica
            if self._router is not None and routed is not None:
                self._router.sent(routed, replica)

    def done(self, sent: Sent) -> None:
        """Note that a request is over, however it ended."""
        with self._lock:
            if self._router is not None and sent.routed is not None:
                self._router.done(sent.replica)
            sent.routed = None

    def update(self, replicas: Mapping[str, Mapping[str, str]]) -> None:
        """Take note of the replicas that there are, and of where each publishes its KV events."""
        with self._lock:
            before, self._ready = self._ready, tuple(replicas)
            for name in set(before) - set(replicas):
                if self._router is not None:
                    self._router.forget(name)
                if self._subscriber is not None:
                    self._subscriber.unfollow(name)
            for name in set(replicas) - set(before):
                addresses = replicas[name]
                if self._subscriber is not None and addresses.get("events"):
                    self._subscriber.follow(name, addresses["events"], addresses["replay"])

    def route_by(self, routing: str | RoutingPolicy) -> None:
        """Route by another policy from here on; what is known of the replicas stays, what they were given does not."""
        with self._lock:
            if self._router is not None:
                self._router = FleetRouter(routing, self._router.view)

    def close(self) -> None:
        """Hear no more events."""
        if self._subscriber is not None:
            self._subscriber.close()


def routed_fleet(routing: str | RoutingPolicy, block_size: int) -> Fleet:
    """Return a fleet whose requests a policy routes, by what the KV events of its replicas tell.

    Parameters
    ----------
    routing : str or RoutingPolicy
    block_size : int
        Of the engines, in tokens.
    """
    view = FleetView(block_size)
    return Fleet(FleetRouter(routing, view), FleetSubscriber(view))


fleets: dict[str, Fleet] = {}
"""Of this process, by the names of their apps."""


def fleet_of(app: str) -> Fleet:
    """Return what the router of an app shares with its door; in another process one that is shared with nobody."""
    return fleets.get(app) or Fleet()
