"""Where the requests of a fleet go: a policy, a view of what is cached, and what was sent where so far."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pagedkv.errors import bad_argument
from pagedkv.fleet.routing import (
    COMMON,
    NO_HOME,
    Candidates,
    RecentLoad,
    RoutingPolicy,
    RoutingRequest,
    parse_routing,
    route,
)
from pagedkv.fleet.view import BlockHash, FleetView, prefix_hashes
from pagedkv.validate import require_int

MAX_HOMES = 500_000
"""Blocks of which a router remembers where they were sent last, about 100 bytes each."""


@dataclass(frozen=True, eq=False)
class RoutedRequest:
    """The replicas that should be asked to serve a request.

    Attributes
    ----------
    replicas : tuple of str
        All candidates, the best first.
    matched : dict of str to int
        Leading tokens that each has cached, as far as is known.
    tokens : int
        Of the prompt.
    """

    replicas: tuple[str, ...]
    matched: dict[str, int]
    tokens: int
    _hashes: list[BlockHash] = field(repr=False)


@dataclass(slots=True)
class _Home:
    """Where a block went last, and how many different blocks came behind it."""

    replica: str
    branches: int = 0


class FleetRouter:
    """Routes requests to replicas by name, and remembers what a policy wants to know of them.

    Parameters
    ----------
    routing : str or RoutingPolicy
        A name of `routing_names`, ``module:Class``, or an object.
    view : FleetView
        What the replicas have cached; its block size is that of the replicas.
    memory : float
        What is left of the load of a replica after a request of the fleet, in 0 … 1: .995 halves it in 138 requests.

    Notes
    -----
    Home of a request is the replica to which the deepest of its known blocks went last. Where two texts or more for
    each replica went on differently behind that block, conversations have this beginning in common and there is no
    home: new ones go where there is room. A new replica begins with the mean load of the others. It is to be used in
    one thread at a time.

    Examples
    --------
    >>> routed = router.route(token_ids, ["a", "b"])  # doctest: +SKIP
    >>> router.sent(routed, routed.replicas[0])  # doctest: +SKIP
    >>> router.done(routed.replicas[0])  # doctest: +SKIP
    """

    def __init__(self, routing: str | RoutingPolicy, view: FleetView, *, memory: float = 0.995) -> None:
        self._policy, self._view = parse_routing(routing), view
        self._load = RecentLoad(memory)
        self._running: Counter[str] = Counter()
        self._homes: OrderedDict[BlockHash, _Home] = OrderedDict()  # what was sent last stands at the end
        self._number = 0

    @property
    def view(self) -> FleetView:
        """What the replicas have cached."""
        return self._view

    def running(self, replica: str) -> int:
        """Return how many requests were sent to a replica and are not done."""
        return self._running[replica]

    def route(
        self,
        token_ids: Sequence[int],
        replicas: Sequence[str],
        *,
        cache_salt: str = "",
        queue: Sequence[int] | None = None,
    ) -> RoutedRequest:
        """Say which replica should serve a prompt; nothing counts as sent yet.

        Parameters
        ----------
        token_ids : sequence of int
        replicas : sequence of str
            Those that can serve it, each once.
        cache_salt : str
        queue : sequence of int, optional
            Requests that wait at each; without it what was sent to each and is not done.

        Returns
        -------
        RoutedRequest

        Raises
        ------
        InvalidOperation
            If there is no replica, one stands there twice, `queue` has another length, or the policy gives no order.
        """
        names = tuple(replicas)
        if not names or len(set(names)) != len(names):
            raise bad_argument("replicas", "at least one, and each once", f"{list(names)}")
        waiting = self._waiting(names, queue)
        hashes = prefix_hashes(token_ids, self._view.block_size, cache_salt)
        matched = self._view.matched(hashes, names)
        home = self._home(hashes, len(names))
        request = RoutingRequest(self._number, len(token_ids), names.index(home) if home in names else NO_HOME)
        load = self._load.of(names)
        order = route(self._policy, request, Candidates(matched, load, waiting))
        found = dict(zip(names, matched.sum(axis=1).tolist(), strict=True))
        return RoutedRequest(tuple(names[place] for place in order), found, len(token_ids), hashes)

    def sent(self, routed: RoutedRequest, replica: str) -> None:
        """Count a request as sent to a replica, again if another one failed to serve it.

        Raises
        ------
        InvalidOperation
            If the replica was no candidate.
        """
        if replica not in routed.matched:
            raise bad_argument("replica", f"one of {list(routed.replicas)}", replica)
        self._number += 1
        self._load.add(replica, routed.tokens - routed.matched[replica])
        self._running[replica] += 1
        above = None
        for block in routed._hashes:
            home = self._homes.get(block)
            if home is None:
                home = self._homes[block] = _Home(replica)
                if above is not None:
                    above.branches += 1
            home.replica = replica
            self._homes.move_to_end(block)
            above = home
        while len(self._homes) > MAX_HOMES:
            self._homes.popitem(last=False)

    def done(self, replica: str) -> None:
        """Count a request that was sent to a replica as over, however it ended."""
        if self.running(replica):
            self._running[replica] -= 1

    def forget(self, replica: str) -> None:
        """Drop the load of a replica that is gone, as its view does what it has cached."""
        self._load.forget(replica)
        self._running.pop(replica, None)

    def _waiting(self, names: tuple[str, ...], queue: Sequence[int] | None) -> npt.NDArray[np.int64]:
        if queue is None:
            return np.array([self.running(name) for name in names], np.int64)
        if len(queue) != len(names):
            raise bad_argument("queue", f"one number for each of {len(names)} replicas", f"{len(queue)}")
        return np.array([require_int("queue", each) for each in queue], np.int64)

    def _home(self, hashes: list[BlockHash], replicas: int) -> str | None:
        """Return where the deepest block that was ever sent went last, if it is of one conversation."""
        home = next((self._homes[block] for block in reversed(hashes) if block in self._homes), None)
        return home.replica if home is not None and home.branches < COMMON * replicas else None
