"""A server that shuts down, over real sockets: who is told what, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tests.server.asgi import events_of, until
from tests.server.fakes import Call, FakeEngine

from pagedkv.engine import RequestOutput, SamplingParams
from pagedkv.server import ServerConfig
from pagedkv.server.run import listen, make_server


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class SilentEngine(FakeEngine):
    """Writes nothing until it is shut down."""

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        self.calls.append(Call(list(prompt), params, options))
        await until(lambda: not self.is_alive, 60)
        async for output in super().generate(prompt, params, **options):
            yield output


@contextmanager
def leaving(drain_timeout: float, tokens: int, silent: bool = False) -> Iterator[Any]:
    """A server that begins to shut down while a plain and a streaming request of so many tokens are under way.

    The head of the stream's answer, which comes with its first token, has arrived by then, unless the engine is silent.
    """
    config = ServerConfig(model_name="pysmall", port=0, drain_timeout=drain_timeout)
    engine = (SilentEngine if silent else FakeEngine)(delay=0.01, max_positions=20_000)
    ready, head = threading.Event(), threading.Event()
    with listen(config) as listener, ThreadPoolExecutor() as pool:
        server = make_server(engine, config, ready.set)  # type: ignore[arg-type]
        worker = threading.Thread(target=server.run, args=([listener],), daemon=True)
        worker.start()
        assert ready.wait(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def ask(stream: bool) -> httpx.Response:
            body = {"prompt": "a", "max_tokens": tokens, "stream": stream}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                if stream:
                    head.set()
                answer.read()
            return answer

        plain, stream = pool.submit(ask, False), pool.submit(ask, True)
        soon(lambda: engine.running == 2 and head.is_set() is not silent)
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


def test_a_stream_that_has_not_begun_is_refused_with_a_status() -> None:
    with leaving(drain_timeout=0, tokens=2, silent=True) as server:
        plain, stream = server.plain(), server.stream()
        assert plain.status_code == stream.status_code == 503 and plain.json() == stream.json()
        assert stream.json()["error"]["code"] == "aborted" and int(stream.headers["retry-after"]) >= 1
