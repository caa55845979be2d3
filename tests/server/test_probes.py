"""What could keep a probe waiting: full garbage collections, many requests in a turn of the loop, idle connections."""

from __future__ import annotations

import asyncio
import gc
import inspect
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from tests.server.asgi import RawRequest, until
from tests.server.fakes import FakeEngine
from tests.server.local import thread

import pagedkv.server.run as server_run
from pagedkv.server import ServerConfig, create_app
from pagedkv.server.app import ROUTERS
from pagedkv.server.background import quiet_collections
from pagedkv.server.connections import AT_ONCE, Connections, ConnectionsInUse
from pagedkv.server.generation import Generation

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


# Garbage collection.


class Circle:
    """What only a full collection frees, once it has grown old."""

    def __init__(self) -> None:
        self.me = self


def old_circle() -> weakref.ref[Circle]:
    one = Circle()
    gc.collect(0)
    gc.collect(1)
    return weakref.ref(one)


async def test_what_is_there_at_the_start_is_not_looked_at_again() -> None:
    thresholds = gc.get_threshold()
    with quiet_collections(lambda: True):
        assert gc.get_freeze_count() > 10_000 and len(gc.get_objects()) < 10_000
        assert gc.get_threshold()[2] > 10**6
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == thresholds


async def test_collections_wait_for_a_quiet_moment() -> None:
    looked, quiet = 0, False

    def is_quiet() -> bool:
        nonlocal looked
        looked += 1
        return quiet

    with quiet_collections(is_quiet, seconds=0.01):
        circle = old_circle()
        before = looked
        await until(lambda: looked > before + 3)
        assert circle() is not None
        quiet = True
        await until(lambda: circle() is None)


def test_a_server_keeps_what_it_was_made_of_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fake = SimpleNamespace(
        server_state=SimpleNamespace(tasks=set()), run=lambda sockets: seen.append(gc.get_freeze_count())
    )
    monkeypatch.setattr(server_run, "make_server", lambda *_: fake)
    with socket.socket() as listener:
        server_run.run(FakeEngine(), ServerConfig(), listener)  # type: ignore[arg-type]
    assert seen[0] > 10_000


@contextmanager
def garbage() -> Iterator[list[Any]]:
    """What the collector finds of the objects that are made meanwhile."""
    found: list[Any] = []
    gc.freeze()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("way", ["plain", "stream", "left", "late", "refused", "broken"])
async def test_a_request_leaves_nothing_for_the_garbage_collector(way: str) -> None:
    engine = FakeEngine(delay=0.01)
    limits: dict[str, Any] = {"max_queue": 0} if way == "refused" else {}
    config = ServerConfig(request_timeout=0.05 if way == "late" else 20, **limits)
    app = create_app(engine, config)  # type: ignore[arg-type]
    engine.fails_after = 1 if way == "broken" else None
    body = {"prompt": ["a"] * (5 if way == "refused" else 1), "max_tokens": 30, "stream": way == "stream"}

    async def serve() -> None:
        request = RawRequest(app, URL, body)
        task = request.start()
        if way == "left":
            await until(lambda: engine.running == 1)
            request.leave()
        with suppress(Exception):
            await asyncio.wait_for(task, 10)

    await serve()
    with garbage() as found:
        await serve()
        await asyncio.sleep(0)
    assert not [each for each in found if isinstance(each, (Generation, asyncio.Task))]


# Turns of the event loop.


def calls_of(dependant: Dependant) -> Iterator[Any]:
    yield dependant.call
    for each in dependant.dependencies:
        yield from calls_of(each)


def test_nothing_that_a_route_needs_waits_for_a_thread() -> None:
    """FastAPI has a pool of threads for functions that are not coroutines, and a probe would queue for it."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    calls = {call for route in routes for call in calls_of(route.dependant)}
    plain = [call for call in calls if not inspect.iscoroutinefunction(call)]  # HTTPBearer is an object
    assert len(calls) > 20 and [call for call in plain if not inspect.iscoroutinefunction(type(call).__call__)] == []


class Wire(asyncio.Transport):
    """The transport of a connection that is only thought of."""

    reads, closing = True, False

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})

    def pause_reading(self) -> None:
        assert self.reads
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return self.closing


class Heard:
    """What HTTP protocols hear, and in which turn of the loop."""

    def __init__(self) -> None:
        self.turn = 0
        self.requests: list[tuple[bytes, int]] = []
        heard = self

        class Http(asyncio.Protocol):
            def __init__(self, app_state: Any) -> None: ...

            def data_received(self, data: bytes) -> None:
                heard.requests.append((data, heard.turn))

        self._make = Connections(1000, 60).protocol_around(Http)

    def connect(self) -> tuple[Any, Wire]:
        connection, wire = self._make(app_state={}), Wire()
        connection.connection_made(wire)
        return connection, wire

    def ask(self, path: str) -> Wire:
        connection, wire = self.connect()
        connection.data_received(f"GET {path} HTTP/1.1".encode())
        return wire

    async def count_turns(self, turns: int) -> list[str]:
        for _ in range(turns):
            self.turn += 1
            await asyncio.sleep(0)
        return [data.split()[1].decode() for data, _ in self.requests]


async def test_few_requests_begin_in_one_turn_of_the_loop_and_probes_go_first() -> None:
    heard = Heard()
    wires = [heard.ask(f"/{place}") for place in range(100)] + [heard.ask("/health"), heard.ask("/metrics?a=1")]
    assert len(heard.requests) == AT_ONCE and [wire.reads for wire in wires] == [True] * AT_ONCE + [False] * (
        102 - AT_ONCE
    )
    paths = await heard.count_turns(40)
    probes = slice(AT_ONCE, AT_ONCE + 2)
    assert paths[probes] == ["/health", "/metrics?a=1"]
    del paths[probes]
    assert paths == [f"/{place}" for place in range(100)]
    turns = [turn for _, turn in heard.requests]
    assert max(turns.count(turn) for turn in turns) == AT_ONCE and all(wire.reads for wire in wires)


async def test_who_leaves_before_its_turn_takes_no_place() -> None:
    heard = Heard()
    wires = [heard.ask(f"/{place}") for place in range(3 * AT_ONCE)]
    for wire in wires[AT_ONCE : 2 * AT_ONCE]:
        wire.closing = True
    paths = await heard.count_turns(2)
    assert paths == [f"/{place}" for place in (*range(AT_ONCE), *range(2 * AT_ONCE, 3 * AT_ONCE))]
    await heard.count_turns(2)
    assert heard.ask("/again").reads


async def test_a_body_waits_for_its_turn_too_and_nothing_of_it_is_lost() -> None:
    heard = Heard()
    begun = [heard.connect() for _ in range(AT_ONCE + 1)]
    for connection, _ in begun:
        connection.begin()
        connection.data_received(b"POST /a ")
    late, wire = begun[-1]
    assert not wire.reads
    wire.resume_reading()  # as the HTTP server does when there is room for more of a body
    late.data_received(b"and /b")
    await heard.count_turns(3)
    assert heard.requests[-1] == (b"POST /a and /b", 1) and len(heard.requests) == AT_ONCE + 1


def test_many_requests_at_once_with_bodies_in_pieces_are_all_answered() -> None:
    with thread(FakeEngine(), max_connections=200) as server, ThreadPoolExecutor(32) as pool:

        def ask(size: int) -> int:
            body = {"prompt": "x" * size, "max_tokens": 1}
            return httpx.post(f"{server.url}{URL}", json=body, timeout=60).status_code

        assert set(pool.map(ask, [10, 200_000] * 48)) == {200, 400}


# Connections.


def test_many_connections_are_taken_in_one_turn_and_the_port_is_free_at_the_end() -> None:
    """uvloop takes one in each turn from each listening socket, and a probe that comes last waits for all before it."""
    ready = threading.Event()
    with server_run.listen(ServerConfig(port=0)) as listener:
        address = listener.getsockname()
        server = server_run.make_server(FakeEngine(), ServerConfig(drain_timeout=0), ready.set)  # type: ignore[arg-type]
        worker = threading.Thread(target=server.run, args=([listener],), daemon=True)
        worker.start()
        assert ready.wait(60) and len(server.servers) == server_run.ACCEPTS
        server.should_exit = True
        worker.join(30)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)


async def test_a_request_is_told_whether_the_buffer_of_its_connection_is_full() -> None:
    protocol: Any = Connections(10, 60).protocol_around(asyncio.Protocol)(app_state={})
    protocol.connection_made(Wire())
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for change in (protocol.pause_writing, protocol.resume_writing):
            seen.append(scope["pagedkv.may_wait"]())
            change()
            seen.append(scope["pagedkv.may_wait"]())

    await ConnectionsInUse(app)({"type": "http", "state": {"pagedkv.connection": protocol}}, app, app)
    assert seen == [False, True, True, False]
    protocol.connection_lost(None)


async def test_a_connection_that_says_nothing_has_no_http_protocol() -> None:
    made: list[Any] = []

    class Http(asyncio.Protocol):
        def __init__(self, **given: Any) -> None:
            made.append(self)
            self.heard: list[Any] = [given["app_state"].keys()]

        def connection_made(self, transport: Any) -> None:
            self.heard.append(transport)

        def data_received(self, data: bytes) -> None:
            self.heard.append(data)

    protocol = Connections(10, 60).protocol_around(Http)(app_state={"a": 1})
    transport = Wire()
    protocol.connection_made(transport)
    protocol.pause_writing()
    protocol.resume_writing()
    assert made == []
    protocol.data_received(b"GET")
    protocol.data_received(b" /")
    (http,) = made
    assert "a" in http.heard[0] and http.heard[1:] == [transport, b"GET", b" /"]
    protocol.connection_lost(None)
    silent = Connections(10, 60).protocol_around(Http)(app_state={})
    silent.connection_made(transport)
    assert silent.eof_received() is None
    silent.connection_lost(None)
    assert len(made) == 1


async def test_a_connection_that_is_over_leaves_nothing_for_the_garbage_collector() -> None:
    class Http(asyncio.Protocol):
        def __init__(self, app_state: dict[str, Any]) -> None:
            self.app_state = app_state

    protocol = Connections(10, 60).protocol_around(Http)(app_state={})
    protocol.connection_made(Wire())
    protocol.data_received(b"GET")
    left = weakref.ref(protocol)
    with garbage():
        protocol.connection_lost(None)
        del protocol
        assert left() is None


def test_a_server_that_ends_closes_connections_that_said_nothing() -> None:
    with thread(FakeEngine(), head_timeout=60) as server:
        parts = urlsplit(server.url)
        silent = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)
    with closing(silent):
        assert silent.recv(1) == b""
