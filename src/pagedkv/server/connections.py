"""HTTP connections: one without a request is closed after a while, and the oldest of them when there are too many.

The HTTP server closes connections that are idle after a request. Before the first one, and in the middle of a head that
does not end, it waits for ever. So each of its protocols is held by one of ours, which hears what it hears. It is made
when the first byte comes: who only connects costs next to nothing. Of what comes at a time from many connections little
is heard in each turn of the event loop, so that there is time between for what is under way, and for probes, which go
first.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send

from pagedkv.server.limits import PROBES

AT_ONCE = 4
"""Connections that are heard in one turn of the event loop: of a thousand heads, or bodies, the work is a second's."""
_KEY = "pagedkv.connection"
_PROBE = re.compile(rf"(GET|HEAD) ({'|'.join(sorted(PROBES))})[ ?]".encode())


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
        self._left = AT_ONCE
        self._probes, self._others = deque[_Connection](), deque[_Connection]()

    def protocol_around(self, make_inner: Callable[..., asyncio.BaseProtocol]) -> Callable[..., asyncio.Protocol]:
        """Return what makes protocols as an HTTP server does, each around one of the server's own."""

        def make(*, app_state: dict[str, Any], **given: Any) -> asyncio.Protocol:
            def inner(connection: _Connection) -> asyncio.Protocol:
                return cast("asyncio.Protocol", make_inner(app_state={**app_state, _KEY: connection}, **given))

            return _Connection(self, inner)

        return make

    def may_be_heard(self, connection: _Connection, data: bytes) -> bool:
        """Whether a connection may be heard in this turn of the event loop; if not, its `go_on` is called later."""
        if self._left == AT_ONCE:
            asyncio.get_running_loop().call_soon(self._next_turn)
        if self._left:
            self._left -= 1
            return True
        (self._probes if _PROBE.match(data) else self._others).append(connection)
        return False

    def _next_turn(self) -> None:
        self._left = AT_ONCE
        while self._left and (line := self._probes or self._others):
            self._left -= line.popleft().go_on()
        if self._left < AT_ONCE:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def close(self) -> None:
        """Close all that have no request under way."""
        for peers in list(self._idle.values()):
            for connection in list(peers):
                connection.close()

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

    def __init__(self, connections: Connections, make_inner: Callable[[_Connection], asyncio.Protocol]) -> None:
        self._connections, self._make_inner = connections, make_inner
        self._inner: asyncio.Protocol | None = None
        self._waiting = b""
        self._timer: asyncio.TimerHandle | None = None
        self._requests = 0
        self._is_full = False
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._expect_head()
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._requests and self._timer is None:
            self._expect_head()
        if self._waiting:
            self._waiting += data
        elif self._connections.may_be_heard(self, data):
            self._hear(data)
        else:
            self._transport.pause_reading()
            self._waiting = data

    def go_on(self) -> bool:
        """Hear what came, after a wait; False if the connection is closed meanwhile."""
        data, self._waiting = self._waiting, b""
        if self._transport.is_closing():
            return False
        self._transport.resume_reading()
        self._hear(data)
        return True

    def _hear(self, data: bytes) -> None:
        if self._inner is None:
            self._inner = self._make_inner(self)
            self._inner.connection_made(self._transport)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def may_wait(self) -> bool:
        """Whether what is sent now may wait for the client, as the buffer is full."""
        return self._is_full

    def pause_writing(self) -> None:
        self._is_full = True
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._is_full = False
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exception: Exception | None) -> None:
        self._stop_timer()
        self._connections.discard(self)
        if self._inner is not None:
            self._inner.connection_lost(exception)
            self._inner = None  # which knows this object: no circle is left

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
    """Middleware right below the HTTP server: tells connections and their requests of each other.

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
        scope["pagedkv.may_wait"] = connection.may_wait
        try:
            await self._app(scope, receive, send)
        finally:
            connection.end()
