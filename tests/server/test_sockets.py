"""Connections that never become a request."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.server.fakes import FakeEngine
from tests.server.local import thread


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with thread(FakeEngine(), body_timeout=0.5, max_connections=5, max_body=1_000_000) as server:
        yield server


def connected(served: Any) -> Any:
    parts = urlsplit(served.url)
    return closing(socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10))


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHost:", b"GET /health HT"])
def test_a_request_that_does_not_come(served: Any, said: bytes) -> None:
    with connected(served) as connection:
        connection.sendall(said)
        assert is_closed(connection)


def answer(connection: socket.socket) -> bytes:
    """Read one answer: its head and its small JSON body may come apart."""
    got = b""
    while not got.endswith(b"}"):
        got += connection.recv(65536) or b"}"
    return got


def test_a_second_request_that_does_not_come(served: Any) -> None:
    with connected(served) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200 OK" in answer(connection)
        time.sleep(0.6)  # idle, which it may be
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200 OK" in answer(connection)
        connection.sendall(b"GET /ver")
        assert is_closed(connection)


def test_a_head_without_an_end(served: Any) -> None:
    with connected(served) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: " + b"a" * 1_000_000)
        except ConnectionError:
            return
        assert is_closed(connection)


def test_too_many_connections(served: Any) -> None:
    opened = [connected(served) for _ in range(30)]
    try:
        time.sleep(0.1)
        with closing(socket.create_connection(opened[0].thing.getpeername(), timeout=10)) as another:
            assert is_closed(another)
    finally:
        for each in opened:
            each.thing.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"{served.url}/health").status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server did not come back")


def test_what_is_no_http(served: Any) -> None:
    with connected(served) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")


def test_a_refused_body_is_read_on_so_that_the_client_sees_the_answer(served: Any) -> None:
    for _ in range(5):
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x" * 3_000_000}, timeout=20)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_a_large_body_is_no_large_head(served: Any) -> None:
    with httpx.Client(timeout=20) as client:
        for size in (60_000, 70_000, 200_000, 900_000):
            answer = client.post(f"{served.url}/v1/completions", json={"prompt": "x = 1\n" * (size // 8)})
            assert answer.json()["error"]["code"] == "context_length_exceeded"
