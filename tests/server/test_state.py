"""Clients, operators, the log and the engine call a request by one name."""

from __future__ import annotations

import asyncio

import pytest
from tests.server.asgi import client_of, events_of, until
from tests.server.fakes import FakeEngine

from pagedkv.server.state import RequestIds

pytestmark = pytest.mark.anyio


def test_a_name_that_is_in_use_is_told_from_the_first() -> None:
    names = RequestIds()
    with names.taken("a", 1) as first, names.taken("a", 1) as second, names.taken("a", 2) as third:
        assert (first, second, third) == (["a"], ["a~2"], ["a~3/0", "a~3/1"])
    with names.taken("a", 1) as again:
        assert again == ["a"]


def test_names_of_prompts_are_no_names_that_a_client_can_choose() -> None:
    names = RequestIds()
    with names.taken("a", 2) as parts, names.taken("a-0", 1) as single, names.taken("a", 1) as second:
        assert len({*parts, *single, *second}) == 4


async def test_the_engine_hears_the_id_of_the_answer() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        mine = {"x-request-id": "mine"}
        one = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=mine)
        two = await client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "stream": True}
        chat = await client.post("/v1/chat/completions", json=body)
    told = [call.options["request_id"] for call in engine.calls]
    assert one.json()["id"] == "cmpl-mine"
    assert told == ["cmpl-mine", *(f"{two.json()['id']}/{i}" for i in range(2)), events_of(chat.text)[0]["id"]]


async def test_a_client_may_repeat_its_id() -> None:
    engine = FakeEngine(delay=0.01)
    async with client_of(engine) as client:

        async def ask() -> int:
            headers = {"x-request-id": "same"}
            return (await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)).status_code

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await until(lambda: engine.running == 3)
        assert {call.options["request_id"] for call in engine.calls} == {f"cmpl-same{end}" for end in ("", "~2", "~3")}
        assert await asyncio.gather(*asking) == [200, 200, 200]
