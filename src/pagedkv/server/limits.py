"""Request limits: how many at a time, whose bodies, how large, how slow to arrive and to be read."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedkv.server.auth import is_known
from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import ApiError, ClientLeft, error_response
from pagedkv.server.origins import foreign

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
        refusal = foreign(config, scope["method"], scope["headers"])
        if refusal is not None:
            return refusal
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > config.max_body:
            return self._too_large()
        # Every POST takes a key, and no body is read before its key is known.
        if scope["method"] == "POST" and not is_known(config, headers.get(b"authorization")):
            message = "expected the header Authorization: Bearer <key> with a key that the server knows"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", **_CLOSE})
        return None

    def _too_large(self) -> ApiError:
        message = f"the body is larger than the {self._config.max_body} bytes that the server takes"
        return ApiError(413, message, code="body_too_large", headers=_CLOSE)

    def _bounded(self, receive: Receive) -> Receive:
        """Count what comes, and wait for it until the deadline only."""
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


class SlowReaders:
    """Middleware right below the HTTP server: ends a request whose client does not take what is sent to it.

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
        is_late = False

        async def bounded(message: Message) -> None:
            nonlocal is_late
            if not is_late:
                try:
                    async with asyncio.timeout(self._seconds):
                        return await send(message)
                except TimeoutError:
                    is_late = True
            raise ClientLeft("the client does not read")

        try:
            await self._app(scope, receive, bounded)
        except Exception:
            if not is_late:
                raise


# HEAD where GET answers at once, as load balancers and ``curl -I`` ask.

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
