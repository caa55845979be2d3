"""A subscriber keeps the view of real publishers right: those it met late, that lose messages, die and come again."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from pagedkv import BlockManager, InvalidOperation, MissingExtra
from pagedkv.engine.kv_events import KvEventLog, batch_bytes
from pagedkv.fleet import FleetSubscriber, FleetView, prefix_hashes
from pagedkv.server.events import EventPublisher

ANYWHERE = "tcp://127.0.0.1:*"


class Publishing:
    """A replica that publishes what its books do, in an event loop of its own."""

    def __init__(self, address: str = ANYWHERE, replay: str = ANYWHERE, *, gives_snapshots: bool = True) -> None:
        self.manager = BlockManager(64, 2, whole_hits=True)
        self.log = KvEventLog(self.manager)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.publisher = EventPublisher(address, replay)
        self.do(self.publisher.__aenter__())
        if gives_snapshots:
            self.publisher.snapshot = self.log.snapshot

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def store(self, *prompts, loses: bool = False) -> None:
        for prompt in prompts:
            self.manager.allocate(1, prompt)
            self.manager.commit(1)
            self.manager.free(1)
            payload = batch_bytes(self.log.take())
            if loses:  # it counts as sent, and never was
                self.publisher._next += 1
            else:
                self.do(self.publisher.publish(payload))

    def close(self) -> None:
        self.do(self.publisher.__aexit__())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@contextmanager
def following(**options):
    publishing = Publishing(**options)
    view = FleetView(2)
    try:
        with FleetSubscriber(view, check_seconds=0.1, patience=0.5) as subscriber:
            subscriber.follow("a", publishing.publisher.address, publishing.publisher.replay_address)
            yield publishing, view, subscriber
    finally:
        publishing.close()


def matched(view: FleetView, prompt: list[int]) -> int:
    return int(view.matched(prefix_hashes(prompt, 2), ["a"]).sum())


def until(is_so) -> None:
    limit = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.01)


pytest.importorskip("zmq")


def test_a_replica_is_known_from_before_it_was_followed_and_after():
    publishing, view = Publishing(), FleetView(2)
    try:
        publishing.store([1] * 4, [2] * 4)
        with FleetSubscriber(view) as subscriber:
            subscriber.follow("a", publishing.publisher.address, publishing.publisher.replay_address)
            until(lambda: matched(view, [1] * 4) == matched(view, [2] * 4) == 4)
            publishing.store([3] * 6)
            until(lambda: matched(view, [3] * 6) == 6)
            publishing.manager.clear_prefix_cache()
            publishing.store([4] * 4)
            until(lambda: matched(view, [4] * 4) == 4)
            assert matched(view, [1] * 4) == 0 and view.behind == () and subscriber.silent == ()
            subscriber.unfollow("a")
            until(lambda: view.replicas == ())
    finally:
        publishing.close()


def test_a_lost_message_is_healed_by_a_snapshot_with_and_without_one_behind_it():
    with following() as (publishing, view, _):
        publishing.store([1] * 4)
        until(lambda: matched(view, [1] * 4) == 4)
        publishing.store([2] * 4, loses=True)
        publishing.store([3] * 4)
        until(lambda: matched(view, [2] * 4) == matched(view, [3] * 4) == 4 and view.behind == ())


def test_a_snapshot_of_a_replica_that_published_nothing_is_one():
    publishing, view = Publishing(), FleetView(2)
    try:
        publishing.manager.allocate(1, [1] * 4)
        publishing.manager.commit(1)  # not published yet, and in the snapshot
        with FleetSubscriber(view, check_seconds=0.1) as subscriber:
            subscriber.follow("a", publishing.publisher.address, publishing.publisher.replay_address)
            until(lambda: matched(view, [1] * 4) == 4)
            assert subscriber._links["a"].gives_snapshots
    finally:
        publishing.close()


def test_a_message_that_only_this_subscriber_lost_is_asked_for():
    with following() as (publishing, view, _):
        publishing.store([1] * 4)
        until(lambda: matched(view, [1] * 4) == 4)
        number, kept = publishing.publisher._next, publishing.publisher._kept
        publishing.store([2] * 4, loses=True)
        kept.append((number, batch_bytes(publishing.log.snapshot())))  # kept for who asks, and never sent
        until(lambda: matched(view, [2] * 4) == 4)


def test_a_publisher_without_snapshots_is_asked_for_all_it_kept():
    publishing, view = Publishing(gives_snapshots=False), FleetView(2)
    try:
        publishing.store([1] * 4, [2] * 4)
        with FleetSubscriber(view, check_seconds=0.1) as subscriber:
            subscriber.follow("a", publishing.publisher.address, publishing.publisher.replay_address)
            until(lambda: matched(view, [1] * 4) == matched(view, [2] * 4) == 4 and view.behind == ())
    finally:
        publishing.close()


def test_a_replica_that_dies_is_forgotten_and_known_again_when_it_is_back():
    first, view = Publishing(), FleetView(2)
    address, replay = first.publisher.address, first.publisher.replay_address
    with FleetSubscriber(view, check_seconds=0.1, patience=0.5) as subscriber:
        subscriber.follow("a", address, replay)
        first.store([1] * 4)
        until(lambda: matched(view, [1] * 4) == 4)
        first.close()
        until(lambda: subscriber.silent == ("a",))
        assert matched(view, [1] * 4) == 0
        second = Publishing(address, replay)
        try:
            second.store([2] * 4)
            until(lambda: matched(view, [2] * 4) == 4 and subscriber.silent == ())
            assert matched(view, [1] * 4) == 0
        finally:
            second.close()


def test_what_is_no_batch_changes_nothing():
    with following() as (publishing, view, _):
        publishing.store([1] * 4)
        until(lambda: matched(view, [1] * 4) == 4)
        publishing.do(publishing.publisher.publish(b"nonsense"))
        publishing.store([2] * 4)
        until(lambda: matched(view, [2] * 4) == 4)


def test_addresses_that_are_none_and_a_closed_one_are_refused():
    with FleetSubscriber(FleetView(2)) as subscriber:
        for addresses in [("nowhere", ANYWHERE), ("tcp://127.0.0.1:1", "tcp://"), ("tcp://127.0.0.1:1", 7)]:
            with pytest.raises(InvalidOperation, match="endpoint: expected an address of ZMQ"):
                subscriber.follow("a", *addresses)
    with pytest.raises(InvalidOperation, match="closed"):
        subscriber.follow("a", "tcp://127.0.0.1:1", "tcp://127.0.0.1:2")


def test_without_zmq_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(MissingExtra, match="events"):
        FleetSubscriber(FleetView(2))
