"""Cutting off clients that do not take what is sent to them."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedkv.server.errors import ClientLeft

__all__ = ["SlowReaders"]


class SlowReaders:
    """Wraps an application right below the HTTP server: a message that is not taken in time ends the connection.

    Parameters
    ----------
    app : ASGI application
    seconds : float
        For each message. What the kernel and the HTTP server buffer counts as taken.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        cut = False

        async def bounded(message: Message) -> None:
            nonlocal cut
            if cut:
                raise ClientLeft("the client does not read")
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                cut = True
                _transport_of(send).abort()
                raise ClientLeft("the client does not read") from None

        try:
            await self._app(scope, receive, bounded)
        except Exception:
            if not cut:
                raise


class _NoTransport:
    def abort(self) -> None:
        """Leave the connection to its server."""


def _transport_of(send: Any) -> Any:
    # Closing a connection the polite way waits until its buffer is read, here for ever; ASGI has no word for more.
    return getattr(getattr(send, "__self__", None), "transport", None) or _NoTransport()
