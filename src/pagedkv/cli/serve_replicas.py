"""``pagedkv serve --replicas``: many engines behind the one door, each a replica on Ray Serve."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pagedkv.cli.engine_options import EngineOptions, TierOptions, make_engine
from pagedkv.cli.loading import LoadedModel, load_model, load_tokenizer
from pagedkv.cli.model_source import ModelSource
from pagedkv.cli.terminal import Failure, is_small
from pagedkv.errors import MissingExtra, PagedKvError, TierError
from pagedkv.machine import usable_cores
from pagedkv.server.config import ServerConfig, setting

if TYPE_CHECKING:
    from pagedkv.engine import AsyncEngine
    from pagedkv.replicas.engine import FleetEngine
    from pagedkv.replicas.ray_serve import RayLink, RayOptions

logger = logging.getLogger("pagedkv")

_FLEET = "On a fleet"
MOST_REPLICAS = 4096


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How many engines there are, and how requests are routed to them."""

    replicas: int = setting(1, "Engines behind this server, each a replica on Ray Serve.", group=_FLEET)
    routing: str = setting(
        "prefix",
        "Which replica a request goes to: prefix, sticky, least_load, round_robin, or module:Class.",
        group=_FLEET,
    )
    autoscale: str | None = setting(
        None,
        "Least and most replicas, as 1:4, or Ray Serve's autoscaling_config as JSON.",
        group=_FLEET,
        shown="as many as --replicas",
    )
    threads: int | None = setting(None, "Cores of each replica.", group=_FLEET, shown="an equal share of them")
    ray_address: str | None = setting(
        None,
        "A Ray cluster to run the replicas on: auto, or host:6379.",
        group=_FLEET,
        env="PAGEDKV_RAY_ADDRESS",
        shown="one that is started on this machine",
    )

    def __post_init__(self) -> None:
        from pagedkv.fleet import parse_routing

        for name, most in (("replicas", MOST_REPLICAS), ("threads", 1024)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise Failure(f"--{name}: expected 1 … {most}, got {value}")
        parse_routing(self.routing)
        self.autoscaling  # noqa: B018  # what it says is checked
        if self.threads is not None and not self.is_fleet:
            raise Failure("--threads: expected --replicas beside it; one engine takes OMP_NUM_THREADS")

    @property
    def is_fleet(self) -> bool:
        """Whether the engines run on Ray Serve."""
        return self.replicas > 1 or self.autoscale is not None or self.ray_address is not None

    @property
    def autoscaling(self) -> Mapping[str, Any] | None:
        """Ray Serve's ``autoscaling_config``, if it is to scale."""
        if self.autoscale is None:
            return None
        least, colon, most = self.autoscale.partition(":")
        if colon and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most) <= MOST_REPLICAS:
            return {"min_replicas": int(least), "max_replicas": int(most)}
        try:
            config = json.loads(self.autoscale)
        except ValueError:
            config = None
        if not isinstance(config, dict) or not isinstance(config.get("max_replicas"), int):
            hint = 'or a JSON object with "max_replicas"'
            raise Failure(f"--autoscale: expected two numbers such as 1:4, {hint}, got {self.autoscale!r}")
        return config

    def on_ray(self, device: str, config: ServerConfig) -> RayOptions:
        """Return what Ray has to know; needs Ray."""
        from pagedkv.replicas.ray_serve import RayOptions

        options = RayOptions(
            replicas=self.replicas,
            autoscaling=self.autoscaling,
            address=self.ray_address,
            gpus=int(device.startswith("cuda")),
            drain_seconds=config.drain_timeout,
        )
        share = 1 if self.ray_address is not None else max(1, usable_cores() // options.most)
        return replace(options, threads=self.threads or share)


@dataclass(frozen=True)
class EngineRecipe:
    """How a replica makes its engine, in its own process.

    Attributes
    ----------
    source : ModelSource
    options : EngineOptions
    tiers : TierOptions
    config : ServerConfig
    threads : int
        Cores that it may use.
    neighbours : int
        Replicas that share the memory of its machine, itself among them.
    """

    source: ModelSource
    options: EngineOptions
    tiers: TierOptions
    config: ServerConfig
    threads: int
    neighbours: int

    def __call__(self) -> AsyncEngine:
        """Load the model, warm it up, pin what is to be pinned."""
        import torch

        from pagedkv.server.warm import pin_prompts, read_prompts

        prompts = read_prompts(self.tiers.warm)
        loaded = load_model(self.source, self.options.device, self.options.dtype)
        torch.set_num_threads(1 if is_small(loaded.model.num_parameters()) else self.threads)
        engine = self._engine(loaded)
        engine.llm.warm_up()
        pin_prompts(engine, self.config, prompts)
        gc.collect()
        gc.freeze()  # a full collection would look at all that was imported, while every text waits
        return engine

    def _engine(self, loaded: LoadedModel) -> AsyncEngine:
        """Return the engine; of a directory for K and V it takes the first part that no other replica writes to."""
        folder, has_parts = self.tiers.disk, self.tiers.disk is not None and not self.tiers.disk_read_only
        for number in range(MOST_REPLICAS):
            part = folder / f"replica-{number}" if folder is not None and has_parts else folder
            try:
                return make_engine(self.options, loaded, replace(self.tiers, disk=part), self.neighbours)
            except TierError as error:
                if not has_parts or "in use" not in error.reason:
                    raise
            # The engine that was not to be had has taken the weights.
            loaded = load_model(self.source, self.options.device, self.options.dtype)
        raise Failure(f"--disk: {folder} is in use")


def start_replicas(
    source: ModelSource, options: EngineOptions, config: ServerConfig, tiers: TierOptions, fleet: FleetOptions
) -> tuple[FleetEngine, RayLink, int]:
    """Start the replicas of a model; returns the engine that stands for all, its link, how many cores each has."""
    ray_options = fleet.on_ray(options.device, config)
    from pagedkv.replicas.engine import FleetEngine
    from pagedkv.replicas.ray_serve import start
    from pagedkv.replicas.sending import routed_fleet

    neighbours = ray_options.most if fleet.ray_address is None else 1
    recipe = EngineRecipe(source, options, tiers, config, ray_options.threads, neighbours)
    tokenizer = load_tokenizer(source)
    link = start(recipe, ray_options, routed_fleet(fleet.routing, options.block_size))
    return asyncio.run(FleetEngine.of(link, tokenizer)), link, ray_options.threads


def restart_on_hangup(link: RayLink) -> None:
    """Replace the replicas, one after the other, whenever SIGHUP comes; where there is no such signal, never."""

    def restart() -> None:
        try:
            logger.info("SIGHUP: the replicas are replaced, a few at a time")
            link.restart()
            logger.info("all replicas are new")
        except PagedKvError as error:
            logger.error("%s", error)

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=restart, daemon=True).start())


def require_replicas(config: ServerConfig, device: str) -> None:
    """See that replicas can be run, before anything heavy is imported.

    Raises
    ------
    MissingExtra
        Without Ray Serve, or ZMQ, by which the replicas tell what they have cached.
    Failure
        Where an option does not go with several engines.
    """
    for name in ("record_events", "events_endpoint", "show_tokens"):
        if getattr(config, name):
            raise Failure(
                f"--{name.replace('_', '-')}: expected one engine, got --replicas, --autoscale or --ray-address"
            )
    if device.startswith("cuda:"):
        raise Failure(f"--device: expected cuda, of which each replica gets one, got {device}")
    for module, extra in (("ray", "ray"), ("aiohttp", "ray"), ("zmq", "events")):
        if find_spec(module) is None:
            raise MissingExtra("ray[serve]" if extra == "ray" else "pyzmq", extra)
