"""HTTP server process: listen, serve, and drain on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from pagedkv.errors import InvalidOperation
from pagedkv.server.app import create_app
from pagedkv.server.background import quiet_collections
from pagedkv.server.config import ServerConfig
from pagedkv.server.connections import Connections, ConnectionsInUse
from pagedkv.server.engines import ServedEngine
from pagedkv.server.limits import SlowReaders
from pagedkv.server.logs import JsonFormatter
from pagedkv.server.state import ServerState

BACKLOG = 2048
ACCEPTS = 32
"""Connections that are taken in one turn of the event loop: uvloop takes one from each listening socket."""
GRACE_SECONDS = 5
QUIET = 64  # requests under way


def listen(config: ServerConfig) -> socket.socket:
    """Return a socket that is bound to the host and port of a config, so that a port in use is found at once.

    Raises
    ------
    InvalidOperation
        It cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise InvalidOperation(f"host: cannot listen on {config.host}:{config.port}: {reason}", "host") from None
    return listener


def run(
    engine: ServedEngine,
    config: ServerConfig,
    listener: socket.socket | None = None,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve an engine until SIGTERM or SIGINT; then let running requests end, for ``config.drain_timeout`` at most.

    Parameters
    ----------
    engine : ServedEngine
        Shut down at the end.
    config : ServerConfig
    listener : socket, optional
        Of `listen`.
    on_ready : callable
        Called once requests are answered.
    """
    raise_file_limit()
    server = make_server(engine, config, on_ready)
    under_way = server.server_state.tasks
    with quiet_collections(lambda: len(under_way) < QUIET):
        server.run([listener or listen(config)])


def make_server(
    engine: ServedEngine, config: ServerConfig, on_ready: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """Return the HTTP server of an engine, for a caller that runs it in a thread of its own; see `run`."""
    app = create_app(engine, config)
    settings = uvicorn.Config(
        ConnectionsInUse(SlowReaders(app, config.write_timeout)),
        log_config=None,
        access_log=False,
        backlog=BACKLOG,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        ws="none",
        lifespan="on",
    )
    settings.load()
    connections = Connections(min(4 * config.max_connections, file_limit() // 4), config.head_timeout)
    protocol: Any = connections.protocol_around(settings.http_protocol_class)
    settings.http_protocol_class = protocol
    return _Server(settings, app.state.server, connections, on_ready)


def raise_file_limit() -> None:
    """Let the process have as many sockets as the system allows; where there is no such limit, do nothing."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def file_limit() -> int:
    """Return how many files and sockets the process may have open."""
    try:
        import resource
    except ImportError:
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def show_logs(config: ServerConfig) -> None:
    """Write the logs to stderr in the format of a config."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else text)
    for name, level in (("pagedkv", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


class _Server(uvicorn.Server):
    """Says when it is ready and when it drains, and ends with success after a signal."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, connections: Connections, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._state, self._connections, self._on_ready = state, connections, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # A probe waits until all are taken that came before it, though not until they are served.
        copies = [listener.dup() for listener in sockets or [] for _ in range(ACCEPTS - 1)]
        await super().startup([*sockets, *copies] if sockets else None)
        if self.started and not self.should_exit:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn's closes the listener first. Before that what is under way comes to its end, while other clients are
        # told that the server goes; what is not done in time is told, too, and its answer is still delivered.
        self._state.draining = True
        deadline = time.monotonic() + self._state.config.drain_timeout
        while self._state.admission.inside and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.05)
        await self._state.engine.shutdown(drain=False)
        self._connections.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.draining = True
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # As uvicorn's, but a signal that was obeyed is not raised again: the process ends with 0.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
