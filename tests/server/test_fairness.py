"""What one tenant sends holds no other up: requests, bytes, texts, tokenizing; and none of it is done in vain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import starlette.requests
from tests.server.asgi import RawRequest, client_of, until
from tests.server.fakes import FakeEngine, shipped_tokenizer
from tests.server.test_auth import as_

from pagedkv.server import ServerConfig, create_app
from pagedkv.server.admission import Budget, Turns
from pagedkv.server.model import LONG_TEXT, ServedModel

pytestmark = pytest.mark.anyio
URL = "/v1/completions"
KEYS = ("alice", "bob")
A, B = as_("alice"), as_("bob")
SHORT = {"prompt": "a", "max_tokens": 1}


# Turns and budgets.


async def test_tenants_take_turns_however_long_their_lines_are() -> None:
    turns, order = Turns(1, 1), list[str]()

    async def take(tenant: str) -> None:
        async with turns.taken(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*map(take, "aaaaabbc"))
    assert "".join(order) == "aabcabaa"  # the first was in at once


async def test_one_tenant_leaves_places_to_others() -> None:
    turns, go = Turns(2, 1), asyncio.Event()
    inside: list[str] = []

    async def take(tenant: str) -> None:
        async with turns.taken(tenant):
            inside.append(tenant)
            await go.wait()

    async with asyncio.TaskGroup() as group:
        for tenant in "aab":
            group.create_task(take(tenant))
        await until(lambda: len(inside) == 2)
        assert inside == ["a", "b"]
        go.set()
    assert inside == ["a", "b", "a"]


async def test_who_gives_up_takes_no_turn() -> None:
    turns = Turns(1, 1)
    await turns.enter("a")
    waiting = [asyncio.create_task(turns.enter(tenant)) for tenant in "aab"]
    await asyncio.sleep(0)
    waiting[0].cancel()
    turns.leave("a")
    waiting[2].cancel()  # it was let in just now, and does not know yet
    await asyncio.gather(*waiting, return_exceptions=True)
    assert waiting[1].done() and not waiting[1].cancelled()
    turns.leave("a")
    async with asyncio.timeout(1), turns.taken("c"):
        pass


def test_a_budget_holds_together_and_each() -> None:
    budget = Budget(10, 6)
    assert budget.take("a", 6) and not budget.take("a") and budget.take("b", 4) and not budget.take("b")
    budget.give("a", 6)
    assert budget.taken == 4 and budget.take("a", 6)


# Requests, bytes and texts by key.


async def test_one_key_leaves_requests_to_others() -> None:
    engine = FakeEngine(delay=0.05)
    async with client_of(engine, api_keys=KEYS, max_connections=4) as client:
        asked = [client.post(URL, json={"prompt": "a", "max_tokens": 3}, headers=key) for key in (A, A, A, B)]
        answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers[:3]) == [200, 200, 429] and answers[3].status_code == 200
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "too_many_requests" and refused.headers["retry-after"]


async def test_one_key_leaves_texts_to_others() -> None:
    """4 run, 4 may wait, half of them alice's."""
    engine = FakeEngine(delay=0.05)
    async with client_of(engine, api_keys=KEYS, max_queue=4) as client:
        asked = [client.post(URL, json={"prompt": "a", "max_tokens": 3}, headers=key) for key in (A,) * 6 + (B,)]
        answers = await asyncio.gather(*asked)
        never = await client.post(URL, json={**SHORT, "n": 5}, headers=A)
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 2
    assert answers[6].status_code == 200 and never.json()["error"]["code"] == "too_many_sequences"


async def test_bodies_are_bounded_in_bytes_together_and_by_key() -> None:
    size = 400_000
    app = create_app(FakeEngine(), ServerConfig(api_keys=KEYS, max_body=500_000, max_bodies=1_000_000))  # type: ignore[arg-type]

    def sent(key: dict[str, str], length: int = size) -> RawRequest:
        request = RawRequest(app, URL, b"", {**key, "content-length": str(length)})
        request.inbox = asyncio.Queue()  # nothing comes yet
        return request

    requests = [sent(A), sent(A), sent(B), sent(A, 60_000)]
    tasks = [request.start() for request in requests]
    await until(lambda: b"too_many_bytes" in requests[1].body)
    assert [request.status for request in requests] == [None, 429, None, None]  # what is short is always taken
    for request in requests:
        request.leave()
    await asyncio.gather(*tasks, return_exceptions=True)
    again = sent(A)
    task = again.start()
    await asyncio.sleep(0.01)
    assert again.status is None  # all of it was given back
    again.leave()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_body_that_does_not_tell_its_length_counts_as_it_comes() -> None:
    app = create_app(FakeEngine(), ServerConfig(api_keys=KEYS, max_body=500_000, max_bodies=500_000))  # type: ignore[arg-type]
    held, late = (RawRequest(app, URL, b"x" * 400_000, A) for _ in range(2))
    for request in (held, late):
        request.inbox = asyncio.Queue()
        request.inbox.put_nowait({"type": "http.request", "body": b"x" * 400_000, "more_body": True})
    first = held.start()
    await asyncio.sleep(0)
    second = late.start()
    await until(lambda: b"too_many_bytes" in late.body)
    assert late.status == 429 and held.status is None
    held.leave()
    await asyncio.gather(first, second, return_exceptions=True)


async def test_probes_are_answered_however_many_requests_are_under_way() -> None:
    engine = FakeEngine(delay=0.05)
    async with client_of(engine, max_connections=1) as client:
        under_way = asyncio.create_task(client.post(URL, json={"prompt": "a", "max_tokens": 5}))
        await until(lambda: engine.running == 1)
        assert (await client.post(URL, json=SHORT)).status_code == 503
        assert [(await client.get(path)).status_code for path in ("/health", "/version")] == [200] * 2
        assert (await under_way).status_code == 200


# What cannot fit is refused before work is done for it.


@pytest.fixture
def nothing_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done for what cannot fit")

    monkeypatch.setattr(starlette.requests.Request, "json", fail)
    monkeypatch.setattr(ServedModel, "check_ids", fail)


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (URL, b'{"prompt": [' + b"1," * 10**6 + b"1]}", "prompt", "context_length_exceeded"),
        (URL, b'{"prompt": [[1], [' + b"1," * 10**6 + b"1]]}", "prompt", "context_length_exceeded"),
        (URL, b'{"prompt": [' + b"[1]," * 10**5 + b"[1]]}", "prompt", "too_many_prompts"),
        (URL, b'{"prompt": [' + b'"\\\\",' * 10**5 + b'"a"]}', "prompt", "too_many_prompts"),
        (URL, b'{"prompt": "a", "stop_token_ids": [' + b"1," * 10**6 + b"1]}", "stop_token_ids", "invalid_value"),
        ("/detokenize", b'{"tokens": [' + b"1," * 10**6 + b"1]}", "tokens", "context_length_exceeded"),
    ],
    ids=["ids", "lists of ids", "lists", "texts", "another field", "detokenize"],
)
async def test_millions_of_ids_are_counted_and_not_parsed(
    nothing_is_parsed: None, path: str, body: bytes, param: str, code: str
) -> None:
    async with client_of(FakeEngine()) as client:
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["code"] == code


@pytest.mark.parametrize(
    "body", [b"[" * 300_000, b'{"prompt": "' + b"x" * 300_000, b'{"a": ' * 100_000, b"1" * 300_000]
)
async def test_large_bodies_that_are_no_json(body: bytes) -> None:
    async with client_of(FakeEngine()) as client:
        answer = await client.post(URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


async def test_a_large_body_says_the_same_as_a_small_one() -> None:
    engine = FakeEngine(max_positions=4096)
    prompts = ["x" * 300] * 1000
    async with client_of(engine, max_queue=2000) as client:
        body = {"prompt": prompts, "max_tokens": 1, "seed": 3, "logit_bias": {"5": -1.5}, "user": None}
        assert (await client.post(URL, json=body)).status_code == 200
        ids = [[5, 6, 7] * 30] * 1000
        assert (await client.post(URL, json={**body, "prompt": ids})).status_code == 200
    assert len(engine.calls) == 2000 and engine.calls[0].params.logit_bias == {5: -1.5}
    assert engine.calls[-1].token_ids == ids[0] and engine.calls[0].params.seed == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (URL, {"prompt": "x" * 10**6}),
        (URL, {"prompt": ["a", "x" * 10**6]}),
        ("/tokenize", {"prompt": "x" * 10**6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 10**6}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 10**6}]}),
    ],
)
@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
async def test_a_text_that_cannot_fit_is_not_tokenized(path: str, body: dict[str, Any], template: str | None) -> None:
    engine, asked = FakeEngine(), list[int]()
    engine.tokenizer = Tokenizer(lambda text: asked.append(len(text)))
    async with client_of(engine, chat_template=template) as client:
        answer = await client.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert " 10000" in error["message"] and "characters" in error["message"]
    assert not any(length > 1000 for length in asked)


# Tokenizing.


class Tokenizer:
    """The shipped one, which tells what it is asked before it works."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, text: str, **options: Any) -> Any:
        self._before(text)
        return shipped_tokenizer()(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(shipped_tokenizer(), name)


class Held:
    """An engine whose tokenizer begins a text of alice and does not end it before `go`."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), list[str]()
        self.engine = FakeEngine(max_positions=8192)
        self.engine.tokenizer = Tokenizer(self._begin)

    def _begin(self, text: str) -> None:
        self.begun.append(text[:1])
        if text.startswith("a"):
            assert self.go.wait(20)


@contextmanager
def held() -> Iterator[Held]:
    one = Held()
    try:
        yield one
    finally:
        one.go.set()


def long(letter: str) -> dict[str, Any]:
    return {"prompt": letter + " = 1\n" * (LONG_TEXT // 4), "max_tokens": 1}


@pytest.mark.parametrize("path", [URL, "/tokenize"])
async def test_long_texts_of_one_key_hold_no_other_up(path: str) -> None:
    with held() as one:
        async with client_of(one.engine, api_keys=KEYS) as client:
            slow = [asyncio.create_task(client.post(path, json=long("a"), headers=A)) for _ in range(3)]
            await until(lambda: one.begun == ["a"])
            for body in (long("b"), {**long("b"), "prompt": "b"}):
                answer = await asyncio.wait_for(client.post(path, json=body, headers=B), 10)
                assert answer.status_code in (200, 400)
            assert (await client.get("/health")).status_code == 200
            assert one.begun == ["a", "b", "b"], "another of alice's has begun meanwhile"
            one.go.set()
            assert {(await task).status_code for task in slow} <= {200, 400}


async def test_a_text_whose_client_left_is_not_tokenized() -> None:
    with held() as one:
        app = create_app(one.engine, ServerConfig(model_name="tiny", api_keys=KEYS))  # type: ignore[arg-type]
        first, second = (RawRequest(app, URL, long("a"), A) for _ in range(2))
        tasks = [first.start(), second.start()]
        await until(lambda: one.begun == ["a"])
        second.leave()
        await asyncio.wait_for(tasks[1], 10)
        first.leave()
        await asyncio.wait_for(tasks[0], 10)  # nobody waits for the thread either
        third = RawRequest(app, URL, long("a"), A)
        task = third.start()
        await asyncio.sleep(0.05)
        assert one.begun == ["a"], "the turn lasts until the thread is through"
        one.go.set()
        await asyncio.wait_for(task, 20)
        assert one.begun == ["a", "a"] and third.status in (200, 400)
