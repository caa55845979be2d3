"""``pagedkv serve --replicas 2``: the tokens of one engine, replicas that are killed, replaced, and left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tests.fleet_ray.conftest import MODEL, OPTIONS
from tests.server.local import Process, process

PROMPTS = [f"def f{number}(a, b):\n    return a" + " + b" * (5 * number) for number in range(6)]


def client_of(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 7, "n": 2, "logprobs": 2},
        {"temperature": 0, "stop": ["\n"]},
    ],
    ids=["greedy", "seeds", "stop"],
)
def test_tokens_are_those_of_one_engine(one: Process, fleet: Process, asked: dict[str, Any]) -> None:
    with client_of(one) as alone, client_of(fleet) as many, ThreadPoolExecutor(4) as threads:

        def told(client: openai.OpenAI, prompt: str) -> list[Any]:
            answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, **asked)
            return [(choice.text, choice.finish_reason, choice.logprobs) for choice in answer.choices]

        want = [told(alone, prompt) for prompt in PROMPTS]
        for _ in range(2):  # computed, and found in the cache
            assert list(threads.map(lambda prompt: told(many, prompt), PROMPTS)) == want


def test_a_streamed_chat_is_that_of_one_engine(one: Process, fleet: Process) -> None:
    said = []
    for server in (one, fleet):
        with client_of(server) as client:
            stream = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Write a loop."}],
                max_tokens=20,
                temperature=0,
                stream=True,
            )
            said.append("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    assert said[0] == said[1] and said[0]


def metric(server: Process, name: str) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(rf'^pagedkv:{name}{{[^}}]*?(?:replica="(\w+)")?}} (\S+)$', text, re.M)
    return {replica: float(value) for replica, value in found}


def wait_for(condition: Any, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_every_replica_has_metrics_and_is_counted(fleet: Process) -> None:
    health = httpx.get(f"{fleet.url}/health", timeout=30).json()
    assert health == {"status": "ok", "replicas": {"ready": 2, "wanted": 2}}
    with client_of(fleet) as client:
        for _ in range(2):
            client.completions.create(model=MODEL, prompt=PROMPTS[5], max_tokens=1)
    wait_for(lambda: sum(metric(fleet, "prefix_cache_hits_total").values()) > 0, 30)
    assert len(metric(fleet, "prefix_cache_hits_total")) == 2


def test_a_client_that_leaves_ends_its_request(fleet: Process) -> None:
    body = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # the answer is closed with it
        assert next(lines).startswith("data: ")
        wait_for(lambda: sum(metric(fleet, "num_requests_running").values()) == 1, 60)
    wait_for(lambda: sum(metric(fleet, "num_requests_running").values()) == 0, 60)


def replicas_of(server: Process) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if child.cmdline()[0].startswith("ray::ServeReplica"):
                found.append(child)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


def test_a_replica_that_is_killed_costs_no_answer(one: Process, fleet: Process) -> None:
    """Every request is answered, by the text that one engine writes, though half of them lose their replica."""
    prompts = [f"class Number{number}:\n    def __init__(self" for number in range(12)]
    asked: Any = {"model": MODEL, "max_tokens": 600, "temperature": 1.0, "seed": 3}
    begun: list[str] = []

    def told(server: Process, prompt: str) -> str:
        with client_of(server) as client:
            answer = client.completions.create(prompt=prompt, stream=True, extra_body={"ignore_eos": True}, **asked)
            text = next(iter(answer)).choices[0].text
            begun.append(prompt)
            return text + "".join(chunk.choices[0].text for chunk in answer)

    with ThreadPoolExecutor(len(prompts)) as threads:
        want = list(threads.map(lambda prompt: told(one, prompt), prompts))
    begun.clear()
    killed, *_ = replicas_of(fleet)
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = [threads.submit(told, fleet, prompt) for prompt in prompts]
        wait_for(lambda: len(begun) == len(prompts), 60)
        killed.kill()
        assert [answer.result() for answer in answers] == want
    assert metric(fleet, "replica_failovers_total")[""] > 0
    wait_for(lambda: len(replicas_of(fleet)) == 2)
    wait_for(lambda: httpx.get(f"{fleet.url}/health", timeout=30).json()["replicas"]["ready"] == 2)
    assert killed.pid not in {process.pid for process in replicas_of(fleet)}


def test_replicas_are_replaced_while_answers_go_on(one: Process, fleet: Process) -> None:
    with client_of(one) as client:
        asked: Any = {"model": MODEL, "prompt": PROMPTS[1], "max_tokens": 24, "temperature": 0}
        want = client.completions.create(**asked).choices[0].text
    old = {process.pid for process in replicas_of(fleet)}
    os.kill(fleet.process.pid, signal.SIGHUP)
    with client_of(fleet) as client:

        def all_are_new() -> bool:
            assert client.completions.create(**asked).choices[0].text == want
            new = {process.pid for process in replicas_of(fleet)}
            ready = httpx.get(f"{fleet.url}/health", timeout=30).json()["replicas"]["ready"]
            return not (new & old) and len(new) == 2 and ready == 2

        wait_for(all_are_new)
    wait_for(lambda: "all replicas are new" in fleet.log.read_text())


def test_nothing_is_left_of_a_fleet_that_ended(one: Process, fleet: Process) -> None:
    processes = psutil.Process(fleet.process.pid).children(recursive=True)
    assert len(processes) > 4
    assert fleet.stop() == 0
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_replicas_come_as_load_asks(one: Process, ray_folder: str, tmp_path: Path) -> None:
    scale = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 0.2}
    scale |= {"metrics_interval_s": 0.2, "look_back_period_s": 0.5}
    options = [*OPTIONS, "--autoscale", json.dumps(scale), "--routing", "least_load"]
    body = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 3000, "ignore_eos": True, "temperature": 0}
    with process(tmp_path / "log", *options, env={"RAY_TMPDIR": ray_folder}) as server:

        def ready() -> int:
            found: int = httpx.get(f"{server.url}/health", timeout=30).json()["replicas"]["ready"]
            return found

        assert ready() == 1
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=300) for _ in "1234"]
            wait_for(lambda: ready() == 2)
            texts = {answer.result().json()["choices"][0]["text"] for answer in asked}
        assert len(texts) == 1
        assert server.stop() == 0
