"""The router sends each request where the simulator sends it, and counts what it sent."""

from __future__ import annotations

import pytest
from tests.sim.traces import as_requests, as_trace

from pagedkv import BlockManager, InvalidOperation
from pagedkv.engine.kv_events import KvEventLog
from pagedkv.fleet import FleetRouter, FleetView, routing_names
from pagedkv.fleet import router as router_file
from pagedkv.sim import Fleet, replay, synthesize

BLOCK, REPLICAS, BLOCKS = 2, 3, 240


class Served:
    """Replicas with the books of engines, whose events a view follows batch by batch."""

    def __init__(self, routing: str) -> None:
        self.view = FleetView(BLOCK)
        self.router = FleetRouter(routing, self.view)
        self.managers = {
            f"replica {i}": BlockManager(BLOCKS // REPLICAS, BLOCK, whole_hits=True) for i in range(REPLICAS)
        }
        self.logs = {name: KvEventLog(manager) for name, manager in self.managers.items()}
        self.numbers = dict.fromkeys(self.managers, 0)

    def serve(self, prompt: list[int]) -> tuple[str, int]:
        routed = self.router.route(prompt, list(self.managers))
        name = routed.replicas[0]
        manager = self.managers[name]
        assert routed.matched[name] == len(manager.matching_block_ids(prompt)) * BLOCK
        self.router.sent(routed, name)
        manager.allocate(1, prompt)
        manager.commit(1)
        manager.free(1)
        self.router.done(name)
        if batch := self.logs[name].take():
            assert self.view.hear(name, self.numbers[name], batch)
            self.numbers[name] += 1
        return name, routed.matched[name]


@pytest.mark.parametrize("routing", routing_names())
def test_requests_go_where_the_simulator_sends_them(routing):
    whole = synthesize("agents", requests=150, seed=3, block_tokens=512)
    requests = [ids[:60] for ids in as_requests(whole)]
    result, served = replay(as_trace(requests), BLOCKS, fleet=Fleet(REPLICAS, routing)), Served(routing)
    for request, ids in enumerate(requests):
        name, matched = served.serve([token for block in ids for token in (2 * block, 2 * block + 1)])
        assert name == f"replica {result.fleet.served[request]}"
        assert matched == result.hits[request] * BLOCK
    assert len({*result.fleet.served.tolist()}) > 1 and result.hits.any()


def test_what_waits_is_what_was_sent_and_is_not_done():
    router = FleetRouter("least_load", FleetView(BLOCK))
    first = router.route([1, 2], ["a", "b"])
    router.sent(first, "a")
    second = router.route([1, 2], ["a", "b"])
    assert second.replicas == ("b", "a") and router.running("a") == 1
    assert router.route([1, 2], ["a", "b"], queue=[0, 5]).replicas == ("a", "b")
    router.done("a")
    router.done("a")
    assert router.running("a") == router.running("nobody") == 0


def test_a_request_sent_again_has_the_other_replica_for_home():
    router = FleetRouter("sticky", FleetView(BLOCK))
    prompt = [1, 2, 3, 4, 5]
    routed = router.route(prompt, ["a", "b"])
    router.sent(routed, "a")
    assert router.route([*prompt, 6], ["b", "a"]).replicas[0] == "a"
    router.sent(routed, "b")
    assert router.route([*prompt, 6], ["a", "b"]).replicas[0] == "b"
    assert router.route(prompt, ["a", "c"]).replicas[0] in ("a", "c"), "the home is no candidate"
    assert router.route(prompt, ["a", "b"], cache_salt="other").replicas[0] == "a", "no home: by load"


def test_a_common_beginning_does_not_bring_all_conversations_to_one_replica():
    router, system = FleetRouter("sticky", FleetView(BLOCK)), list(range(100, 140))
    homes = []
    for chat in range(40):
        routed = router.route([*system, chat, chat], ["a", "b"])
        router.sent(routed, routed.replicas[0])
        homes.append(routed.replicas[0])
        router.done(routed.replicas[0])
    assert 12 < homes.count("a") < 28
    for chat in range(40):
        assert router.route([*system, chat, chat, 1, 2], ["a", "b"]).replicas[0] == homes[chat]


def test_a_new_replica_begins_with_the_mean_load():
    router, prompt = FleetRouter("least_load", FleetView(BLOCK)), list(range(40))

    def send(replica: str, candidates: list[str]) -> None:
        router.sent(router.route(prompt, candidates), replica)
        router.done(replica)

    for name in ("a", "b"):
        send(name, ["a", "b"])
    for name in ("a", "c", "b"):
        send(name, ["a", "b", "c"])
    assert router.route(prompt, ["a", "b", "c"]).replicas[0] == "a", "c has not had to catch up"
    router.forget("c")
    assert router.route(prompt, ["b", "c", "a"]).replicas == ("a", "c", "b"), "c is new again"


def test_old_homes_are_forgotten(monkeypatch):
    monkeypatch.setattr(router_file, "MAX_HOMES", 3)
    router = FleetRouter("sticky", FleetView(BLOCK))
    for start in range(3):
        routed = router.route([start] * 6, ["a", "b"])
        router.sent(routed, "b")
    assert len(router._homes) == 3
    assert router.route([2] * 6, ["a", "b"]).replicas[0] == "b"
    assert router.route([0] * 6, ["a", "b"]).replicas[0] == "a"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([1], []), "replicas: expected at least one, and each once"),
        (([1], ["a", "a"]), "replicas: expected at least one, and each once"),
        (([1], ["a"], [1, 2]), "queue: expected one number for each of 1"),
        (([1], ["a"], [-1]), "queue: expected an int of at least 0"),
    ],
)
def test_what_cannot_be_routed(given, said):
    prompt, replicas, *queue = given
    with pytest.raises(InvalidOperation, match=said):
        FleetRouter("prefix", FleetView(BLOCK)).route(prompt, replicas, queue=queue[0] if queue else None)


def test_a_replica_that_was_no_candidate_gets_nothing():
    router = FleetRouter("prefix", FleetView(BLOCK))
    with pytest.raises(InvalidOperation, match="replica: expected one of"):
        router.sent(router.route([1], ["a"]), "b")
    assert router.running("b") == 0
