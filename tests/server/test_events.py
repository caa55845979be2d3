"""KV events: the format, ZMQ with replay, and a recording that the simulator reads."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from tests.contracts.user_tiers import DictTier
from tests.engine import fakes
from tests.engine.test_offload import settle
from tests.server.fake_snapshots import FakeEngine, server_state

from pagedkv import BlockManager, InvalidOperation, MissingExtra
from pagedkv.engine.kv_events import KvEventLog, append_event_batch, batch_bytes
from pagedkv.fleet import FleetView, prefix_hashes
from pagedkv.server import events
from pagedkv.server.events import (
    END_OF_REPLAY,
    SNAPSHOT,
    EventPublisher,
    EventRecorder,
    kv_events,
    replay_endpoint_of,
    stays_here,
)
from pagedkv.sim.reading import read_trace
from pagedkv.tiers import DiskTier

ANYWHERE = "tcp://127.0.0.1:0"


def stored(batch):
    return [event for event in batch[1] if event["type"] == "BlockStored"]


def test_a_chain_is_one_event_and_hashes_name_content():
    cache, other = BlockManager(16, 4), BlockManager(16, 4)
    log, other_log = KvEventLog(cache), KvEventLog(other)
    assert log.take() is None
    for manager, seq in ((cache, 1), (other, 77)):
        manager.allocate(seq, list(range(10)))
        manager.commit(seq)
    time, events, rank = batch = log.take()
    assert len(events) == 1 and time > 1e9 and rank == 0
    event = events[0]
    assert event["token_ids"] == list(range(8)) and event["block_size"] == 4 and event["parent_block_hash"] is None
    assert len(event["block_hashes"]) == 2 and event["medium"] == "GPU"
    assert stored(other_log.take())[0]["block_hashes"] == event["block_hashes"], "the same in every process"
    cache.commit(cache.append_batch([1], [[10, 11]]))
    (grown,) = stored(log.take())
    assert grown["parent_block_hash"] == event["block_hashes"][-1] and grown["token_ids"] == [8, 9, 10, 11]
    cache.free(1)
    cache.allocate(2, list(range(10)), cache_salt="tenant")
    cache.commit(2)
    salted = stored(log.take())[0]
    assert salted["token_ids"] == list(range(8)) and not {*salted["block_hashes"]} & {*event["block_hashes"]}
    cache.clear_prefix_cache()
    assert log.take()[1][-1] == {"type": "AllBlocksCleared"}
    log.close()
    cache.allocate(3, list(range(50, 60)))
    cache.commit(3)
    assert log.take() is None and batch


def test_a_snapshot_names_every_block_that_was_told_of_and_takes_nothing():
    cache = BlockManager(4, 2)
    log = KvEventLog(cache)
    assert log.snapshot()[1] == [{"type": "AllBlocksCleared"}]
    cache.allocate(1, [1, 2, 3, 4, 5, 6])
    cache.commit(1)
    cache.free(1)
    cache.allocate(2, 4)  # takes the last block's place
    time, (cleared, held), rank = log.snapshot()
    (event,) = stored(log.take())
    assert cleared == {"type": "AllBlocksCleared"} and time > 1e9 and rank == 0
    assert held["block_hashes"] == event["block_hashes"][:2] and held["medium"] == "GPU" and held["token_ids"] == []
    assert log.snapshot()[1] == [cleared, held] and log.take() is None


def test_what_was_stored_is_removed_under_the_same_name():
    cache = BlockManager(4, 2)
    log = KvEventLog(cache)
    cache.allocate(1, [1, 2, 3, 4, 5, 6])
    cache.commit(1)
    names = stored(log.take())[0]["block_hashes"]
    cache.free(1)
    cache.allocate(2, 6)
    (event,) = log.take()[1]
    assert event == {"type": "BlockRemoved", "block_hashes": [names[2], names[1]], "medium": "GPU"}


def test_removals_of_blocks_from_before_are_not_told():
    cache = BlockManager(2, 2)
    cache.allocate(1, [1, 2])
    cache.commit(1)
    cache.free(1)
    log = KvEventLog(cache)
    cache.allocate(2, 4)
    assert log.take() is None


def test_what_was_there_before_is_told_with_what_continues_it():
    caches = [BlockManager(16, 4), BlockManager(16, 4)]
    early = KvEventLog(caches[0])
    for cache in caches:
        cache.allocate(1, list(range(8)), cache_salt="tenant")
        cache.commit(1)
    late = KvEventLog(caches[1])
    for cache in caches:
        cache.commit(cache.append_batch([1], [[8, 9, 10, 11]]))
    (told,), (again,) = stored(early.take()), stored(late.take())
    assert told == again and again["token_ids"] == list(range(12)) and again["parent_block_hash"] is None


SYSTEM = list(range(13))


def serve_over(tier, *requests):
    """Return the events of a cold and of a warm engine over a tier."""
    batches = []
    for _ in range(2):
        core = fakes.engine(tiers=[tier()])
        log = KvEventLog(core.runner.cache, core.tiers)
        for each in requests:
            core.add(each())
            fakes.run(core)
            settle(core)
        core.close()
        batches.append(log.take()[1])
    return batches


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_blocks_have_the_same_name_in_pool_and_tier(tmp_path, salt):
    def asked(name, prompt):
        return lambda: fakes.request(name, prompt, cache_salt=salt, max_tokens=1, ignore_eos=True)

    first, longer = asked("a", SYSTEM), asked("b", [*SYSTEM[:12], *range(20, 29)])
    (cold, warm) = serve_over(lambda: DiskTier(tmp_path / "tier", "1MB"), first, longer)
    assert {event["type"] for event in cold + warm} == {"BlockStored"}
    told = {medium: named(cold, medium) for medium in ("GPU", "DISK")}
    assert told["GPU"] == told["DISK"] and len(told["GPU"]) == 3 + 2
    assert named(warm, "GPU") == told["GPU"]
    assert not named(warm, "DISK"), "it was there when the tier was opened"
    (more,) = serve_over(lambda: DiskTier(tmp_path / "tier", "1MB"), asked("c", [*SYSTEM[:12], *range(30, 21, -1)]))[:1]
    assert named(more, "DISK") == named(more, "GPU") and len(named(more, "DISK")) == 5, "with what it continues"


def named(told, medium):
    """Return which tokens stand behind which name, for a medium, once it is sure that parents came before."""
    found = {}
    for event in (event for event in told if event["type"] == "BlockStored" and event["medium"] == medium):
        assert event["parent_block_hash"] is None or event["parent_block_hash"] in found
        size = event["block_size"]
        for place, number in enumerate(event["block_hashes"]):
            found[number] = tuple(event["token_ids"][place * size : (place + 1) * size])
    return found


def test_readers_take_what_the_pool_stored_alone(tmp_path):
    asked = [fakes.request(name, [int(name)] * 13, max_tokens=1, ignore_eos=True) for name in "12"]
    (events, _) = serve_over(lambda: DiskTier(tmp_path / "tier", "1MB"), *(lambda each=each: each for each in asked))
    assert {event["medium"] for event in events} == {"GPU", "DISK"}
    traces = []
    for name, some in (("all", events), ("pool", [event for event in events if event["medium"] == "GPU"])):
        with (tmp_path / name).open("wb") as file:
            append_event_batch(file, [1.0, some, 0])
        traces.append(read_trace(tmp_path / name))
    assert traces[0].ids.tolist() == traces[1].ids.tolist() and traces[0].num_requests == traces[1].num_requests == 2


def test_clearing_tells_all_and_a_tier_of_its_own_blocks(tmp_path):
    core = fakes.engine(tiers=[DiskTier(tmp_path / "tier", "1MB")])
    log = KvEventLog(core.runner.cache, core.tiers)

    def ask(name):
        core.add(fakes.request(name, SYSTEM, max_tokens=1, ignore_eos=True))
        fakes.run(core)
        settle(core)
        return log.take()[1]

    names = {*named(ask("a"), "DISK")}
    core.tiers[0].clear()
    (removed,) = log.take()[1]
    assert removed == {"type": "BlockRemoved", "block_hashes": removed["block_hashes"], "medium": "DISK"}
    assert {*removed["block_hashes"]} == names
    core.runner.cache.clear_prefix_cache()
    assert log.take()[1] == [{"type": "AllBlocksCleared"}]
    again = ask("b")
    assert {*named(again, "DISK")} == {*named(again, "GPU")} == names
    core.clear_prefix_cache()
    assert log.take()[1] == [{"type": "AllBlocksCleared"}], "who hears it forgets what tiers have, too"
    core.close()
    log.close()


def test_a_user_tier_without_books_tells_nothing():
    core = fakes.engine(tiers=[DictTier(4)])
    log = KvEventLog(core.runner.cache, core.tiers)
    core.add(fakes.request("a", SYSTEM, max_tokens=1, ignore_eos=True))
    fakes.run(core)
    assert {event["medium"] for event in log.take()[1]} == {"GPU"}
    core.close()


@pytest.mark.parametrize(
    ("endpoint", "replay"),
    [
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558"),
        ("tcp://*:0", "tcp://*:0"),
        ("ipc:///run/kv", "ipc:///run/kv-replay"),
    ],
)
def test_where_batches_are_replayed(endpoint, replay):
    assert replay_endpoint_of(endpoint) == replay


def test_listeners_hear_batches_and_get_missed_ones_again():
    zmq = pytest.importorskip("zmq")
    asynchronous = pytest.importorskip("zmq.asyncio")
    payloads = [msgspec.msgpack.encode([float(i), [{"type": "AllBlocksCleared"}], 0]) for i in range(6)]

    async def talk():
        context = asynchronous.Context()
        try:
            async with EventPublisher(ANYWHERE, ANYWHERE, topic="kv") as publisher:
                listener = context.socket(zmq.SUB)
                listener.connect(publisher.address)
                listener.setsockopt(zmq.SUBSCRIBE, b"kv")
                await publisher.publish(payloads[0])
                while not await listener.poll(50):  # until the subscription has reached the publisher
                    await publisher.publish(payloads[1])
                first = await listener.recv_multipart()
                while await listener.poll(50):
                    await listener.recv_multipart()
                for payload in payloads[2:]:
                    await publisher.publish(payload)
                heard = [await listener.recv_multipart() for _ in payloads[2:]]
                again = context.socket(zmq.DEALER)
                again.connect(publisher.replay_address)
                start = heard[1][1]
                await again.send_multipart([b"", b"nonsense of another length"])
                await again.send_multipart([b"", start])
                replayed = []
                while (frames := await again.recv_multipart())[1] != END_OF_REPLAY:
                    replayed.append(frames)
                return first, heard, replayed
        finally:
            context.destroy(linger=0)

    first, heard, replayed = asyncio.run(asyncio.wait_for(talk(), 30))
    assert first[0] == b"kv" and first[2] in payloads[:2]
    numbers = [int.from_bytes(frames[1], "big") for frames in heard]
    assert numbers == list(range(numbers[0], numbers[0] + 4)) and [f[2] for f in heard] == payloads[2:]
    assert [frames[2] for frames in replayed] == payloads[3:] and [f[1] for f in replayed] == [f[1] for f in heard[1:]]
    assert all(len(frames[1]) == 8 and frames[0] == b"" for frames in replayed)


def test_a_view_that_lost_batches_asks_for_a_snapshot_and_is_right_again():
    zmq = pytest.importorskip("zmq")
    asynchronous = pytest.importorskip("zmq.asyncio")
    cache, view = BlockManager(16, 2), FleetView(2)
    log = KvEventLog(cache)

    async def ask(publisher):
        context = asynchronous.Context()
        try:
            asking = context.socket(zmq.DEALER)
            asking.connect(publisher.replay_address)
            await asking.send_multipart([b"", SNAPSHOT])
            answers = []
            while not answers or answers[-1][1:] != [END_OF_REPLAY, b""]:
                answers.append(await asking.recv_multipart())
            return [(int.from_bytes(number, "big", signed=True), batch) for _, number, batch in answers[:-1]]
        finally:
            context.destroy(linger=0)

    async def talk():
        async with EventPublisher(ANYWHERE, ANYWHERE) as publisher:
            assert await ask(publisher) == [], "nobody gives one"
            publisher.snapshot = log.snapshot
            for first in range(3):  # nobody listens
                cache.allocate(first, [first] * 4)
                cache.commit(first)
                await publisher.publish(batch_bytes(log.take()))
            ((number, batch),) = await ask(publisher)
            assert number == 2 and view.restore("a", number, batch)

    asyncio.run(asyncio.wait_for(talk(), 20))
    for first in range(3):
        assert view.matched(prefix_hashes([first] * 4, 2), ["a"]).tolist() == [[4, 0, 0]]


def test_only_the_last_batches_are_kept(monkeypatch):
    pytest.importorskip("zmq.asyncio")
    monkeypatch.setattr("pagedkv.server.events.MAX_KEPT_BYTES", 100)

    async def publish():
        async with EventPublisher(ANYWHERE, ANYWHERE) as publisher:
            for _ in range(50):
                await publisher.publish(b"x" * 30)
            return [number for number, _ in publisher._kept]

    assert asyncio.run(publish()) == [47, 48, 49]


def test_an_address_in_use_is_said():
    pytest.importorskip("zmq.asyncio")

    async def twice():
        async with EventPublisher(ANYWHERE, ANYWHERE) as first, EventPublisher(first.address, ANYWHERE):
            pass

    with pytest.raises(InvalidOperation, match="events_endpoint: expected an address that is free"):
        asyncio.run(twice())


def test_without_zmq_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.setitem(sys.modules, "zmq.asyncio", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[events\]'"):
        EventPublisher(ANYWHERE)


def test_a_recording_is_a_trace(tmp_path):
    engine = FakeEngine(256)
    path = tmp_path / "events.kv"

    async def serve():
        async with kv_events(server_state(engine, record_events=path)):
            for _ in range(40):
                engine.step()
                await asyncio.sleep(0.005)

    asyncio.run(serve())
    trace = read_trace(path, format="kv-events")
    assert trace.block_tokens == 16 and len(trace.input_tokens) > 10
    # The first blocks of the trace's chains are the first blocks of the system prompts.
    heads = {int(trace.ids[start]) for start in trace.offsets[:-1]}
    assert len(heads) == len(engine.systems)


def test_a_recording_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "events.kv"
    for _ in range(2):
        recorder = EventRecorder(path)
        recorder.record(msgspec.msgpack.encode([1.0, [], 0]))
        recorder.close()
        recorder.record(b"late")
    assert path.read_bytes().count(b"\xc6") == 2


def test_a_full_disk_ends_the_recording_only(tmp_path, caplog):
    recorder = EventRecorder(tmp_path / "events.kv")
    recorder._file.close()

    def refuse(_):
        raise OSError("No space left on device")

    recorder._file = SimpleNamespace(closed=False, write=refuse, flush=lambda: None, close=lambda: None)
    recorder.record(b"x")
    assert "No space left on device" in caplog.text


def test_nobody_listens_and_the_cache_logs_nothing():
    engine = FakeEngine(64)

    async def serve():
        async with kv_events(server_state(engine)):
            return engine.cache._state.counters[0].logging

    assert asyncio.run(serve()) == 0


@pytest.mark.parametrize(
    ("endpoint", "stays"),
    [
        ("tcp://127.0.0.1:5557", True),
        ("tcp://127.3.0.1:5557", True),
        ("tcp://localhost:5557", True),
        ("tcp://[::1]:5557", True),
        ("ipc:///run/kv-events", True),
        ("inproc://events", True),
        ("tcp://*:5557", False),
        ("tcp://0.0.0.0:5557", False),
        ("tcp://[::]:5557", False),
        ("tcp://eth0:5557", False),
        ("tcp://localhost.example:5557", False),
        ("tcp://10.0.0.5:*", False),
        ("epgm://eth0;239.0.0.1:5557", False),
    ],
)
def test_which_endpoints_stay_on_this_machine(endpoint, stays):
    assert stays_here(endpoint) is stays


@pytest.mark.parametrize("settings", [{}, {"events_token_ids": True}], ids=["by default", "where the operator says so"])
@pytest.mark.parametrize("leaves", [True, False], ids=["beyond the machine", "within it"])
def test_token_ids_leave_the_machine_only_where_the_operator_says_so(tmp_path, monkeypatch, leaves, settings):
    pytest.importorskip("zmq.asyncio")
    if leaves:
        monkeypatch.setattr(events, "stays_here", lambda endpoint: False)
    sent = []

    async def publish(self, payload):
        sent.append(msgspec.msgpack.decode(payload))

    monkeypatch.setattr(EventPublisher, "publish", publish)
    engine, path = FakeEngine(256), tmp_path / "events.kv"

    async def serve():
        state = server_state(engine, events_endpoint=ANYWHERE, record_events=path, **settings)
        async with kv_events(state):
            for _ in range(40):
                engine.step()

    asyncio.run(serve())
    told = [event for batch in sent for event in stored(batch)]
    assert told and all(event["block_hashes"] and event["block_size"] == 16 for event in told)
    assert any(event["token_ids"] for event in told) is (not leaves or bool(settings))
    assert len(read_trace(path, format="kv-events").input_tokens) > 10, "a recording has everything"


def test_a_server_gives_a_snapshot_of_its_engine(monkeypatch):
    pytest.importorskip("zmq.asyncio")
    engine, sent, publishers = FakeEngine(256), [], []

    async def publish(self, payload):
        sent.append(payload)
        publishers.append(self)

    monkeypatch.setattr(EventPublisher, "publish", publish)

    async def serve():
        async with kv_events(server_state(engine, events_endpoint=ANYWHERE)):
            for _ in range(40):
                engine.step()
            await asyncio.sleep(3 * events.SECONDS_BETWEEN_BATCHES)
            ((_, snapshot),) = publishers[0]._asked_for(SNAPSHOT)
            return snapshot

    followed, restored = FleetView(16), FleetView(16)
    restored.restore("a", 0, asyncio.run(serve()))
    for number, payload in enumerate(sent):
        followed.hear("a", number, payload)
    told = [
        name for payload in sent for event in stored(msgspec.msgpack.decode(payload)) for name in event["block_hashes"]
    ]
    held = [view.matched([name], ["a"]).tolist() for view in (followed, restored) for name in told]
    assert told and held[: len(told)] == held[len(told) :] and any(map(np.any, held))
