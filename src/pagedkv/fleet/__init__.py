"""Many replicas, one cache in effect: which replica a request should go to, and what each of them has cached.

The policies route requests to engines and, the same objects, those of a trace in the simulator.
"""

from pagedkv.fleet.router import FleetRouter, RoutedRequest
from pagedkv.fleet.routing import (
    Candidates,
    LeastLoad,
    PrefixLoad,
    RoundRobin,
    RoutingPolicy,
    RoutingRequest,
    StickySession,
    parse_routing,
    route,
    routing_names,
)
from pagedkv.fleet.subscriber import FleetSubscriber
from pagedkv.fleet.view import FleetView, prefix_hashes

__all__ = [
    "Candidates",
    "FleetRouter",
    "FleetSubscriber",
    "FleetView",
    "LeastLoad",
    "PrefixLoad",
    "RoundRobin",
    "RoutedRequest",
    "RoutingPolicy",
    "RoutingRequest",
    "StickySession",
    "parse_routing",
    "prefix_hashes",
    "route",
    "routing_names",
]
