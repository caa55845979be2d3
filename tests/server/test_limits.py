"""What the server does not take, what it does not wait for, and what it lets go of."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.server.asgi import RawRequest, client_of, events_of, until
from tests.server.fakes import STORY, FakeEngine, story_tokens
from tests.server.local import thread

from pagedkv.errors import InvalidOperation
from pagedkv.server import ServerConfig, create_app
from pagedkv.server.limits import SlowReaders

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


async def test_a_large_body_is_refused_unread() -> None:
    async with client_of(FakeEngine(), max_body=1000) as client:
        answer = await client.post(URL, json={"prompt": "x" * 1000})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert answer.headers["connection"] == "close"
        assert (await client.post(URL, json={"prompt": "x" * 900})).status_code in (200, 400)


async def test_the_length_that_is_announced_is_enough_to_refuse_a_body() -> None:
    async with client_of(FakeEngine(), max_body=1000) as client:
        answer = await client.post(URL, content=b"{}", headers={"content-length": "1001"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


async def test_a_large_body_that_does_not_say_so_is_refused_when_the_limit_is_passed() -> None:
    pieces_read = 0

    async def pieces() -> Any:
        nonlocal pieces_read
        for _ in range(1000):
            pieces_read += 1
            yield b"x" * 100

    async with client_of(FakeEngine(), max_body=1000) as client:
        answer = await client.post(URL, content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert pieces_read == 11


async def test_a_body_that_does_not_come() -> None:
    app = create_app(FakeEngine(), ServerConfig(body_timeout=0.05))  # type: ignore[arg-type]
    request = RawRequest(app, URL, b"")
    request.inbox = asyncio.Queue()
    request.inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    await request.start()
    assert request.status == 408 and b"body_timeout" in request.body


async def test_a_full_queue() -> None:
    """4 run at once, 2 may wait."""
    engine = FakeEngine(delay=0.02)
    async with client_of(engine, max_queue=2) as client:
        answers = await asyncio.gather(*(client.post(URL, json={"prompt": "a", "max_tokens": 5}) for _ in range(9)))
        assert sorted(answer.status_code for answer in answers) == [200] * 6 + [429] * 3
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
        never = await client.post(URL, json={"prompt": ["a", "b"], "n": 4, "max_tokens": 1})
        assert never.status_code == 400 and "8 texts" in never.json()["error"]["message"]
        full = await client.post(URL, json={"prompt": ["a", "b"], "n": 3, "max_tokens": 1})
        assert full.status_code == 200  # what was taken is given back


async def test_too_many_prompts_and_too_many_requests() -> None:
    engine = FakeEngine(delay=0.05)
    async with client_of(engine, max_prompts=2, max_connections=2) as client:
        many = await client.post(URL, json={"prompt": ["a"] * 3})
        assert many.status_code == 400 and many.json()["error"]["code"] == "too_many_prompts"
        answers = await asyncio.gather(*(client.post(URL, json={"prompt": "a", "max_tokens": 2}) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503]


@pytest.mark.parametrize("stream", [False, True])
async def test_time_is_up(stream: bool) -> None:
    engine = FakeEngine(delay=0.02)
    async with client_of(engine, request_timeout=0.1) as client:
        answer = await client.post(URL, json={"prompt": "a", "max_tokens": 100, "stream": stream})
    if stream:
        *pieces, last = events_of(answer.text)
        assert pieces and last["error"]["code"] == "request_timeout"
    else:
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "timeout_error"
        assert answer.headers["x-should-retry"] == "false"
    assert [call.ended for call in engine.calls] == ["aborted"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [URL, "/v1/chat/completions"])
async def test_who_leaves_is_aborted_at_once(stream: bool, path: str) -> None:
    engine = FakeEngine(delay=0.01)
    app = create_app(engine, ServerConfig(model_name="tiny"))  # type: ignore[arg-type]
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "stream": stream}
    request = RawRequest(app, path, body)
    task = request.start()
    await until(lambda: engine.running == 1 and (not stream or len(request.sent) > 2))
    assert app.state.server.admission.inside == 1
    request.leave()
    await asyncio.wait_for(task, 5)
    assert [call.ended for call in engine.calls] == ["aborted"]
    assert app.state.server.admission.inside == 0


async def test_who_reads_slowly_holds_nobody_up_and_misses_nothing() -> None:
    engine = FakeEngine(delay=0.0005)
    app = create_app(engine, ServerConfig(model_name="tiny"))  # type: ignore[arg-type]
    count = len(story_tokens())
    request = RawRequest(app, URL, {"prompt": "a", "max_tokens": count, "stream": True, "logprobs": 0})
    request.may_send.clear()
    task = request.start()
    await until(lambda: [call.ended for call in engine.calls] == ["finished"])
    assert request.sent == []
    request.may_send.set()
    await asyncio.wait_for(task, 5)
    choices = [event["choices"][0] for event in events_of(request.body.decode())]
    assert len(choices) < count and "".join(choice["text"] for choice in choices) == STORY
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == count


async def test_who_does_not_read_at_all_loses_the_request() -> None:
    engine = FakeEngine(delay=0.01)
    inner = create_app(engine, ServerConfig(model_name="tiny"))  # type: ignore[arg-type]
    request = RawRequest(SlowReaders(inner, 0.05), URL, {"prompt": "a", "max_tokens": 200, "stream": True})
    task = request.start()
    await until(lambda: len(request.sent) > 2)
    request.may_send.clear()
    await asyncio.wait_for(task, 5)
    assert [call.ended for call in engine.calls] == ["aborted"] and inner.state.server.admission.inside == 0


@pytest.mark.parametrize("full", [True, False])
async def test_only_a_client_whose_buffer_is_full_is_timed(full: bool) -> None:
    taken: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})

    async def take(message: Any) -> None:
        await asyncio.sleep(0.2)
        taken.append(message["type"])

    timed = SlowReaders(app, 0.02)
    scope = {"type": "http", "pagedkv.may_wait": lambda: full}
    await timed(scope, take, take)
    assert taken == ([] if full else ["http.response.start"])


async def test_a_server_that_drains_takes_nothing_new_and_says_so() -> None:
    engine = FakeEngine(delay=0.01)
    async with client_of(engine) as client:
        under_way = asyncio.create_task(client.post(URL, json={"prompt": "a", "max_tokens": 20}))
        await until(lambda: engine.running == 1)
        client.app.state.server.draining = True  # type: ignore[attr-defined]
        refused = await client.post(URL, json={"prompt": "a"})
        health = await client.get("/health")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert health.status_code == 503 and health.json() == {"status": "draining"}
        assert (await under_way).status_code == 200


async def test_a_dead_engine_is_told_by_health() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        engine.is_alive = False
        health = await client.get("/health")
    assert health.status_code == 503 and health.json() == {"status": "dead"}


async def test_observers_see_every_request() -> None:
    seen: list[tuple[str, Any]] = []

    class Witness:
        def updated(self, output: Any) -> None:
            seen.append(("updated", len(output.outputs[0].token_ids)))

        def ended(self, output: Any, reason: str) -> None:
            seen.append((reason, None if output is None else len(output.outputs[0].token_ids)))

    engine = FakeEngine()
    async with client_of(engine) as client:
        client.app.state.server.observers.append(Witness())  # type: ignore[attr-defined]
        await client.post(URL, json={"prompt": "a", "max_tokens": 2})
        engine.error = RuntimeError("no")
        await client.post(URL, json={"prompt": "a", "max_tokens": 2})
    assert seen == [("updated", 1), ("updated", 2), ("finished", 2), ("error", None)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"port": -1},
        {"max_body": 0},
        {"max_queue": -1},
        {"max_prompt_tokens": 0},
        {"request_timeout": 0},
        {"head_timeout": 0},
        {"max_bodies": 0},
        {"max_key_share": 0},
        {"max_key_share": 1.5},
        {"request_timeout": float("nan")},
        {"write_timeout": float("inf")},
        {"drain_timeout": float("nan")},
        {"api_keys": ("",)},
        {"operator_keys": ("a",)},
        {"model_name": ""},
        {"log_format": "xml"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOperation, match=next(iter(wrong))):
        ServerConfig(**wrong)


# Over real sockets.


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with thread(FakeEngine(), body_timeout=0.5, max_connections=5, max_body=1_000_000) as server:
        yield server


def connected(served: Any) -> socket.socket:
    parts = urlsplit(served.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)


def test_connections_without_a_request_lock_nobody_out(served: Any) -> None:
    with ExitStack() as stack:
        for place in range(200):
            idle = stack.enter_context(closing(connected(served)))
            idle.sendall((b"", b"GET /health HTTP/1.1\r\nHost:")[place % 2])
        for _ in range(5):
            assert httpx.get(f"{served.url}/health").status_code == 200


def test_what_is_no_http(served: Any) -> None:
    with closing(connected(served)) as connection:
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


@contextmanager
def idle_ones(url: str, sent: list[bytes]) -> Iterator[list[socket.socket]]:
    """Connections that have sent so much, and nothing more."""
    with ExitStack() as stack:
        connections = []
        for each in sent:
            connections.append(stack.enter_context(closing(connected(SimpleNamespace(url=url)))))
            connections[-1].sendall(each)
        yield connections


def is_closed(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_connection_whose_request_does_not_come_is_closed() -> None:
    with thread(FakeEngine(), head_timeout=0.2) as server:
        with idle_ones(server.url, [b"", b"GET /heal", b"GET /health HTTP/1.1\r\nHost:", HEALTH]) as opened:
            assert all(is_closed(connection, 10) for connection in opened[:3])
            assert b"200 OK" in opened[3].recv(65536)
            assert not is_closed(opened[3], 0.6), "after a request it may be idle for longer"
            opened[3].sendall(b"GET /health HTTP")
            assert is_closed(opened[3], 10), "but not in the middle of the next one"


def test_a_request_that_takes_longer_than_its_head_may_is_answered() -> None:
    with thread(FakeEngine(delay=0.1), head_timeout=0.2) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 8}, timeout=20)
    assert answer.status_code == 200


def test_the_oldest_idle_connection_makes_way_for_a_new_one() -> None:
    with thread(FakeEngine(), max_connections=2, head_timeout=60) as server:
        with idle_ones(server.url, [b""] * 40) as opened:
            assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
            assert all(is_closed(connection, 10) for connection in opened[:30])
            assert not is_closed(opened[-1], 0.1)
