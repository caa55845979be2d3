"""The view of a fleet: exact from events in order, and healed by a snapshot whatever was lost or out of order."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import BlockManager, InvalidOperation
from pagedkv.engine.kv_events import KvEventLog
from pagedkv.fleet import FleetView, prefix_hashes
from pagedkv.fleet.view import MAX_WAITING

BLOCK = 4


class Replica:
    """An engine's books, which numbers its batches as a publisher does."""

    def __init__(self, seed: int = 0, blocks: int = 24) -> None:
        self.random = random.Random(seed)
        self.manager = BlockManager(blocks, BLOCK, whole_hits=True)
        self.log = KvEventLog(self.manager)
        self.published = -1

    def serve(self, prompt: list[int], salt: str = "") -> None:
        self.manager.allocate(1, prompt, cache_salt=salt)
        self.manager.commit(1)
        self.manager.free(1)

    def prompt(self) -> list[int]:
        family = self.random.randrange(4)
        return [family] * BLOCK * self.random.randint(1, 4) + [self.random.randrange(3)] * self.random.randrange(9)

    def batch(self) -> tuple[int, bytes] | None:
        batch = self.log.take()
        if batch is None:
            return None
        self.published += 1
        return self.published, msgspec.msgpack.encode(batch)

    def snapshot(self) -> tuple[int, bytes]:
        return self.published, msgspec.msgpack.encode(self.log.snapshot())

    def run(self, rounds: int) -> list[tuple[int, bytes]]:
        batches = []
        for _ in range(rounds):
            for _ in range(self.random.randint(1, 3)):
                self.serve(self.prompt())
            if self.random.random() < 0.05:
                self.manager.clear_prefix_cache()
            if batch := self.batch():
                batches.append(batch)
        return batches


def probes() -> list[list[int]]:
    return [[family] * BLOCK * 4 + [rest] * 8 for family in range(4) for rest in range(3)]


def is_exact(view: FleetView, name: str, replica: Replica) -> bool:
    """Whether the view says of every prompt what asking the replica says."""
    return all(
        view.matched(prefix_hashes(prompt, BLOCK), [name]).sum()
        == len(replica.manager.matching_block_ids(prompt)) * BLOCK
        for prompt in probes()
    )


def test_batches_in_order_are_followed_exactly():
    replicas, view = {"a": Replica(1), "b": Replica(2)}, FleetView(BLOCK)
    for _ in range(40):
        for name, replica in replicas.items():
            for number, batch in replica.run(1):
                assert view.hear(name, number, batch)
            assert is_exact(view, name, replica)
    assert view.replicas == ("a", "b") and view.behind == ()
    assert view.matched(prefix_hashes([0] * 8, BLOCK), ["nobody", "a"])[0].tolist() == [0, 0, 0]


@given(seed=st.integers(0, 999), drops=st.integers(0, 6), window=st.integers(1, 8), again=st.integers(0, 4))
def test_dropped_reordered_and_repeated_batches_heal_by_snapshot(seed, drops, window, again):
    replica, view = Replica(seed), FleetView(BLOCK)
    batches, shuffle = replica.run(25), random.Random(seed)
    for _ in range(min(drops, len(batches))):
        batches.pop(shuffle.randrange(len(batches)))
    batches += shuffle.sample(batches, min(again, len(batches)))
    batches = [batch for _, batch in sorted(enumerate(batches), key=lambda at: at[0] + shuffle.random() * window)]
    for number, batch in batches:
        view.hear("a", number, batch)
        if view.behind:
            assert not view.hear("a", number, batch)
    view.restore("a", *replica.snapshot())
    assert view.behind == () and is_exact(view, "a", replica)
    for number, batch in [*batches[::-1], *replica.run(5)]:  # what comes late changes nothing, and it goes on
        assert view.hear("a", number, batch)
    assert is_exact(view, "a", replica)


def test_batches_out_of_order_need_no_snapshot_once_all_are_there():
    replica, view = Replica(3), FleetView(BLOCK)
    batches = replica.run(20)
    random.Random(1).shuffle(batches)
    for number, batch in batches:
        view.hear("a", number, batch)
    assert view.behind == () and is_exact(view, "a", replica)


def test_a_gap_is_told_until_a_snapshot_comes():
    replica, view = Replica(4), FleetView(BLOCK)
    batches = replica.run(6)
    assert view.hear("a", *batches[0]) and not view.hear("a", *batches[2]) and view.behind == ("a",)
    assert view.restore("a", *replica.snapshot()) and view.behind == ()
    assert is_exact(view, "a", replica)


def test_batches_after_the_snapshot_that_came_before_it_are_kept():
    replica, view = Replica(5), FleetView(BLOCK)
    replica.run(3)
    snapshot = replica.snapshot()
    later = replica.run(4)
    for number, batch in later[::-1]:
        view.hear("a", number, batch)
    assert view.behind == ("a",)
    assert view.restore("a", *snapshot) and is_exact(view, "a", replica)


def test_a_snapshot_holds_what_was_not_taken_yet_and_hearing_it_again_changes_nothing():
    replica, view = Replica(6), FleetView(BLOCK)
    replica.run(3)
    for _ in range(20):
        replica.serve(replica.prompt())
    view.restore("a", *replica.snapshot())
    assert is_exact(view, "a", replica)
    assert view.hear("a", *replica.batch()) and is_exact(view, "a", replica)


def test_what_a_snapshot_does_not_name_is_gone_whether_it_clears_or_not():
    view = FleetView(BLOCK)
    view.hear("a", 0, [1.0, [{"type": "BlockStored", "block_hashes": [1]}]])
    view.restore("a", 3, [2.0, [{"type": "BlockStored", "block_hashes": [2]}]])
    assert [view.matched([name], ["a"]).sum() for name in (1, 2)] == [0, BLOCK]
    assert not view.hear("a", 5, [3.0, []]) and view.hear("a", 4, [2.5, []])


def test_a_snapshot_that_comes_late_takes_nothing_back():
    replica, view = Replica(7), FleetView(BLOCK)
    early = replica.snapshot()
    for number, batch in replica.run(9):
        view.hear("a", number, batch)
    assert view.restore("a", *early) and is_exact(view, "a", replica)


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_replica_that_starts_anew_is_followed_again(lost):
    old, view = Replica(8), FleetView(BLOCK)
    for number, batch in old.run(12):
        view.hear("a", number, batch)
    view.hear("a", old.published + 5, old.run(1)[-1][1])  # waits for batches that never come
    new = Replica(9)
    batches = new.run(6)
    for number, batch in batches[lost:]:
        assert not view.hear("a", number, batch)
    assert view.behind == ("a",)
    assert view.restore("a", *new.snapshot()) and is_exact(view, "a", new)
    for number, batch in new.run(20):
        assert view.hear("a", number, batch)
    assert is_exact(view, "a", new)


def test_a_replica_that_is_gone_is_forgotten():
    replica, view = Replica(10), FleetView(BLOCK)
    for number, batch in replica.run(4):
        view.hear("a", number, batch)
    view.forget("a")
    view.forget("nobody")
    assert view.replicas == () and not view.matched(prefix_hashes([0] * 16, BLOCK), ["a"]).any()


def test_what_waits_for_a_lost_batch_is_bounded():
    view = FleetView(BLOCK)
    for number in range(1, MAX_WAITING + 50):
        view.hear("a", number, [float(number), []])
    assert view.behind == ("a",) and len(view._replicas["a"]._waiting) == MAX_WAITING


def test_tokens_count_in_the_fastest_tier_that_has_them():
    view = FleetView(BLOCK)
    hashes = prefix_hashes(list(range(16)), BLOCK)
    stored = [("GPU", hashes[:1]), ("CPU", hashes[:2]), ("DISK", hashes[:1] + hashes[3:]), ("TAPE", hashes)]
    events = [{"type": "BlockStored", "block_hashes": names, "medium": medium} for medium, names in stored]
    view.hear("a", 0, [1.0, events])
    assert view.matched(hashes, ["a"]).tolist() == [[4, 4, 0]], "the third block is nowhere, so the fourth is no use"
    view.hear("a", 1, [2.0, [{"type": "BlockRemoved", "block_hashes": hashes[:1], "medium": "GPU"}]])
    assert view.matched(hashes, ["a"]).tolist() == [[0, 8, 0]]
    view.hear("a", 2, [3.0, [{"type": "AllBlocksCleared"}]])
    assert view.matched(hashes, ["a"]).tolist() == [[0, 0, 0]]


def test_positional_events_and_hashes_of_bytes():
    view = FleetView(BLOCK)
    batch = [
        1.0,
        [["BlockStored", [b"x", b"y"], None, [], BLOCK, None, "CPU"], ["BlockRemoved", [b"y"], "CPU"], ["New"]],
    ]
    view.hear("a", 0, msgspec.msgpack.encode(batch))
    view.hear("a", 1, [2.0, [["BlockStored", [b"y"], b"x", [], BLOCK]]])
    assert view.matched([b"x", b"y"], ["a"]).tolist() == [[4, 4, 0]]
    view.hear("a", 2, [3.0, [["AllBlocksCleared"]]])
    assert view.matched([b"x"], ["a"]).sum() == 0


BAD = [
    b"\xc1",
    b"",
    7,
    [1.0],
    ["soon", []],
    [1.0, [7]],
    [1.0, [{"kind": "BlockStored"}]],
    [1.0, [{"type": "BlockStored", "block_hashes": 5}]],
    [1.0, [{"type": "BlockStored", "block_hashes": ["name"]}]],
    [1.0, [{"type": "BlockStored", "block_hashes": [1], "block_size": 16}]],
    [1.0, [{"type": "BlockStored", "block_hashes": [1]}, []]],
]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_batch_changes_nothing(bad):
    view = FleetView(BLOCK)
    for take in (view.hear, view.restore):
        with pytest.raises(InvalidOperation, match="batch: expected"):
            take("a", 0, bad)
    assert not view.matched([1], ["a"]).any()
    assert view.hear("a", 0, [1.0, [{"type": "BlockStored", "block_hashes": [1]}]])
    assert np.array_equal(view.matched([1], ["a"]), [[4, 0, 0]])


def test_salts_part_prompts():
    replica, view = Replica(11), FleetView(BLOCK)
    replica.serve([1] * 8, "mine")
    view.hear("a", *replica.batch())
    assert view.matched(prefix_hashes([1] * 8, BLOCK, "mine"), ["a"]).sum() == 8
    assert view.matched(prefix_hashes([1] * 8, BLOCK), ["a"]).sum() == 0
