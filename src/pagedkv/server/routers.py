"""The routes of the server and what runs beside them: the one list that a new part is added to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import APIRouter

from pagedkv.server import admin, cache_control, chat, completions, health, live, metrics, models, tokenize
from pagedkv.server.events import kv_events
from pagedkv.server.state import ServerState

__all__ = ["BACKGROUND", "ROUTERS"]

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    tokenize.router,
    cache_control.router,
    admin.router,
    live.stream_router,
    live.page_router,
    metrics.router,
)
"""Every one is included as it is: a router that needs a key says so with ``dependencies=[Client]`` or ``[Operator]``
of ``server/auth.py``."""

BACKGROUND: tuple[Callable[[ServerState], AbstractAsyncContextManager[None]], ...] = (metrics.metering, kv_events)
"""Entered when the server starts and left when it has drained, in this order; here ``state.observers`` grows."""
