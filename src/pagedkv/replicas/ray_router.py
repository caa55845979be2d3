"""The request router of Ray Serve: asks the routing of a fleet which replica a request goes to.

Ray Serve copies this module by value, so what it shares with the door is kept, and found, in `sending`. The interface
of request routers is an alpha one: written for Ray 2.60.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from pagedkv.replicas.sending import Sent, fleet_of


class FleetRequestRouter(RequestRouter):
    """Asks the policy of the fleet which replica a request goes to."""

    def initialize_state(self, fleet: str = "") -> None:
        """Find the fleet by the name of its app; in a process that has none requests go to whoever is ready."""
        self._fleet = fleet_of(fleet)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Return the replicas in the order in which they are to be asked, one in each rank."""
        if pending_request is None:
            return [[replica] for replica in candidate_replicas]
        pending_request.routing_context.should_backoff = True
        sent = pending_request.args[0] if pending_request.args else None
        if not isinstance(sent, Sent):
            return [[replica] for replica in candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        names = [name for name in by_name if name not in sent.avoid]
        return [[by_name[name]] for name in self._fleet.order(sent, names)] if names else []

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note where a request went."""
        if pending_request.args and isinstance(pending_request.args[0], Sent):
            self._fleet.went(pending_request.args[0], replica_id.unique_id)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Take note of the replicas that there are, and where their KV events are."""
        super().update_replicas(replicas)
        self._fleet.update({replica.replica_id.unique_id: replica.replica_metadata for replica in replicas})

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Take note that a replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._fleet.update({each.unique_id: replica.replica_metadata for each, replica in self.curr_replicas.items()})
