"""Request limits: how many at a time, whose bodies, how large, how slow to arrive and to be read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagedkv.server.admission import Budget
from pagedkv.server.auth import name_of_caller
from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import CLOSE, ApiError, ClientLeft, error_response
from pagedkv.server.origins import foreign

LINGER_SECONDS, LINGER_BYTES, LINGER_PAUSE = 2.0, 64 << 20, 0.001
SMALL_BODY = 64 << 10
"""So many bytes of each body do not count: what is short is taken, however much others send."""
PROBES = frozenset({"/health", "/version", "/metrics"})
"""What is answered however many requests are under way."""
_READ = (b"content-length", b"authorization", b"x-api-key")


class Limits:
    """Middleware: refuses what is too much before it is read, and counts by key what is under way.

    Parameters
    ----------
    app : ASGI application
    config : ServerConfig
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config
        share = config.key_share
        self._requests = Budget(config.max_connections, max(1, int(config.max_connections * share)))
        bodies = max(config.max_bodies, config.max_body)
        self._bytes = Budget(bodies, max(config.max_body, int(bodies * share)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        tenant = name_of_caller(self._config, headers)
        scope["pagedkv.tenant"] = tenant or ""
        body = _Body(self._config, self._bytes, tenant or "")
        try:
            self._let_in(scope, tenant, headers)
            body.expect(headers.get(b"content-length", b""))
        except ApiError as refusal:
            await _refuse(refusal, scope, receive, send)
            return
        counts = scope["path"] not in PROBES
        if counts and not self._requests.take(tenant or ""):
            body.release()
            await _refuse(self._too_many(), scope, receive, send)
            return
        try:
            await self._app(scope, body.bounded(receive), send)
        finally:
            body.release()
            if counts:
                self._requests.give(tenant or "")

    def _let_in(self, scope: Scope, tenant: str | None, headers: dict[bytes, bytes]) -> None:
        refusal = foreign(self._config, scope["method"], scope["headers"])
        if refusal is not None:
            raise refusal
        # Every POST takes a key, and no body is read before its key is known.
        if scope["method"] == "POST" and tenant is None:
            message = "expected the header Authorization: Bearer <key>, or x-api-key, with a key that the server knows"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", **CLOSE})

    def _too_many(self) -> ApiError:
        requests = self._requests
        if requests.has_room():
            message = f"at most {requests.each} requests of one key may be under way"
            return ApiError(429, message, code="too_many_requests", retry_after=1, headers=CLOSE)
        message = f"the server is busy: {requests.taken} requests are under way, at most {requests.total} may be"
        return ApiError(503, message, code="too_many_connections", retry_after=1, headers=CLOSE)


class _Body:
    """The body of one request: how much of it there is, and how much of the budget is held for it."""

    def __init__(self, config: ServerConfig, budget: Budget, tenant: str) -> None:
        self._config, self._budget, self._tenant = config, budget, tenant
        self._held = self._come = 0

    def expect(self, length: bytes) -> None:
        """Hold what the header Content-Length says; 413 or 429 if that is too much."""
        if length.isdigit():
            self._hold(int(length[:20]))

    def release(self) -> None:
        """Give back what is held."""
        self._budget.give(self._tenant, self._held)
        self._held = 0

    def bounded(self, receive: Receive) -> Receive:
        """Return what receives it: counts what comes, and waits for it until the deadline only."""
        complete = False
        deadline = asyncio.get_running_loop().time() + self._config.body_timeout

        async def bounded() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                text = f"the body did not arrive within {self._config.body_timeout:g} seconds"
                raise ApiError(408, text, code="body_timeout", headers=CLOSE) from None
            self._come += len(message.get("body", b""))
            self._hold(self._come)
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded

    def _hold(self, size: int) -> None:
        """Hold so many bytes in all."""
        if size > self._config.max_body:
            message = f"the body is larger than the {self._config.max_body} bytes that the server takes"
            raise ApiError(413, message, code="body_too_large", headers=CLOSE)
        more = max(0, size - SMALL_BODY - self._held)
        if not self._budget.take(self._tenant, more):
            who = "all requests" if not self._budget.has_room(more) else "the requests of one key"
            most = self._budget.total if who == "all requests" else self._budget.each
            message = f"the server is busy: the bodies of {who} that are under way may have {most} bytes"
            raise ApiError(429, message, code="too_many_bytes", retry_after=1, headers=CLOSE)
        self._held += more


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body has come, and take what still comes for a while.

    A connection that is closed while the client still writes is reset, and the client never sees the answer.
    """
    answer = error_response(error, scope["path"])
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
                await asyncio.sleep(LINGER_PAUSE)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class SlowReaders:
    """Middleware right below the HTTP server: ends a request whose client does not take what is sent to it.

    Parameters
    ----------
    app : ASGI application
    seconds : float
        For each message. What the kernel and the HTTP server buffer counts as taken. Where a connection tells whether
        its buffer is full, there is no need for a clock as long as it is not.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_late = False
        may_wait: Callable[[], bool] = scope.get("pagedkv.may_wait", lambda: True)

        async def bounded(message: Message) -> None:
            nonlocal is_late
            if not is_late:
                if not may_wait():
                    return await send(message)
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
