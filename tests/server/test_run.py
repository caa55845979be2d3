"""A server that shuts down, over real sockets: who is told what, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tests.server.asgi import events_of
from tests.server.fakes import FakeEngine

from pagedkv.server import ServerConfig
from pagedkv.server.run import listen, make_server


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def leaving(drain_timeout: float, tokens: int) -> Iterator[Any]:
    """A server that begins to shut down while a plain and a streaming request of so many tokens are under way."""
    config = ServerConfig(model_name="pysmall", port=0, drain_timeout=drain_timeout)
    engine, ready = FakeEngine(delay=0.01, max_positions=20_000), threading.Event()
    with listen(config) as listener, ThreadPoolExecutor() as pool:
        server = make_server(engine, config, ready.set)  # type: ignore[arg-type]
        worker = threading.Thread(target=server.run, args=([listener],), daemon=True)
        worker.start()
        assert ready.wait(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def ask(stream: bool) -> httpx.Response:
            body = {"prompt": "a", "max_tokens": tokens, "stream": stream}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        plain, stream = pool.submit(ask, False), pool.submit(ask, True)
        soon(lambda: engine.running == 2)
        server.should_exit = True
        yield SimpleNamespace(url=url, plain=plain.result, stream=stream.result, state=server._state, worker=worker)  # type: ignore[attr-defined]
        worker.join(60)
        assert not worker.is_alive() and not engine.is_alive


def test_what_runs_ends_well_while_newcomers_are_told() -> None:
    with leaving(drain_timeout=60, tokens=150) as server:
        soon(lambda: server.state.draining)
        health = httpx.get(f"{server.url}/health")
        newcomer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        assert health.status_code == 503 and health.json() == {"status": "draining"}
        assert newcomer.status_code == 503 and newcomer.json()["error"]["code"] == "draining"
        assert int(newcomer.headers["retry-after"]) >= 1
        assert server.plain().json()["usage"]["completion_tokens"] == 150
        assert events_of(server.stream().text)[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("drain_timeout", [0, 0.2])
def test_what_takes_too_long_is_told_so(drain_timeout: float) -> None:
    with leaving(drain_timeout, tokens=10_000) as server:
        plain, error = server.plain(), events_of(server.stream().text)[-1]
        assert plain.status_code == 503 and plain.json()["error"] == error["error"]
        assert error["error"]["code"] == "aborted" and "shutting down" in error["error"]["message"]
