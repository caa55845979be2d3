"""Limits that hold before a route is asked: how many requests, whose bodies, how large and how slow."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pagedkv.server.auth import is_known
from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import ApiError, ClientLeft, error_response

LINGER_SECONDS, LINGER_BYTES = 2.0, 64 << 20
_CLOSE = {"Connection": "close"}  # what is left of the body is not read


class Limits:
    """Middleware: refuses what is too much before it is read.

    Parameters
    ----------
    app : ASGI application
    config : ServerConfig
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in (b"content-length", b"authorization")}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._inside -= 1

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        config = self._config
        if self._inside >= config.max_connections:
            message = (
                f"the server is busy: {self._inside} requests are under way, at most {config.max_connections} may be"
            )
            return ApiError(503, message, code="too_many_connections", retry_after=1, headers=_CLOSE)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > config.max_body:
            return self._too_large()
        # Every POST takes a key, and nobody's body is read before it is known who sends it.
        if scope["method"] == "POST" and not is_known(config, headers.get(b"authorization")):
            message = "expected the header Authorization: Bearer <key> with a key that the server knows"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", **_CLOSE})
        return None

    def _too_large(self) -> ApiError:
        message = f"the body is larger than the {self._config.max_body} bytes that the server takes"
        return ApiError(413, message, code="body_too_large", headers=_CLOSE)

    def _bounded(self, receive: Receive) -> Receive:
        """Count what comes, and do not wait for it for ever."""
        total, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._config.body_timeout

        async def bounded() -> Message:
            nonlocal total, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"the body did not arrive within {self._config.body_timeout:g} seconds"
                raise ApiError(408, text, code="body_timeout", headers=_CLOSE) from None
            total += len(message.get("body", b""))
            if total > self._config.max_body:
                raise self._too_large()
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body has come, and take what still comes for a while.

    A connection that is closed while the client still writes is reset, and the client never sees the answer.
    """
    answer = error_response(error)
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    taken = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while taken < LINGER_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
                taken += len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


# Cutting off clients that do not take what is sent to them.


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


# Limits of a connection before there is a request: how many, how long a head, how slow.

logger = logging.getLogger("pagedkv.server")

MOST_HEAD_BYTES = 64 << 10
IDLE_PER_REQUEST = 4  # connections for each request that may be under way; clients keep some open


def bounded_http(config: ServerConfig) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol that cuts off connections whose request does not come or whose head has no end."""

    class BoundedHttp(HttpToolsProtocol):
        _in_head = True
        _head_bytes = 0
        _complete = 0  # messages
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > IDLE_PER_REQUEST * config.max_connections:
                transport.abort()
            else:
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head and self._patience is None:
                self._wait_for_head()
            complete = self._complete
            super().data_received(data)
            if self._in_head and self._complete == complete:
                self._head_bytes += len(data)
                if self._head_bytes > MOST_HEAD_BYTES:
                    self._cut("a head of more than 64 KiB")

        def on_headers_complete(self) -> None:
            self._in_head, self._head_bytes = False, 0
            self._stop_waiting()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head = True
            self._complete += 1
            super().on_message_complete()

        def _wait_for_head(self) -> None:
            self._patience = self.loop.call_later(config.body_timeout, self._cut, "no request in time")

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _cut(self, why: str) -> None:
            logger.info("a connection was cut off: %s", why)
            self.transport.abort()

    return BoundedHttp


def raise_file_limit() -> None:
    """Let the process have as many sockets as the system allows; where there is no such limit, do nothing."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# HeadRequests: HEAD where GET answers at once, as load balancers and ``curl -I`` ask.

_PATHS = frozenset({"/", "/health", "/version", "/metrics", "/v1/models"})


class HeadRequests:
    """Middleware: answers HEAD as GET, without the body.

    Parameters
    ----------
    app : ASGI application
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)
