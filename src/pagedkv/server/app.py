"""The ASGI application: ``create_app`` puts the routes around one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from pagedkv import __version__
from pagedkv.server import admin, chat, completions, live, messages, metrics, ollama, responses, tokenize
from pagedkv.server.admission import Admission
from pagedkv.server.background import in_background
from pagedkv.server.config import ServerConfig
from pagedkv.server.engines import ReplicatedEngine, ServedEngine
from pagedkv.server.errors import ErrorResponse, install_error_handlers
from pagedkv.server.events import kv_events
from pagedkv.server.limits import HeadRequests, Limits
from pagedkv.server.logs import RequestLog
from pagedkv.server.model import ServedModel
from pagedkv.server.openapi import complete_openapi
from pagedkv.server.state import ServerState

ROUTERS: tuple[APIRouter, ...] = (
    admin.health_router,
    admin.models_router,
    completions.router,
    chat.router,
    responses.router,
    messages.router,
    ollama.router,
    tokenize.router,
    admin.clear_router,
    admin.cache_router,
    live.stream_router,
    live.page_router,
    metrics.router,
)
"""Every one is included as it is: a router that needs a key says so with ``dependencies=[Client]`` or ``[Operator]``
of ``server/auth.py``."""


@asynccontextmanager
async def watching(state: ServerState) -> AsyncIterator[None]:
    """Keep the counters of many engines fresh, as long as the server runs."""
    if isinstance(state.engine, ReplicatedEngine):
        async with in_background(state.engine.watch()):
            yield
    else:
        yield


BACKGROUND: tuple[Callable[[ServerState], AbstractAsyncContextManager[None]], ...] = (
    watching,
    metrics.metering,
    kv_events,
    messages.expiring_pins,
)
"""Entered when the server starts and left when it has drained, in this order; here ``state.observers`` grows."""


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is at fault, or there is no room."},
    "5XX": {"model": ErrorResponse, "description": "The server is at fault, or it took too long."},
}


def create_app(engine: ServedEngine, config: ServerConfig | None = None) -> FastAPI:
    """Return the application that serves an engine; it shuts the engine down when it ends.

    Parameters
    ----------
    engine : ServedEngine
    config : ServerConfig, optional

    Returns
    -------
    FastAPI
        Its shared state is ``app.state.server``.
    """
    config = config or ServerConfig()
    model = ServedModel.of(engine, config)
    state = ServerState(
        engine=engine,
        config=config,
        model=model,
        admission=Admission(model.max_num_seqs, config.max_queue, config.key_share),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for part in BACKGROUND:
                await stack.enter_async_context(part(state))
            try:
                yield
            finally:
                state.draining = True
                await engine.shutdown(drain=True, timeout=config.drain_timeout)
                model.close()

    app = FastAPI(
        title="pagedkv",
        version=__version__,
        summary="A language model over a paged KV cache, behind the API that OpenAI's clients speak.",
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = state
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    complete_openapi(app, has_keys=bool(config.api_keys))
    app.add_middleware(HeadRequests)
    app.add_middleware(Limits, config=config)
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestLog)
    return app
