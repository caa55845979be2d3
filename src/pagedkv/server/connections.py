"""HTTP connections: one without a request is closed after a while, and the oldest of them when there are too many.

The HTTP server closes connections that are idle after a request. Before the first one, and in the middle of a head that
does not end, it waits for ever. So each of its protocols is held by one of ours, which hears what it hears.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send

_KEY = "pagedkv.connection"


class Connections:
    """The connections of a server that have no request under way.

    Parameters
    ----------
    most : int
        So many may be open; when one more comes, the oldest goes, of the address that has the most of them.
    seconds : float
        In which the head of a request must have come.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.seconds = seconds
        self._most = most
        self._idle: dict[str, dict[_Connection, None]] = {}  # by address, the oldest first
        self._count = 0

    def protocol_around(self, make_inner: Callable[..., asyncio.BaseProtocol]) -> Callable[..., asyncio.Protocol]:
        """Return what makes protocols as an HTTP server does, each around one of the server's own."""

        def make(*, app_state: dict[str, Any], **given: Any) -> asyncio.Protocol:
            connection = _Connection(self)
            inner = make_inner(app_state={**app_state, _KEY: connection}, **given)
            connection.inner = cast("asyncio.Protocol", inner)
            return connection

        return make

    def add(self, connection: _Connection) -> None:
        """Count a connection that has no request under way."""
        self._idle.setdefault(connection.address, {})[connection] = None
        self._count += 1
        if self._count > self._most:
            crowd = max(self._idle.values(), key=len)
            next(iter(crowd)).close()

    def discard(self, connection: _Connection) -> None:
        """Count it no more: it has one, or is closed."""
        peers = self._idle.get(connection.address, {})
        if connection in peers:
            del peers[connection]
            self._count -= 1
            if not peers:
                del self._idle[connection.address]


class _Connection(asyncio.Protocol):
    """Passes on what happens to a connection, and closes it if no request comes."""

    inner: asyncio.Protocol

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None
        self._requests = 0
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._expect_head()
        self.inner.connection_made(transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._requests and self._timer is None:
            self._expect_head()
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received()

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()

    def connection_lost(self, exception: Exception | None) -> None:
        self._stop_timer()
        self._connections.discard(self)
        self.inner.connection_lost(exception)

    def begin(self) -> None:
        """Note that a request has come."""
        self._requests += 1
        self._stop_timer()
        self._connections.discard(self)

    def end(self) -> None:
        """Note that it is answered; now the HTTP server looks at the time."""
        self._requests -= 1
        if not self._requests and not self._transport.is_closing():
            self._connections.add(self)

    def close(self) -> None:
        """Close it."""
        self._connections.discard(self)
        self._transport.close()

    def _expect_head(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._connections.seconds, self.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class ConnectionsInUse:
    """Middleware right below the HTTP server: tells a connection when it has a request.

    Parameters
    ----------
    app : ASGI application
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        connection: _Connection | None = scope.get("state", {}).get(_KEY)
        if scope["type"] != "http" or connection is None:
            await self._app(scope, receive, send)
            return
        connection.begin()
        try:
            await self._app(scope, receive, send)
        finally:
            connection.end()
