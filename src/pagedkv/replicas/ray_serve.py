"""Ray Serve: the replicas as a deployment, and the handle through which the door reaches them.

All that is asked of Ray is asked here and in `ray_router`; written for Ray 2.60.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pagedkv.engine import AsyncEngine
from pagedkv.errors import InvalidOperation, MissingExtra, ReplicaLost
from pagedkv.replicas.messages import Asked, Told
from pagedkv.replicas.replica import Replica
from pagedkv.replicas.sending import Fleet, Sent, fleets

try:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from pagedkv.replicas.ray_router import FleetRequestRouter
except ImportError as error:
    raise MissingExtra("ray[serve]", "ray") from error

DEPLOYMENT = "engine"
OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; nothing large goes through it
MOST_ONGOING = 100_000  # the engines queue by themselves
HEALTH_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
ATTEMPTS = 3
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How replicas run on Ray.

    Attributes
    ----------
    replicas : int
    autoscaling : mapping, optional
        Ray Serve's ``autoscaling_config``; then `replicas` does not count.
    address : str, optional
        Of a cluster of Ray; without one Ray is started on this machine and ends with the process.
    threads : int
        Cores of each replica.
    gpus : int
        Of each replica.
    drain_seconds : float
        That a replica has for its requests before it ends.
    """

    replicas: int = 2
    autoscaling: Mapping[str, Any] | None = None
    address: str | None = None
    threads: int = 1
    gpus: int = 0
    drain_seconds: float = 30.0

    @property
    def least(self) -> int:
        """How many replicas there are at least."""
        return self.replicas if self.autoscaling is None else int(self.autoscaling.get("min_replicas", 1))

    @property
    def most(self) -> int:
        """How many replicas there may be."""
        return self.replicas if self.autoscaling is None else int(self.autoscaling.get("max_replicas", 1))


# In the process of a replica.


class Engine:
    """One engine as Ray Serve runs it.

    Parameters
    ----------
    make : callable
        Returns the engine, in the process of the replica.
    is_local : bool
        Whether all replicas run on one machine.
    """

    async def __init__(self, make: Callable[[], AsyncEngine], is_local: bool) -> None:  # type: ignore[misc]
        name = serve.get_replica_context().replica_id.unique_id
        host = "127.0.0.1" if is_local else ray.util.get_node_ip_address()
        self._replica = Replica(name, await asyncio.to_thread(make), f"tcp://{host}:*")
        await self._replica.start()

    async def generate(self, sent: Sent) -> AsyncGenerator[Told, None]:
        """Yield what is new in the outputs of a request."""
        async for told in self._replica.generate(sent.asked):
            yield told

    async def call(self, name: str, *arguments: object) -> tuple[str, object]:
        """Do what all replicas are asked for; returns the name of this one with the answer."""
        answer = getattr(self._replica, name)(*arguments)
        return self._replica.name, await answer if asyncio.iscoroutine(answer) else answer

    def check_health(self) -> None:
        """Raise if this replica has to be replaced."""
        self._replica.check_health()

    def record_replica_metadata(self) -> dict[str, str]:
        """Tell the router where the KV events of this replica are."""
        address, replay_address = self._replica.addresses
        return {"events": address, "replay": replay_address}

    async def __del__(self) -> None:
        """Stop: Ray Serve calls and awaits it when the replica has drained."""
        if hasattr(self, "_replica"):
            await self._replica.stop()


# In the process of the door.


class RayLink:
    """Reaches the replicas through a handle of Ray Serve.

    Parameters
    ----------
    app : str
        The name of the application, which was never used before.
    make : callable
        Returns an engine, in the process of a replica.
    options : RayOptions
    """

    def __init__(self, app: str, make: Callable[[], AsyncEngine], options: RayOptions) -> None:
        self._app, self._make, self._options = app, make, options
        self._generation = 0
        self._handle = self._deploy()
        self._stream = self._handle.options(method_name="generate", stream=True)

    @property
    def ready(self) -> tuple[str, ...]:
        """The replicas that take requests."""
        return fleets[self._app].ready

    @property
    def wanted(self) -> int:
        """How many there should be at least."""
        return self._options.least

    @property
    def most(self) -> int:
        """How many there may be."""
        return self._options.most

    async def generate(self, asked: Asked, avoid: Collection[str]) -> AsyncGenerator[tuple[str, Told], None]:
        """Give a request to one of the replicas and yield its name with what it tells."""
        sent = Sent(asked, tuple(avoid))
        answers = self._stream.remote(sent)
        is_over = False
        try:
            async for told in answers:
                is_over = told.finished or told.error is not None
                yield sent.replica, told
            is_over = True
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError) as error:
            is_over = True
            raise ReplicaLost(sent.replica, f"{type(error).__name__}") from error
        finally:
            fleets[self._app].done(sent)
            if not is_over:
                answers.cancel()

    async def everywhere(self, call: str, *arguments: object) -> dict[str, object]:
        """Call all replicas and return what each answers; one that is lost meanwhile is left out."""
        try:
            asked = self._handle.broadcast("call", call, *arguments)
            answers = await asked.results_async(timeout_s=PATIENCE_SECONDS, return_exceptions=True)
        except serve.exceptions.DeploymentUnavailableError as error:
            raise ReplicaLost("", "none is ready") from error
        except TimeoutError as error:
            raise ReplicaLost("", f"not all have answered {call} in {PATIENCE_SECONDS:g} seconds") from error
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, ray.exceptions.RayActorError):
                raise answer
        return dict(answer for answer in answers if not isinstance(answer, Exception))

    def restart(self) -> None:
        """Replace the replicas by new ones, a few at a time; each has time for its requests. Returns when all are new.

        Raises
        ------
        InvalidOperation
            If the new ones cannot be started.
        """
        self._generation += 1
        self._deploy()

    def _deploy(self) -> Any:
        options = self._options
        scale: dict[str, Any] = {"num_replicas": options.replicas}
        if options.autoscaling is not None:
            scale = {"autoscaling_config": dict(options.autoscaling)}
        generation = {"env_vars": {"PAGEDKV_GENERATION": str(self._generation)}}  # what is new has another one
        deployment = serve.deployment(
            Engine,
            name=DEPLOYMENT,
            max_ongoing_requests=MOST_ONGOING,
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=options.drain_seconds,
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=1,
            ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus, "runtime_env": generation},
            request_router_config=RequestRouterConfig(
                request_router_class=FleetRequestRouter, request_router_kwargs={"fleet": self._app}
            ),
            **scale,
        )
        application = deployment.bind(self._make, options.address is None)
        try:
            return serve.run(application, name=self._app, route_prefix=None, logging_config=QUIET)
        except RuntimeError as error:
            raise InvalidOperation(f"replicas: cannot be started: {self._fault() or error}", "replicas") from error

    def _fault(self) -> str:
        """Return what the last replica said that could not be started."""
        with suppress(KeyError):
            return _last_line(serve.status().applications[self._app].deployments[DEPLOYMENT].message)
        return ""

    async def close(self) -> None:
        """End the replicas, and Ray where it was started for them."""
        await asyncio.to_thread(stop, self._app)


def start(make: Callable[[], AsyncEngine], options: RayOptions, fleet: Fleet) -> RayLink:
    """Start Ray, or join its cluster, and run the replicas; returns when all take requests.

    Parameters
    ----------
    make : callable
        Returns an engine, in the process of a replica.
    options : RayOptions
    fleet : Fleet
        Says which replica a request goes to; closed with the link.

    Raises
    ------
    InvalidOperation
        If there is no cluster at the address, or the replicas cannot be started.
    """
    _join(options)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    app = f"pagedkv-{secrets.token_hex(4)}"  # of a name that was used before the old router would be taken
    fleets[app] = fleet
    try:
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        return RayLink(app, make, options)
    except BaseException:
        stop(app)
        raise


def _join(options: RayOptions) -> None:
    """Join the cluster at an address, or start Ray on this machine, where nothing outside of it can reach it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default all that is not Ray's goes before the replicas
    where: dict[str, Any] = {"address": options.address}
    if options.address is None:
        where = {
            "num_cpus": options.most * options.threads + 1,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    for attempt in range(ATTEMPTS):
        try:
            if options.address is not None:
                _require_somebody(options.address)
            ray.init(logging_level=logging.ERROR, log_to_driver=False, namespace="pagedkv", **where)
            return
        except Exception as error:  # Ray raises whatever it likes here, and gives up early on a machine that is busy
            ray.shutdown()
            if attempt + 1 == ATTEMPTS or options.address is not None:
                place = "on this machine" if options.address is None else f"at {options.address}"
                raise InvalidOperation(f"ray_address: no Ray {place}: {_last_line(error)}", "ray_address") from error


def stop(app: str) -> None:
    """End the replicas of an app, and Ray where it was started for them."""
    with suppress(Exception):  # whatever is left of them ends with Ray
        serve.delete(app)
    if (fleet := fleets.pop(app, None)) is not None:
        fleet.close()
    ray.shutdown()


def _require_somebody(address: str) -> None:
    """See that somebody listens at an address, for whom Ray would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _last_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
