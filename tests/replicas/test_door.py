"""The server in front of many engines: the same API, metrics of each, health of all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tests.replicas.links import LocalLink
from tests.server.fakes import shipped_tokenizer
from tests.server.local import thread

from pagedkv.replicas.engine import FleetEngine


@pytest.fixture
def door(engines: dict[str, Any]) -> Iterator[Any]:
    import asyncio

    link = LocalLink(a=engines["a"], b=engines["b"])
    engine = asyncio.run(FleetEngine.of(link, shipped_tokenizer()))
    engine.cache = None
    with thread(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield SimpleNamespace(client=client, link=link, engine=engine)
    assert link.closed == 1


def completion(door: Any, **more: Any) -> httpx.Response:
    body = {"prompt": "def f(n):\n    return n" * 8, "max_tokens": 8, "temperature": 0, **more}
    response: httpx.Response = door.client.post("/v1/completions", json=body)
    return response


def test_answers_are_those_of_one_engine(door: Any, engines: dict[str, Any]) -> None:
    message = {"max_tokens": 5, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}
    with thread(engines["alone"]) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        alone = completion(SimpleNamespace(client=client), logprobs=2).json()
        told = client.post("/v1/messages", json=message).json()
    for _ in range(2):
        assert completion(door, logprobs=2).json()["choices"] == alone["choices"]
        chat = door.client.post("/v1/messages", json=message)
        assert chat.status_code == 200 and chat.json()["usage"]["output_tokens"] == 5
        assert chat.json()["content"] == told["content"]


def test_health_says_how_many_are_ready(door: Any) -> None:
    assert door.client.get("/health").json() == {"status": "ok", "replicas": {"ready": 2, "wanted": 2}}
    door.link.lost = {"a"}
    assert door.client.get("/health").json() == {"status": "ok", "replicas": {"ready": 1, "wanted": 2}}
    door.link.lost = {"a", "b"}
    answer = door.client.get("/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "waiting", "replicas": {"ready": 0, "wanted": 2}}


def metric(text: str, name: str) -> dict[str, float]:
    found = re.findall(rf'^pagedkv:{name}{{[^}}]*?(?:replica="(\w+)")?}} (\S+)$', text, re.M)
    return {replica: float(value) for replica, value in found}


def test_metrics_are_told_of_each_replica(door: Any) -> None:
    door.client.post("/v1/cache/clear", json={})
    for _ in range(4):
        assert completion(door).status_code == 200
    import asyncio

    asyncio.run(door.engine.refresh())
    text = door.client.get("/metrics").text
    hits = metric(text, "prefix_cache_hits_total")
    assert hits.keys() == {"a", "b"} and all(value >= 16 for value in hits.values())
    assert metric(text, "num_requests_running") == {"a": 0.0, "b": 0.0}
    assert metric(text, "replicas_ready") == {"": 2.0} == metric(text, "replicas_wanted")
    assert text.count("# TYPE pagedkv:prefix_cache_hits_total counter") == 1
    assert metric(text, "request_success_total") or "request_success_total" in text


def test_the_cache_that_is_shown_is_that_of_all(door: Any) -> None:
    for _ in range(2):
        completion(door)
    shown = door.client.get("/v1/cache").json()
    assert shown["num_blocks"] == 512 and shown["blocks"]["cached"] >= 4
    assert door.client.get("/v1/cache/snapshot").status_code == 200
    assert door.client.post("/v1/cache/clear", json={}).json()["cleared_blocks"] == shown["blocks"]["cached"]


def test_an_answer_that_no_replica_can_end_ends_with_an_error(door: Any) -> None:
    door.link.loses_after = {"a": 1, "b": 1}
    answer = completion(door)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"


def test_a_stream_that_no_replica_can_end_ends_with_an_error(door: Any) -> None:
    door.link.loses_after = {"a": 3, "b": 3}
    events = [line[6:] for line in completion(door, stream=True, max_tokens=200).text.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "replica_lost"
    assert json.loads(events[0])["choices"][0]["text"]


def test_a_stream_goes_on_at_another_replica(door: Any) -> None:
    whole = completion(door, max_tokens=24).json()["choices"][0]["text"]
    door.link.loses_after = {door.link.asked[-1][0]: 3}
    for _ in range(2):
        lines = [line[6:] for line in completion(door, stream=True, max_tokens=24).text.splitlines() if line]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == whole
    assert door.engine.replica_count().failovers == 1
