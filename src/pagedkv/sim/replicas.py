"""Replay of a trace on a fleet: every replica a control plane of its own, and a policy that routes each request.

The replicas share the capacity in equal parts, that of the pool and that of every tier; a shared tier is one for all.
The load that policies see is the work that a replica was given lately. Here requests come and go at once, so all queues
are empty; `pagedkv.sim.queueing` lets them wait. Home of a request is the replica that the deepest of its blocks that
is known was sent to last, unless many conversations have that block in common, as for `pagedkv.fleet.FleetRouter`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.control.protocol import Strategy
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
from pagedkv.sim.tiered import LevelHits, Tiers, TraceClock, tiered_pools
from pagedkv.sim.trace import Int32s, Int64s, Trace
from pagedkv.validate import require_int

MAX_REPLICAS = 1024
NOWHERE = -1
"""The replica of a request that none could serve."""


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
        Which replica served each request; −1 for one that was refused.
    computed_blocks : int64 [replicas]
        Blocks that each did not find.
    """

    replicas: int
    routing: str
    served: Int32s
    computed_blocks: Int64s

    @classmethod
    def of(cls, trace: Trace, fleet: Fleet, served: Int32s, hits: Int32s) -> FleetResult:
        """Return what the replicas did when request i found ``hits[i]`` blocks on replica ``served[i]``."""
        missed, is_served = np.diff(trace.offsets) - hits, served != NOWHERE
        computed = np.bincount(served[is_served], missed[is_served], fleet.replicas).astype(np.int64)
        return cls(fleet.replicas, fleet.name, served, computed)

    def __str__(self) -> str:
        return _told(self.replicas, self.routing)

    @property
    def busiest(self) -> float:
        """What the busiest replica computed over the mean of all; 1.0 where they are even."""
        mean = float(self.computed_blocks.mean())
        return float(self.computed_blocks.max()) / mean if mean else 1.0


def _told(replicas: int, routing: str) -> str:
    return "one pool" if replicas == 1 else f"{replicas} x {routing}"


class Router:
    """A policy, and what it is told of: the load of the replicas, and the home of each request."""

    def __init__(self, trace: Trace, fleet: Fleet) -> None:
        self._policy = copy.deepcopy(parse_routing(fleet.routing))  # one that learns begins anew
        self._block_tokens = trace.block_tokens
        self._load = RecentLoad()
        self._home = np.full(trace.num_distinct, NO_HOME, np.int32)  # by content id,
        self._branches = np.zeros(trace.num_distinct, np.int32)  # and how many different blocks came behind it
        self._routed, self._replicas = 0, fleet.replicas

    def route(self, ids: Int64s, reaches: Sequence[Sequence[int]], queue: Int64s) -> int:
        """Return the replica that a request goes to, and count it as sent there.

        `reaches` is what the levels of every replica have of it, in blocks.
        """
        size = self._block_tokens
        ends = np.maximum.accumulate(np.array(reaches, np.int64), axis=1) * size
        matched = ends.copy()
        matched[:, 1:] -= ends[:, :-1]
        asked = RoutingRequest(self._routed, len(ids) * size, self._home_of(ids))
        replica = route(self._policy, asked, Candidates(matched, self._load.of(range(self._replicas)), queue))[0]
        self._routed += 1
        self._branches[ids[:-1][self._home[ids[1:]] == NO_HOME]] += 1
        self._home[ids] = replica
        self._load.add(replica, len(ids) * size - int(ends[replica, -1]))
        return replica

    def _home_of(self, ids: npt.NDArray[np.int64]) -> int:
        known = np.flatnonzero(self._home[ids] != NO_HOME)
        if not len(known) or self._branches[ids[known[-1]]] >= COMMON * self._replicas:
            return NO_HOME
        return int(self._home[ids[known[-1]]])


def run_fleet(
    trace: Trace, blocks: int, strategy: Strategy, tiers: Tiers, fleet: Fleet
) -> tuple[LevelHits, FleetResult]:
    """Replay a trace on a fleet whose pools have `blocks` together."""
    clock = TraceClock()
    pools = tiered_pools(trace, fleet.blocks_each(blocks), strategy, tiers, clock, replicas=fleet.replicas)
    found, router = LevelHits(trace, tiers, pools), Router(trace, fleet)
    nobody_waits = np.zeros(fleet.replicas, np.int64)
    served = np.zeros(trace.num_requests, np.int32)
    ids, offsets = np.asarray(trace.ids).astype(np.int64), trace.offsets.tolist()
    for request in range(trace.num_requests):
        clock.seconds = float(trace.times[request])
        found.restart_if_due(request)
        asked = ids[offsets[request] : offsets[request + 1]]
        reaches = found.reaches(asked)
        replica = served[request] = router.route(asked, reaches, nobody_waits)
        found.by_level[:, request] = pools[replica].serve(asked, reaches[replica], int(trace.output_tokens[request]))
    return found, FleetResult.of(trace, fleet, served, found.hits)
