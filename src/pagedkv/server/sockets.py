"""Limits of a connection before there is a request: how many, how long a head, how slow."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pagedkv.server.config import ServerConfig

__all__ = ["MOST_HEAD_BYTES", "bounded_http", "raise_file_limit"]

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
