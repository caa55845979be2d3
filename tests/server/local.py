"""Real servers on localhost: a process of its own, or a thread of this one with the engine in reach."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

PROGRAM = [sys.executable, "-c", "from pagedkv.cli import main; main()", "serve"]
SMALL = ["--num-blocks", "1024", "--max-num-seqs", "32"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Process:
    """``pagedkv serve`` in a process."""

    def __init__(self, log: Path, *options: str, port: int | None = None, env: dict[str, str] | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*PROGRAM, *options, "--port", str(self.port)], stderr=stream, stdout=stream, env=environment
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 500  # kernels may have to be compiled first
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"the server did not start: {self.log.read_text()}")

    def stop(self) -> int:
        """End it politely and return its exit code."""
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        self.process.kill()
        self.process.wait(60)


@contextmanager
def process(log: Path, *options: str, **settings: Any) -> Iterator[Process]:
    started = Process(log, *options, **settings)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


def make_engine(**options: Any) -> Any:
    """An engine of the shipped model in float32."""
    import torch
    from tests.server.fakes import shipped_tokenizer
    from transformers import AutoModelForCausalLM

    from pagedkv.engine import LLM, AsyncEngine
    from pagedkv.models import shipped_model_path

    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()
    return AsyncEngine(LLM(model, shipped_tokenizer(), **{"num_blocks": 1024, "max_num_seqs": 32, **options}))


@contextmanager
def thread(engine: Any, **settings: Any) -> Iterator[Any]:
    """Serve an engine from a thread: url, engine, state."""
    from pagedkv.server import ServerConfig
    from pagedkv.server.run import listen, make_server

    config = ServerConfig(**{"model_name": "pysmall", "port": 0, "drain_timeout": 5, **settings})
    ready = threading.Event()
    with listen(config) as listener:
        server = make_server(engine, config, ready.set)
        worker = threading.Thread(target=server.run, args=([listener],), daemon=True)
        worker.start()
        assert ready.wait(60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            cache = engine.llm.core.runner.cache if hasattr(engine, "llm") else engine.cache
            yield SimpleNamespace(url=url, engine=engine, cache=cache)
        finally:
            server.should_exit = True
            worker.join(30)
            assert not worker.is_alive()


def settle(engine: Any, seconds: float = 20.0) -> None:
    """Wait until the engine has nothing to do."""
    deadline = time.monotonic() + seconds
    while engine.stats().num_running + engine.stats().num_waiting:
        assert time.monotonic() < deadline, engine.stats()
        time.sleep(0.01)
