"""A ladder of tiers: who is asked, what is copied for whom, and when a tier is left alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tests.contracts.user_tiers import DictTier

from pagedkv.tiers import BlockFormat, HostTier, rung
from pagedkv.tiers.known import KnownTexts, chain_of
from pagedkv.tiers.ladder import Ladder
from pagedkv.tiers.rung import Rung

SIZE, BYTES = 4, 96
BLOCK = BlockFormat("model", SIZE, BYTES)


class FarTier(DictTier):
    """Answers when all that it was asked is worked off, and not before."""

    is_available = True

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.thread.submit(time.sleep, 0)

    def _count(self, keys):
        time.sleep(0.01)  # so that no answer is there at once
        return super()._count(keys)

    def settle(self):
        self.thread.submit(int).result()


def text(num_blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, num_blocks * SIZE)


class Pool:
    """Remembers from which block on its rows were copied."""

    def __init__(self, num_blocks):
        self.num_blocks, self.copied = num_blocks, []

    def read(self, first):
        self.copied.append(first)
        return np.full((self.num_blocks - first, BYTES), 7, np.uint8)


@pytest.fixture
def far():
    made = FarTier()
    yield made
    made.close()


@pytest.fixture
def ladder(far):
    made = Ladder([far], lambda: BLOCK)
    yield made
    made.close()


def store(ladder, far, ids, salt=""):
    """Return from which block on a text was copied, once it is stored; None where it was not."""
    pool = Pool(len(ids) // SIZE)
    ladder.store(ids, salt, pool.read)
    far.settle()
    return pool.copied[0] if pool.copied else None


def ask(ladder, far, ids, salt=""):
    ladder.match(ids, salt)
    far.settle()


def test_what_a_far_tier_is_known_to_have_is_not_copied_for_it_again(ladder, far):
    ids = text(9)
    ask(ladder, far, ids)
    assert store(ladder, far, ids) == 0
    assert store(ladder, far, ids) is None
    longer = np.concatenate([ids, text(3, 1)])
    assert store(ladder, far, longer) == 9 and len(far.blocks) == 12
    assert store(ladder, far, longer, "other salt") == 0
    other = np.concatenate([ids[: 5 * SIZE], text(3, 2)])
    ask(ladder, far, other)  # as when a request arrives: the tier says that it has five
    assert store(ladder, far, other) == 5
    assert ladder.staged_bytes == 0


def test_what_a_far_tier_has_lost_is_copied_again(ladder, far):
    ids = text(9)
    ask(ladder, far, ids)
    store(ladder, far, ids)
    far.blocks.clear()
    longer = np.concatenate([ids, text(3, 1)])
    assert store(ladder, far, longer) == 9 and far.blocks == {}  # it could not know
    assert store(ladder, far, longer) == 0 and len(far.blocks) == 12
    far.blocks.clear()
    ask(ladder, far, longer)
    assert store(ladder, far, longer) == 0
    ladder.clear()
    assert store(ladder, far, longer) == 0


def test_nothing_is_copied_for_a_tier_that_says_it_cannot_be_reached(ladder, far):
    far.is_available = False
    assert [future.result() for future in ladder.match(text(9), "")] == [0]
    assert store(ladder, far, text(9)) is None and ladder.figures[0].dropped == 1
    far.is_available = True
    ask(ladder, far, text(9))
    assert store(ladder, far, text(9)) == 0


def test_a_near_tier_keeps_what_it_lacks_though_there_is_no_room_for_what_a_far_one_lacks(far):
    near = HostTier("1MB").open(BLOCK)
    ladder = Ladder([near, far], lambda: BLOCK, most_staged=4 * BYTES)
    ids = text(9)
    near.store(ids, Pool(9).read(0)).result()
    assert ladder._storing.take(1, BYTES) == 1  # something else is on its way
    longer = np.concatenate([ids, text(3, 1)])
    assert store(ladder, far, longer) == 9
    while ladder.staged_bytes > BYTES:
        ladder.news.wait(0.01)
    assert near.match(longer).result() == 12 and far.blocks == {}
    assert [each.dropped for each in ladder.figures] == [0, 1]
    ladder._let_go(ladder._storing, BYTES)
    ladder.close()
    near.close()


def test_what_is_known_is_bounded_and_the_oldest_goes():
    known, chains = KnownTexts(2), [chain_of(text(4, seed), "", SIZE) for seed in range(3)]
    for chain in (*chains[:2], chains[0], chains[2]):
        known.note(chain, 4)
    assert [known.leading(chain) for chain in chains] == [4, 0, 4]
    known.note(chains[0], 2)
    assert known.leading(chains[0]) == 2
    known.note(chains[0], 0)
    assert known.leading(chains[0]) == 0
    known.clear()
    assert known.leading(chains[2]) == 0


@pytest.mark.parametrize("rests", [1, 3, 40])
def test_rests_become_longer_up_to_a_limit(rests, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(rung.time, "monotonic", lambda: clock[0])
    one = Rung(HostTier("1MB"))
    for _ in range(rests):
        assert one.may_be_asked()
        one.no_match(clock[0])
        pause = one._back_at - clock[0]
        clock[0] += pause
    assert pause == min(30.0, 2.0 ** (rests - 1))
    assert one.may_be_asked() and not one.may_be_asked()  # one asks, and the others need not wait for that
    one.has_matched(0.01)
    assert one.may_be_asked() and one.may_be_asked()
    one.has_loaded()
    one.no_match(clock[0] + 1)
    assert one._back_at == clock[0] + 1.0


def test_a_tier_that_others_hear_of_is_late_and_not_left_alone():
    one = Rung(HostTier("1MB"))
    since = time.monotonic()
    one.has_matched(0.01)
    one.no_match(since)
    one.has_loaded()
    one.no_load(since)
    assert one.may_be_asked() and not one.is_resting and one.figures.late == 2


def test_a_resting_tier_is_given_one_store_at_a_time(far):
    ladder = Ladder([far], lambda: BLOCK)
    ladder.rungs[0].no_match(time.monotonic() + 60)
    pools = [Pool(3), Pool(4)]
    gate = far.thread.submit(time.sleep, 0.05)
    for seed, pool in enumerate(pools):
        ladder.store(text(pool.num_blocks, seed), "", pool.read)
    assert [pool.copied for pool in pools] == [[0], []] and ladder.figures[0].dropped == 1
    gate.result(), far.settle()
    ladder.close()
