"""Routes for operators: health, version, models, the cache, and clearing it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from pagedkv import __version__
from pagedkv.engine import AsyncEngine
from pagedkv.engine.snapshot import encode
from pagedkv.server.auth import Client, Operator
from pagedkv.server.engines import ReplicatedEngine
from pagedkv.server.live import Snapshots
from pagedkv.server.origins import Json
from pagedkv.server.state import Server, ServerState

health_router = APIRouter(tags=["server"])


class Replicas(BaseModel):
    """How many engines there are behind this server."""

    ready: int
    wanted: int


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "dead", "waiting"] = Field(
        description="Of a fleet, `waiting` where no replica is ready."
    )
    replicas: Replicas | None = None


class Version(BaseModel):
    """Which pagedkv this is."""

    version: str


@health_router.get(
    "/health",
    summary="Whether requests are taken",
    responses={503: {"model": Health}},
    response_model=Health,
    response_model_exclude_none=True,
)
async def health(server: Server) -> Health | JSONResponse:
    """Answer 200 while requests are taken, 503 once the server drains or its engine has stopped."""
    found = Health(status="draining" if server.draining else "ok")
    if isinstance(server.engine, ReplicatedEngine):
        count = server.engine.replica_count()
        found.replicas = Replicas(ready=count.ready, wanted=count.wanted)
        if not count.ready:
            found.status = "waiting"
    if not server.engine.is_alive:
        found.status = "dead"
    return found if found.status == "ok" else JSONResponse(found.model_dump(exclude_none=True), 503)


@health_router.get("/version", summary="The version")
async def version() -> Version:
    """Return the version of pagedkv."""
    return Version(version=__version__)


models_router = APIRouter(tags=["models"], dependencies=[Client])


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pagedkv"
    max_model_len: int


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


def _only_model(server: Server) -> Model:
    model = server.model
    return Model(id=model.name, created=model.created, max_model_len=model.max_model_len)


@models_router.get("/v1/models", summary="List the models")
async def list_models(server: Server) -> ModelList:
    """Return the model that is served."""
    return ModelList(data=[_only_model(server)])


@models_router.get("/v1/models/{name:path}", summary="Describe a model")
async def get_model(name: str, server: Server) -> Model:
    """Return the model of this name; 404 for any other."""
    server.model.check_name(name)
    return _only_model(server)


clear_router = APIRouter(tags=["cache"], dependencies=[Operator, Json])


class Cleared(BaseModel):
    """How much was cleared."""

    cleared_blocks: int = Field(description="Cached blocks that became free. Those in use stay.")


@clear_router.post("/v1/cache/clear", summary="Forget all cached prefixes")
async def clear(server: Server) -> Cleared:
    """Forget all prefixes of all tenants; requests that run go on."""
    return Cleared(cleared_blocks=await server.engine.clear_prefix_cache())


@clear_router.post("/reset_prefix_cache", summary="Forget all cached prefixes, under vLLM's name")
async def reset_prefix_cache(server: Server) -> Cleared:
    """Do the same as ``/v1/cache/clear``."""
    return await clear(server)


MAX_SHOWN_TOKENS = 512
SNAPSHOT_TYPE = "application/vnd.pagedkv.snapshot"

cache_router = APIRouter(tags=["cache"], dependencies=[Operator])


class Blocks(BaseModel):
    """How many blocks there are of each kind; every block counts once."""

    free: int
    active: int = Field(description="Held by one sequence.")
    shared: int = Field(description="Held by several sequences.")
    cached: int = Field(description="Not held, still findable.")
    pinned: int = Field(description="Never reclaimed.")


class CachedRequest(BaseModel):
    """A request that is under way."""

    model_config = ConfigDict(from_attributes=True)

    request_id: str
    state: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    blocks: int
    priority: int
    age_seconds: float = Field(validation_alias="age")
    num_preemptions: int


class Prefix(BaseModel):
    """A prefix that several requests have used."""

    model_config = ConfigDict(from_attributes=True)

    block_id: int = Field(description="Its last block.")
    num_tokens: int
    uses: int = Field(description="Sequences that have held it since it was stored.")
    ref_count: int = Field(description="Sequences that hold it now.")
    age_ticks: int = Field(validation_alias="age", description="Calls of the cache since its last use.")
    age_seconds: float | None = Field(None, description="Time since its last use, where it was noted.")
    text: str | None = Field(None, description="Its beginning, where the operator lets it be shown.")


class CacheTier(BaseModel):
    """What a tier holds and has done since the server started."""

    model_config = ConfigDict(from_attributes=True)

    medium: str
    blocks: int = Field(description="That it holds; 0 where it does not say.")
    total_blocks: int = Field(description="That it has room for; 0 where it does not say.")
    hits: int = Field(description="Texts that got something from it.")
    loads: int = Field(description="Blocks that came from it and were right.")
    stores: int = Field(description="Blocks that were handed to it and are there now.")
    corrupt: int = Field(description="Blocks that were not what was stored.")
    late: int = Field(description="Texts that did not wait any longer for it.")
    gated: int = Field(description="Texts that were computed, as this is faster.")
    failed: int = Field(description="Calls that it answered by an error.")
    dropped: int = Field(description="Texts that were not stored, as too much was on its way.")
    read_bytes: int
    written_bytes: int
    read_seconds: float
    write_seconds: float


class Cache(BaseModel):
    """The cache at one moment."""

    model: str
    taken: float = Field(description="Unix time.")
    strategy: str
    block_size: int
    num_blocks: int
    tick: int
    usage: float = Field(description="Blocks that requests hold, a fraction of all.")
    prefix_hit_rate: float = Field(description="Prompt tokens found in the cache, a fraction of those looked up.")
    blocks: Blocks
    requests: list[CachedRequest]
    num_requests: int
    hottest_prefixes: list[Prefix]
    stats: dict[str, int | float]
    tiers: list[CacheTier] = Field(description="Beyond the pool, nearest first.")


@cache_router.get("/v1/cache", summary="What is in the cache")
async def show_cache(
    server: Server,
    snapshots: Snapshots,
    max_requests: Annotated[int, Query(ge=0, le=100_000, description="List at most so many requests.")] = 1000,
) -> Cache:
    """Return the blocks by state, the requests and the hottest prefixes; snapshots are at most four a second."""
    snapshot = await snapshots.now()
    stats, total = snapshot.stats, snapshot.total_blocks
    texts = await _texts(server) if server.config.show_tokens else {}
    return Cache(
        model=server.model.name,
        taken=snapshot.taken,
        strategy=snapshot.strategy,
        block_size=snapshot.block_size,
        num_blocks=total,
        tick=snapshot.tick,
        usage=stats.blocks_used / total if total else 0.0,
        prefix_hit_rate=stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
        blocks=Blocks(**snapshot.counts()),
        requests=[CachedRequest.model_validate(record) for record in snapshot.requests[:max_requests]],
        num_requests=len(snapshot.requests),
        hottest_prefixes=[
            Prefix.model_validate(prefix).model_copy(
                update={"age_seconds": snapshot.seconds_since(prefix.age), "text": texts.get(prefix.block_id)}
            )
            for prefix in snapshot.prefixes
        ],
        stats={name: value for name, value in dataclasses.asdict(stats).items() if name != "tiers"},
        tiers=[CacheTier.model_validate(tier) for tier in stats.tiers],
    )


@cache_router.get(
    "/v1/cache/snapshot",
    summary="A snapshot for pagedkv top",
    response_class=Response,
    responses={200: {"content": {SNAPSHOT_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def snapshot(snapshots: Snapshots) -> Response:
    """Return the whole pool, a few bytes a block; ``pagedkv.engine.snapshot.decode`` reads it."""
    frozen = await snapshots.now()
    data = await asyncio.to_thread(encode, frozen)
    return Response(data, media_type=SNAPSHOT_TYPE, headers={"Cache-Control": "no-store"})


async def _texts(server: ServerState) -> dict[int, str]:
    """Return the beginnings of the hottest prefixes, by their last blocks."""
    if server.model.tokenizer is None or isinstance(server.engine, ReplicatedEngine):
        return {}  # other processes do not tell the tokens of their prompts
    prefixes = cast(AsyncEngine, server.engine).hottest_prefixes(max_tokens=MAX_SHOWN_TOKENS)
    return {prefix.block_id: await server.model.decode(prefix.token_ids, "") for prefix in prefixes}
