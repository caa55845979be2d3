"""Requests go where the KV events say that their prompts are, though some events are lost and others come late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest

from pagedkv.engine import SamplingParams
from pagedkv.fleet import FleetRouter, FleetSubscriber, FleetView, prefix_hashes
from pagedkv.replicas.messages import Asked
from pagedkv.replicas.replica import Replica
from pagedkv.replicas.sending import Fleet, Sent, fleet_of, routed_fleet

pytest.importorskip("zmq")
SIZE = 16


def sent(token_ids: Any, **more: Any) -> Sent:
    return Sent(Asked(request_id="r", token_ids=np.array(token_ids), params=SamplingParams(), **more))


def salt_of(number: int) -> str:
    return "a tenant" if number % 3 == 0 else ""


class Unreliable:
    """The socket of a publisher that loses some batches and holds others back until the next one is sent."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._held = socket, []
        self.lost = self.late = self.number = 0

    async def send_multipart(self, frames: Any) -> None:
        self.number += 1
        if self.number % 5 == 2:
            self.lost += 1
        elif self.number % 5 == 4:
            self.late += 1
            self._held.append(frames)
        else:
            await self._socket.send_multipart(frames)
            for each in self._held:
                await self._socket.send_multipart(each)
            self._held.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


@pytest.mark.anyio
async def test_a_view_heals_whatever_was_lost_or_came_late(engines: dict[str, Any]) -> None:
    engine = engines["a"]
    cache = engine.llm.core.runner.cache
    view = FleetView(SIZE)
    replica = Replica("a", engine, "tcp://127.0.0.1:*")
    await replica.start()
    publisher: Any = replica._publisher
    socket = publisher._publisher = Unreliable(publisher._publisher)
    fleet = Fleet(FleetRouter("prefix", view), FleetSubscriber(view, check_seconds=0.2))
    prompts = [[(7 * number + place) % 4000 for place in range(16 * (number % 5 + 2))] for number in range(30)]
    try:
        events, replay = replica.addresses
        fleet.update({"a": {"events": events, "replay": replay}})
        for number, prompt in enumerate(prompts):
            if number == 11:
                await engine.clear_prefix_cache()
            async for _ in engine.generate(prompt, SamplingParams(max_tokens=2), cache_salt=salt_of(number)):
                pass
            await anyio.sleep(0.06)  # each has a batch of its own
        assert socket.lost > 3 and socket.late > 3

        def told() -> list[tuple[int, int]]:
            """What the view says of each prompt, and what is so."""
            salted = [(prompt, salt_of(number)) for number, prompt in enumerate(prompts)]
            known = [int(view.matched(prefix_hashes(prompt, SIZE, salt), ["a"]).sum()) for prompt, salt in salted]
            held = [cache.match_prefix([*prompt, 1], salt) // SIZE * SIZE for prompt, salt in salted]
            return list(zip(known, held, strict=True))

        deadline = time.monotonic() + 20
        while any(known != held for known, held in told()):
            assert time.monotonic() < deadline, told()
            await anyio.sleep(0.05)
        assert {held > 0 for _, held in told()} == {True, False}
    finally:
        fleet.close()
        publisher._publisher = socket._socket
        await replica._running.aclose()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = routed_fleet("round_robin", SIZE)
    yield made
    made.close()


def test_a_request_counts_where_it_went_until_it_is_over(fleet: Fleet) -> None:
    fleet.route_by("least_load")
    router: Any = fleet._router
    requests = [sent(range(100)) for _ in range(4)]
    assert [fleet.order(each, ["a", "b"])[0] for each in requests] == ["a", "b", "a", "b"]
    fleet.went(requests[0], "a")
    fleet.went(requests[1], "a")  # as the other was gone
    assert (router.running("a"), router.running("b")) == (3, 1)
    fleet.order(requests[3], ["b", "a"])  # asked a second time, it counts once
    assert router.running("a") + router.running("b") == 4
    for each in [*requests, *requests]:
        fleet.done(each)
    assert (router.running("a"), router.running("b")) == (0, 0)


def test_replicas_come_and_go(fleet: Fleet) -> None:
    assert fleet.ready == ()
    fleet.update({"a": {}, "b": {"events": "tcp://127.0.0.1:1", "replay": "tcp://127.0.0.1:2"}})
    assert fleet.ready == ("a", "b")
    fleet.update({"a": {}})
    assert fleet.ready == ("a",)
    assert fleet.order(sent([1, 2]), ["a"]) == ["a"]


def test_in_another_process_whoever_stands_first_is_asked() -> None:
    assert fleet_of("unknown").order(sent([1]), ["a", "b"]) == ["a", "b"]
