"""Replay of a trace on a fleet: every replica a control plane of its own, and a policy that routes each request.

The replicas share the capacity in equal parts. The load that policies see is the work that a replica was given lately;
requests come and go at once, so nobody waits and all queues are empty. Home of a request is the replica that served the
deepest of its blocks last, the first block left out, which many conversations have in common.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.control.content_cache import ContentCache
from pagedkv.control.protocol import Strategy
from pagedkv.errors import bad_argument
from pagedkv.fleet.routing import (
    NO_HOME,
    Candidates,
    RecentLoad,
    RoutingPolicy,
    RoutingRequest,
    parse_routing,
    route,
)
from pagedkv.sim.trace import Trace
from pagedkv.validate import require_int

MAX_REPLICAS = 1024


@dataclass(frozen=True)
class Fleet:
    """How many replicas share the capacity, and how requests are routed to them.

    Parameters
    ----------
    replicas : int
        1 … 1024.
    routing : str or RoutingPolicy
        A name of `pagedkv.fleet.routing_names`, ``"module:Class"``, or an object.
    """

    replicas: int
    routing: str | RoutingPolicy = "prefix"

    def __post_init__(self) -> None:
        require_int("replicas", self.replicas, 1, MAX_REPLICAS)
        parse_routing(self.routing)

    def __str__(self) -> str:
        return _told(self.replicas, self.name)

    @property
    def name(self) -> str:
        """What the routing is called."""
        has_a_name = isinstance(self.routing, str) or type(self.routing).__str__ is not object.__str__
        return str(self.routing) if has_a_name else type(self.routing).__name__

    def blocks_each(self, blocks: int) -> int:
        """Return the capacity of one replica; `InvalidOperation` where none is left for it."""
        if blocks < self.replicas:
            raise bad_argument("blocks", f"at least one for each of {self.replicas} replicas", str(blocks))
        return blocks // self.replicas


@dataclass(frozen=True, eq=False)
class FleetResult:
    """What the replicas of a replay did.

    Attributes
    ----------
    replicas : int
    routing : str
    served : int32 [requests]
        Which replica served each request.
    computed_blocks : int64 [replicas]
        Blocks that each did not find.
    """

    replicas: int
    routing: str
    served: npt.NDArray[np.int32]
    computed_blocks: npt.NDArray[np.int64]

    def __str__(self) -> str:
        return _told(self.replicas, self.routing)

    @property
    def busiest(self) -> float:
        """What the busiest replica computed over the mean of all; 1.0 where they are even."""
        mean = float(self.computed_blocks.mean())
        return float(self.computed_blocks.max()) / mean if mean else 1.0


def _told(replicas: int, routing: str) -> str:
    return "one pool" if replicas == 1 else f"{replicas} x {routing}"


class FleetReplay:
    """One replay: the caches, and what the router remembers."""

    def __init__(self, trace: Trace, blocks: int, strategy: Strategy, fleet: Fleet) -> None:
        self._trace, self._fleet = trace, fleet
        self._policy = copy.deepcopy(parse_routing(fleet.routing))  # one that learns begins anew
        each = min(fleet.blocks_each(blocks), max(1, trace.num_distinct))
        self._caches = [ContentCache(each, copy.deepcopy(strategy)) for _ in range(fleet.replicas)]
        self._load = RecentLoad(fleet.replicas)
        self._home = np.full(trace.num_distinct, NO_HOME, np.int32)  # by content id
        self._queue = np.zeros(fleet.replicas, np.int64)
        self.hits = np.zeros(trace.num_requests, np.int32)
        self.served = np.zeros(trace.num_requests, np.int32)
        self.seconds = 0.0

    def run(self) -> None:
        """Serve every request of the trace."""
        started = time.perf_counter()
        ids, offsets = self._trace.ids.astype(np.int64), self._trace.offsets.tolist()
        for request in range(self._trace.num_requests):
            self._serve(request, ids[offsets[request] : offsets[request + 1]])
        self.seconds = time.perf_counter() - started

    @property
    def reclaimed(self) -> int:
        """Cached blocks that all replicas together reclaimed."""
        return sum(cache.stats.blocks_reclaimed for cache in self._caches)

    def result(self) -> FleetResult:
        """Return what the replicas did."""
        missed = np.diff(self._trace.offsets) - self.hits
        computed = np.bincount(self.served, missed, self._fleet.replicas).astype(np.int64)
        return FleetResult(self._fleet.replicas, self._fleet.name, self.served, computed)

    def _serve(self, request: int, ids: npt.NDArray[np.int64]) -> None:
        size = self._trace.block_tokens
        matched = np.array([[cache.match_prefix(ids)] for cache in self._caches], np.int64) * size
        asked = RoutingRequest(request, len(ids) * size, self._home_of(ids))
        replica = route(self._policy, asked, Candidates(matched, self._load.tokens, self._queue))[0]
        found = int(self._caches[replica].run(ids, np.array([0, len(ids)], np.int64))[0])
        self._home[ids] = replica
        self._load.add(replica, (len(ids) - found) * size)
        self.hits[request], self.served[request] = found, replica

    def _home_of(self, ids: npt.NDArray[np.int64]) -> int:
        known = np.flatnonzero(self._home[ids[1:]] != NO_HOME)
        return int(self._home[ids[1 + known[-1]]]) if len(known) else NO_HOME
