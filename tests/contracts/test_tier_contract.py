"""One exam for every tier: those of pagedkv, one over a user's slots, and one that a user might write."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.user_tiers import DictTier, ListSlots
from tests.tiers.resp_server import RespServer

from pagedkv import InvalidOperation
from pagedkv.tiers import BlockFormat, BookTier, DiskTier, HostTier, RespTier, Tier

SIZE, BYTES, SLOTS = 4, 96, 64
BLOCK = BlockFormat("model", SIZE, BYTES)

SERVERS = []


@pytest.fixture(autouse=True)
def servers():
    """Those that a test has started; they end with it."""
    yield SERVERS
    while SERVERS:
        SERVERS.pop().stop()


def resp_tier(slots, **options):
    """A tier on a server of its own that refuses what is beyond so many blocks."""
    SERVERS.append(RespServer())
    SERVERS[-1].most_values = slots
    return RespTier(SERVERS[-1].url, timeout=60, **options).open(BLOCK)


MAKERS = {
    "disk": lambda path, slots=SLOTS: DiskTier(path / "tier", slots * (4096 + 128)).open(BLOCK),
    "durable disk": lambda path, slots=SLOTS: DiskTier(path / "tier", slots * 4224, durable=True).open(BLOCK),
    "host": lambda path, slots=SLOTS: HostTier(slots * BYTES).open(BLOCK),
    "resp": lambda path, slots=SLOTS: resp_tier(slots),
    "resp with ttl": lambda path, slots=SLOTS: resp_tier(slots, ttl=3600),
    "slots of a user": lambda path, slots=SLOTS: BookTier(ListSlots(slots), strategy="lfu").open(BLOCK),
    "five methods": lambda path, slots=SLOTS: DictTier(SIZE, slots),
}
OURS = [name for name in MAKERS if name != "five methods"]


@pytest.fixture(params=MAKERS)
def tier(request, tmp_path):
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


def text(num_blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, num_blocks * SIZE)


def payload(ids, version=0, salt=""):
    """Rows that only these tokens behind each other have."""
    count, digest, rows = len(ids) // SIZE, xxhash.xxh3_64(f"{version} {salt}".encode()), []
    for i in range(count):
        digest.update(np.asarray(ids[i * SIZE : (i + 1) * SIZE], np.int64).tobytes())
        rows.append(np.random.default_rng(digest.intdigest()).integers(0, 256, BYTES, np.uint8))
    return np.array(rows, np.uint8).reshape(count, BYTES)


def loaded(tier, ids, salt="", last=None):
    """What a tier gives of a text: the rows that it answers for."""
    rows = np.full((len(ids) // SIZE if last is None else last, BYTES), 77, np.uint8)
    return rows[: tier.load(ids, rows, salt).result()]


def test_it_is_a_tier(tier):
    assert isinstance(tier, Tier)
    assert tier.medium in ("CPU", "DISK", "REMOTE")


def test_what_was_not_stored_is_not_there(tier):
    ids = text(3)
    assert tier.match(ids).result() == 0 == len(loaded(tier, ids))
    assert tier.match([]).result() == 0 == tier.store([], payload([])).result() == len(loaded(tier, []))


def test_what_was_stored_comes_back(tier):
    ids = text(9)
    assert tier.store(ids, payload(ids)).result() == 9
    assert tier.match(ids).result() == 9
    assert (loaded(tier, ids) == payload(ids)).all()
    assert (loaded(tier, ids, last=4) == payload(ids)[5:]).all()


def test_token_ids_behind_the_last_whole_block_are_left_aside(tier):
    ids = [*text(2).tolist(), 7, 8, 9]
    assert tier.store(ids, payload(ids)).result() == 2
    assert tier.match(ids[:-1]).result() == 2 == tier.match(ids[:8]).result()
    assert tier.match(ids[:7]).result() == 1


def test_texts_part_where_their_tokens_do(tier):
    ids, other = text(6), text(6)
    other[3 * SIZE] += 1
    tier.store(ids, payload(ids)).result()
    assert tier.match(other).result() == 3
    assert tier.store(other, payload(other)).result() == 6
    assert (loaded(tier, ids) == payload(ids)).all() and (loaded(tier, other) == payload(other)).all()


def test_salts_share_nothing(tier):
    ids = text(3)
    tier.store(ids, payload(ids, salt="a"), "a").result()
    assert tier.match(ids).result() == 0 == tier.match(ids, "b").result()
    tier.store(ids, payload(ids, salt="b"), "b").result()
    for salt in "ab":
        assert (loaded(tier, ids, salt) == payload(ids, salt=salt)).all()


def test_a_text_goes_on_where_it_is_stored(tier):
    ids = text(8)
    tier.store(ids[: 5 * SIZE], payload(ids)[:5]).result()
    assert tier.store(ids, payload(ids)[5:]).result() == 8
    assert (loaded(tier, ids) == payload(ids)).all()


def test_nothing_is_stored_behind_a_gap(tier):
    ids = text(8)
    tier.store(ids[: 3 * SIZE], payload(ids)[:3]).result()
    assert tier.store(ids, payload(ids)[5:]).result() == 3
    assert len(loaded(tier, ids)) == 3


def test_what_is_there_is_left_as_it_is(tier):
    ids = text(4)
    tier.store(ids, payload(ids)).result()
    assert tier.store(ids, payload(ids, version=1)).result() == 4
    assert (loaded(tier, ids) == payload(ids)).all()


def test_it_forgets(tier):
    ids = text(4)
    tier.store(ids, payload(ids)).result()
    tier.clear()
    assert tier.match(ids).result() == 0 == len(loaded(tier, ids))
    assert tier.store(ids, payload(ids, version=1)).result() == 4
    assert (loaded(tier, ids) == payload(ids, version=1)).all()


def test_it_closes_twice(tier):
    tier.close()
    tier.close()


def test_many_transfers_at_once(tier):
    texts = [np.concatenate([text(2), text(3, seed)]) for seed in range(1, 9)]
    for ids, stored in [(ids, tier.store(ids, payload(ids))) for ids in texts]:
        assert stored.result() == 5
        assert tier.match(ids).result() == 5
    rows = [np.zeros((5, BYTES), np.uint8) for _ in texts]
    for ids, into, load in [(ids, into, tier.load(ids, into)) for ids, into in zip(texts, rows, strict=True)]:
        assert load.result() == 5 and (into == payload(ids)).all()


step = st.tuples(
    st.sampled_from(["store", "store", "load", "match", "clear"]),
    st.lists(st.integers(0, 1), max_size=5),  # a block is SIZE times one of two ids
    st.integers(0, 5),  # rows
    st.sampled_from(["", "x"]),
    st.integers(0, 3),  # version
)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25)
@given(steps=st.lists(step, max_size=30), slots=st.sampled_from([2, 7, 130]))
def test_it_agrees_with_a_dict(name, tmp_path_factory, steps, slots):
    """Roomy tiers answer as a dict does; small ones may forget, and never say what was not stored."""
    tier, known = MAKERS[name](tmp_path_factory.mktemp("tier"), slots), {}
    is_roomy = slots == 130  # there are at most 2 + 4 + … + 32 blocks of each salt
    try:
        for what, blocks, most, salt, version in steps:
            ids = np.repeat(blocks, SIZE).astype(np.int64)
            keys = [(salt, tuple(blocks[: i + 1])) for i in range(len(blocks))]
            there = next((i for i, key in enumerate(keys) if key not in known), len(keys))
            count = min(most, len(blocks))
            first = len(blocks) - count
            if what == "clear":
                tier.clear()
                known.clear()
            elif what == "match":
                found = tier.match(ids, salt).result()
                assert found == there if is_roomy else found <= there
            elif what == "load":
                rows = loaded(tier, ids, salt, last=count)
                assert len(rows) == max(0, there - first) if is_roomy else len(rows) <= max(0, there - first)
                for row, key in zip(rows, keys[first:], strict=False):
                    assert any((row == version).all() for version in known[key])
            else:
                rows = payload(ids, version, salt)[first:]
                answer = tier.store(ids, rows, salt).result()
                if there >= first:
                    for row, key in zip(rows, keys[first:], strict=True):
                        kept = known.setdefault(key, [])
                        if not is_roomy or not kept:
                            kept.append(row)
                    there = len(keys)
                assert answer == there if is_roomy else answer <= there
            if isinstance(tier, BookTier):
                tier.books.check()
                assert tier.books.used_block_count == 0
    finally:
        tier.close()


@pytest.fixture(params=OURS)
def ours(request, tmp_path):
    made = MAKERS[request.param](tmp_path)
    yield made
    made.close()


def test_bad_arguments_are_refused_and_change_nothing(ours):
    ids = text(3)
    rows = payload(ids)
    for call in (ours.store, ours.load):
        for wrong in (rows[:, :-1], rows[0], rows.astype(np.int16), list(rows), payload(text(4)), rows[:, ::-1]):
            with pytest.raises(InvalidOperation, match=r"rows: expected uint8 \[m, 96\] with m of at most 3"):
                call(ids, wrong)
        with pytest.raises(InvalidOperation, match="cache_salt: expected a str, got 1"):
            call(ids, rows, 1)
        with pytest.raises(InvalidOperation, match="token_ids: expected ids in 0 … 2147483647, got 2147483648"):
            call([2**31] * SIZE, rows[:1])
        with pytest.raises(InvalidOperation, match="expected token ids of at least 0, got -1"):
            call([-1] * SIZE, rows[:1])
        with pytest.raises(InvalidOperation, match="token_ids: expected token ids, got 12"):
            call(12, rows)
    rows.flags.writeable = False
    with pytest.raises(InvalidOperation, match="rows: expected an array that may be written"):
        ours.load(ids, rows)
    assert ours.store(ids, rows).result() == 3
    if isinstance(ours, BookTier):
        ours.books.check()


def test_it_says_that_it_is_not_open(ours):
    ours.close()
    for call in (lambda: ours.match([1]), lambda: ours.load([], payload([])), lambda: ours.store([], payload([]))):
        with pytest.raises(InvalidOperation, match="the tier is not open"):
            call()
    with pytest.raises(InvalidOperation, match="the tier is not open"):
        ours.clear()
    ours.open(BLOCK)
    with pytest.raises(InvalidOperation, match="open already"):
        ours.open(BLOCK)


def test_it_counts(ours):
    ids = text(5)
    ours.store(ids[: 3 * SIZE], payload(ids)[:3]).result()
    ours.store(ids, payload(ids)).result()
    loaded(ours, ids)
    stats = ours.stats
    assert (stats.stored, stats.skipped, stats.loaded, stats.corrupt, stats.failed) == (5, 3, 5, 0, 0)
    assert stats.read_bytes == stats.written_bytes == 5 * BYTES


def test_a_full_tier_gives_up_what_was_used_least_recently(tmp_path):
    tier = HostTier(8 * BYTES).open(BLOCK)
    old, used, new = text(4, 1), text(4, 2), text(4, 3)
    for ids in (old, used):
        tier.store(ids, payload(ids)).result()
    tier.store(old, payload(old)[4:]).result()  # everything is there: that counts as a use
    tier.store(new, payload(new)).result()
    assert [tier.match(ids).result() for ids in (old, used, new)] == [4, 0, 4]
    assert tier.store(text(9, 4), payload(text(9, 4))).result() == 8
    assert tier.stats.refused == 1


def test_the_writes_of_a_day_have_an_end(tmp_path):
    slots = ListSlots(50)
    tier = BookTier(slots, daily_writes=10 * BYTES).open(BLOCK)
    ids, more = text(7, 1), text(7, 2)
    assert tier.store(ids, payload(ids)).result() == 7
    assert tier.store(more, payload(more)).result() == 3
    assert tier.store(ids, payload(ids)).result() == 7  # it is there
    assert tier.stats.stored == 10 and tier.stats.refused == 4
    tier.books.check()


class Faulty(ListSlots):
    """Slots that fail from a call on."""

    failing = None

    def write(self, slots, rows, places):
        if self.failing is not None and (places >= self.failing).any():
            raise OSError("no")
        super().write(slots, rows, places)


def test_what_could_not_be_written_is_not_there():
    slots = Faulty(2000)
    tier = BookTier(slots).open(BLOCK)
    ids = text(600)
    slots.failing = 400
    count = tier.store(ids, payload(ids)).result()
    assert 0 < count <= 400 and tier.match(ids).result() == count
    assert tier.stats.failed == 600 - tier.stats.stored > 0
    assert (loaded(tier, ids) == payload(ids)[:count]).all()
    slots.failing = None
    assert tier.store(ids, payload(ids)).result() == 600
    assert (loaded(tier, ids) == payload(ids)).all()
    tier.books.check()


def test_a_fault_of_the_slots_themselves_is_told():
    class Broken(ListSlots):
        def read(self, slots, rows, places):
            raise ZeroDivisionError

    tier = BookTier(Broken(20)).open(BLOCK)
    ids = text(3)
    tier.store(ids, payload(ids)).result()
    with pytest.raises(ZeroDivisionError):
        loaded(tier, ids)
    tier.books.check()
    assert tier.books.used_block_count == 0


def test_a_damaged_payload_is_a_miss_and_is_healed_by_the_next_store():
    slots = ListSlots(20)
    tier = BookTier(slots).open(BLOCK)
    ids = text(6)
    tier.store(ids, payload(ids)).result()
    place = slots.slots.index(payload(ids)[2].tobytes())
    slots.slots[place] = b"\0" * BYTES
    assert (loaded(tier, ids) == payload(ids)[:2]).all() and tier.stats.corrupt == 1
    assert tier.match(ids).result() == 2
    assert tier.store(ids, payload(ids)[2:]).result() == 6
    assert tier.stats.stored == 7
    assert (loaded(tier, ids) == payload(ids)).all() and tier.match(ids).result() == 6


class Gate(ListSlots):
    """Slots that wait where a test wants them to."""

    def __init__(self, num_slots):
        super().__init__(num_slots)
        import threading

        self.reached, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def _wait(self):
        self.reached.set()
        assert self.go_on.wait(60)

    def read(self, slots, rows, places):
        self._wait()
        super().read(slots, rows, places)

    def write(self, slots, rows, places):
        self._wait()
        super().write(slots, rows, places)


def test_what_is_being_stored_is_not_found_and_what_is_cleared_meanwhile_never_is():
    slots = Gate(20)
    tier = BookTier(slots).open(BLOCK)
    ids = text(4)
    slots.go_on.clear()
    slots.reached.clear()
    stored = tier.store(ids, payload(ids))
    assert slots.reached.wait(60) and not stored.cancel()
    assert tier.match(ids).result() == 0
    tier.clear()
    slots.go_on.set()
    assert stored.result(60) == 0 == tier.match(ids).result()
    tier.books.check()
    assert tier.books.free_block_count == 20


def test_a_damaged_block_that_is_rewritten_while_it_is_read_is_believed():
    slots, ids = Gate(20), text(3)
    tier = BookTier(slots).open(BLOCK)
    tier.store(ids, payload(ids)).result()
    slots.slots[slots.slots.index(payload(ids)[1].tobytes())] = b"\0" * BYTES

    def read_and_wait(*arguments):
        ListSlots.read(slots, *arguments)
        slots._wait()

    slots.read = read_and_wait
    slots.go_on.clear()
    slots.reached.clear()
    load = tier.load(ids, np.zeros((3, BYTES), np.uint8))
    assert slots.reached.wait(60)
    slots.read = lambda *arguments: ListSlots.read(slots, *arguments)
    slots.write = lambda *arguments: ListSlots.write(slots, *arguments)
    assert len(loaded(tier, ids)) == 1
    assert tier.store(ids, payload(ids, version=1)[1:]).result(60) == 3
    slots.go_on.set()
    assert load.result(60) == 1 and tier.match(ids).result() == 3


def test_what_is_being_loaded_is_not_given_up():
    slots = Gate(6)
    tier = BookTier(slots).open(BLOCK)
    ids, other = text(4, 1), text(6, 2)
    tier.store(ids, payload(ids)).result()
    slots.go_on.clear()
    slots.reached.clear()
    rows = np.zeros((4, BYTES), np.uint8)
    load = tier.load(ids, rows)
    assert slots.reached.wait(60)
    store = tier.store(other, payload(other))
    slots.go_on.set()
    assert load.result(60) == 4 and (rows == payload(ids)).all()
    assert store.result(60) == 2 == tier.match(other).result()
    tier.books.check()


def test_two_stores_of_one_text_at_once_leave_one():
    slots = Gate(20)
    tier = BookTier(slots).open(BLOCK)
    ids = text(4)
    slots.go_on.clear()
    first, second = tier.store(ids, payload(ids)), tier.store(ids, payload(ids, version=1))
    slots.go_on.set()
    assert first.result(60) == second.result(60) == 4
    rows = loaded(tier, ids)
    assert (rows == payload(ids)).all() or (rows == payload(ids, version=1)).all()
    assert tier.books.cached_block_count == 4
    tier.books.check()


def test_closing_waits_for_what_is_under_way():
    import threading

    slots = Gate(20)
    tier = BookTier(slots).open(BLOCK)
    ids = text(4)
    slots.go_on.clear()
    slots.reached.clear()
    stored = tier.store(ids, payload(ids))
    assert slots.reached.wait(60)
    closing = threading.Thread(target=tier.close)
    closing.start()
    assert not stored.done()
    slots.go_on.set()
    closing.join(60)
    assert stored.done() and stored.result() == 4
