"""After every kind of client, nothing is left over."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.server.local import SMALL, make_engine, process, settle, thread
from tests.server.soaking import Soak

LIMITS = {"max_body": 1_000_000, "max_queue": 8, "write_timeout": 5.0, "request_timeout": 60.0}
KEYS = ("key-a", "key-b")
KINDS = ("ask", "leave", "nonsense", "too_much", "read_slowly")


def check(server: Any, soak: Soak, count: int) -> None:
    assert soak.seen.total() == count
    assert {kind.split()[0] for kind in soak.seen} == set(KINDS), soak.seen
    statuses = {kind.split()[1] for kind in soak.seen}
    assert statuses <= {"200", "400", "413", "429", "left", "cut"}, soak.seen
    assert soak.seen["ask 200"] > count // 10 and soak.seen["too_much 413"]
    assert soak.seen["nonsense 400"]
    settle(server.engine)
    assert server.cache.used_block_count == 0 and server.cache.num_sequences == 0
    server.cache.check()
    assert server.engine.is_alive


def test_some_hundred_requests_leave_nothing_behind() -> None:
    """The pool is so small that texts are preempted."""
    with thread(make_engine(num_blocks=96, max_num_seqs=12), api_keys=KEYS, **LIMITS) as server:
        soak = Soak(server.url, seed=1, keys=KEYS)
        asyncio.run(soak.run(300))
        check(server, soak, 300)
        assert server.engine.stats().aborted_requests > 0


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind_and_memory_flat() -> None:
    with thread(make_engine(num_blocks=256, max_num_seqs=16), api_keys=KEYS, **LIMITS) as server:
        first = Soak(server.url, seed=2, keys=KEYS)
        asyncio.run(first.run(2000))
        check(server, first, 2000)
        before = resident()
        rest = Soak(server.url, seed=3, keys=KEYS)
        asyncio.run(rest.run(8000))
        check(server, rest, 8000)
        grown = resident() - before
        print(f"{(first.seen + rest.seen)}; grown by {grown / 1e6:.1f} MB")
        assert grown < 48e6


def test_a_full_queue_is_a_rate_limit_error() -> None:
    with thread(make_engine(num_blocks=512, max_num_seqs=1), max_queue=1) as server:

        async def ask() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                calls = [client.completions.create(model="pysmall", prompt="x = ", max_tokens=50) for _ in range(5)]
                return await asyncio.gather(*calls, return_exceptions=True)

        answers = asyncio.run(ask())
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert len(refused) == 3 and all(int(each.response.headers["retry-after"]) >= 1 for each in refused)


def test_kill_does_no_harm_and_sigterm_lets_requests_end(tmp_path: Path) -> None:
    body = {"prompt": "class Parser:", "max_tokens": 2000, "temperature": 0, "ignore_eos": True, "stream": True}
    with process(tmp_path / "log", *SMALL) as first:
        with httpx.stream("POST", f"{first.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
            first.kill()
    log = tmp_path / "json"
    with process(log, *SMALL, "--log-format", "json", port=first.port) as second:
        body["max_tokens"] = 400
        with httpx.stream("POST", f"{second.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            second.process.terminate()
            text = "\n".join(lines)
        assert text.rstrip().endswith("[DONE]") and '"finish_reason":"length"' in text
        assert second.process.wait(30) == 0
    (line,) = [line for line in log.read_text().splitlines() if "/v1/completions" in line and line.startswith('{"')]
    told = json.loads(line)
    assert told["event"] == "request" and told["status"] == 200 and told["completion_tokens"] == 400
    assert "Parser" not in log.read_text()
