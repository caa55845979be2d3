"""RespTier: several who share, and a server that damages, refuses, stalls, hangs up or is restarted."""

from __future__ import annotations

import logging
import sys
import threading

import numpy as np
import pytest
from tests.contracts.test_tier_contract import BLOCK, BYTES, SIZE, loaded, payload, text
from tests.tiers.resp_server import RespServer

from pagedkv import InvalidOperation, MissingExtra, TierError
from pagedkv.tiers import BlockFormat, RespTier
from pagedkv.tiers import resp_client as client
from pagedkv.tiers.ladder import Ladder

HEAD = 20 + 4 * SIZE + 8


@pytest.fixture
def server():
    made = RespServer()
    yield made
    made.stop()


@pytest.fixture
def eager(monkeypatch):
    """A server that failed is asked again at once."""
    monkeypatch.setattr(client, "LEAST_PAUSE", 0.0)


def opened(server, block=BLOCK, timeout=60, **options):
    return RespTier(server.url, timeout=timeout, **options).open(block)


@pytest.fixture
def tier(server):
    """One that holds a text of nine blocks."""
    with opened(server) as made:
        assert made.store(text(9), payload(text(9))).result() == 9
        yield made


def keys_in_order(server):
    """The keys of a server, as they were stored: root first."""
    return list(server.values)


# Several who share.


def test_another_process_finds_what_one_has_stored(server, tier):
    with opened(server) as other:
        assert other.match(text(9)).result() == 9
        assert (loaded(other, text(9)) == payload(text(9))).all()
        longer = np.concatenate([text(9), text(2, 5)])
        assert other.store(longer, payload(longer)[9:]).result() == 11
    assert (loaded(tier, longer) == payload(longer)).all()


@pytest.mark.parametrize(
    "block",
    [BlockFormat("other", SIZE, BYTES), BlockFormat("model", SIZE, BYTES - 8), BlockFormat("model", SIZE // 2, BYTES)],
)
def test_models_and_namespaces_share_nothing(server, tier, block):
    for other in (opened(server, block), opened(server, namespace="tests")):
        with other:
            assert other.match(text(9)).result() == 0
            other.clear()
    assert tier.match(text(9)).result() == 9
    tier.clear()
    assert not server.values


def test_two_who_store_one_text_at_once_leave_one_of_each_block(server):
    ids, started = text(6), threading.Barrier(2, timeout=60)
    touched = iter(range(2))

    def together(name):
        if name == "SET" and next(touched, None) is not None:
            started.wait()

    server.before = together
    with opened(server) as one, opened(server) as other:
        stores = [each.store(ids, payload(ids)) for each in (one, other)]
        assert [each.result() for each in stores] == [6, 6] and len(server.values) == 6
        assert one.stats.stored + other.stats.stored == 6 == one.stats.skipped + other.stats.skipped
        assert (loaded(one, ids) == payload(ids)).all()


def test_blocks_stay_as_long_as_they_are_looked_up_and_then_end(server):
    with opened(server, ttl=100) as tier:
        tier.store(text(3), payload(text(3))).result()
        assert len(server.until) == 3
        for key in server.until:
            server.until[key] -= 90
        tier.match(text(2)).result()
        left = [server.until[key] for key in keys_in_order(server)]
        assert left[0] - left[2] == pytest.approx(90, abs=10) and left[1] > left[2] + 80
        server.until[keys_in_order(server)[2]] = 0
        assert tier.match(text(3)).result() == 2


def test_a_chain_ends_at_its_first_hole(server, tier):
    server.values.pop(keys_in_order(server)[4])
    assert tier.match(text(9)).result() == 4 == len(loaded(tier, text(9)))
    assert tier.store(text(9), payload(text(9))[5:]).result() == 4
    assert tier.store(text(9), payload(text(9))[4:]).result() == 9
    assert tier.stats.stored == 10 and (loaded(tier, text(9)) == payload(text(9))).all()


def test_a_long_text_goes_in_several_pieces(server):
    ids = text(600)
    with opened(server) as tier:
        assert tier.store(ids, payload(ids)).result() == 600 == tier.match(ids).result()
        assert (loaded(tier, ids) == payload(ids)).all()
        server.values.pop(keys_in_order(server)[500])
        assert tier.match(ids).result() == 500 == len(loaded(tier, ids))


def test_large_blocks_come_in_place():
    block, server = BlockFormat("model", SIZE, 300_000), RespServer()
    ids = text(40)
    rows = np.random.default_rng(1).integers(0, 256, (40, 600_000), np.uint8)[:, ::2].copy()
    into = np.zeros((40, 2, 300_000), np.uint8)[:, 1]  # rows that do not lie side by side
    with opened(server, block) as tier:
        assert tier.store(ids, rows).result() == 40 == tier.load(ids, into).result()
    assert (into == rows).all()
    server.stop()


# What a server has is not believed.


def flipped(value, place):
    return value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]


DAMAGE = {
    "payload": lambda values, key: flipped(values[key], HEAD + 50),
    "last byte": lambda values, key: flipped(values[key], HEAD + BYTES - 1),
    "checksum": lambda values, key: flipped(values[key], HEAD - 1),
    "token ids": lambda values, key: flipped(values[key], 20),
    "digest before": lambda values, key: flipped(values[key], 0),
    "cut off": lambda values, key: values[key][:-1],
    "empty": lambda values, key: b"",
    "longer": lambda values, key: values[key] + b"\0" * 100_000,
    "another block": lambda values, key: values[next(iter(values))],
    "the next block": lambda values, key: values[list(values)[list(values).index(key) + 1]],
    "something else": lambda values, key: b"\r\n$3\r\nfoo\r\n" * 20,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_value_is_a_miss_and_is_healed_by_the_next_store(server, tier, damage):
    key = keys_in_order(server)[5]
    server.values[key] = DAMAGE[damage](server.values, key)
    assert (loaded(tier, text(9)) == payload(text(9))[:5]).all()
    assert len(loaded(tier, text(9))) == 5 == tier.match(text(9)).result()
    assert tier.stats.corrupt == 1 and tier.stats.unanswered == 0
    assert tier.store(text(9), payload(text(9))).result() == 9
    assert (loaded(tier, text(9)) == payload(text(9))).all()


def test_whatever_a_server_mixes_up_no_wrong_block_comes(server, eager):
    rng = np.random.default_rng(3)
    texts = [np.concatenate([text(3), text(5, seed)]) for seed in range(1, 5)]
    with opened(server) as tier:
        for _ in range(15):
            for ids in texts:
                tier.store(ids, payload(ids)).result()
            keys = list(server.values)
            for _ in range(4):
                one, other = (keys[i] for i in rng.choice(len(keys), 2, replace=False))
                damage = rng.integers(4)
                if damage == 0:
                    server.values[one], server.values[other] = server.values[other], server.values[one]
                elif damage == 1:
                    server.values[one] = flipped(server.values[one], int(rng.integers(len(server.values[one]))))
                elif damage == 2:
                    server.values[one] = server.values[one][: int(rng.integers(HEAD + BYTES))]
                else:
                    server.values.pop(one)
                    keys.remove(one)
            for ids in texts:
                rows = loaded(tier, ids)
                assert (rows == payload(ids)[: len(rows)]).all()
        assert tier.stats.corrupt > 10


def test_a_key_of_another_kind_is_a_miss(server, tier):
    server.refusals["GET"] = "WRONGTYPE Operation against a key holding the wrong kind of value"
    assert len(loaded(tier, text(9))) == 0 and tier.stats.corrupt == 9
    server.refusals.clear()
    assert tier.match(text(9)).result() == 0
    assert tier.store(text(9), payload(text(9))).result() == 9


# A server that does not do what it should.


def calls_of(tier):
    """Every call, and what it gives where nothing fails."""
    ids, other = text(9), text(2, 77)
    return {
        "TOUCH": (lambda: tier.match(ids).result(60), 9),
        "GET": (lambda: len(loaded(tier, ids)), 9),
        "SET": (lambda: tier.store(other, payload(other)).result(60), 2),
    }


FAULTS = {
    "stalls": lambda server, command: setattr(server, "stalls_at", command),
    "trickles": lambda server, command: setattr(server, "trickles", True),
    "hangs up": lambda server, command: setattr(server, "hangs_up_at", command),
    "refuses": lambda server, command: server.refusals.update({command: "LOADING the dataset is in memory soon"}),
    "talks nonsense": lambda server, command: server.answers.update({command: b"HTTP/1.1 400 Bad Request\r\n\r\n"}),
    "never ends a line": lambda server, command: server.answers.update({command: b"+" + b"x" * 200_000}),
}


@pytest.mark.parametrize("command", ["TOUCH", "GET", "SET"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_a_miss_and_is_found_again(server, eager, tier, command, fault):
    call, all_of_it = calls_of(tier)[command]
    FAULTS[fault](server, command)
    if fault in ("stalls", "trickles"):
        tier._timeout = 0.2
    assert call() < all_of_it
    stats = tier.stats
    assert stats.unanswered + stats.failed > 0 and stats.corrupt == 0
    tier._timeout = 60
    server.heal()
    assert len(loaded(tier, text(9))) == 9 and (loaded(tier, text(9)) == payload(text(9))).all()
    assert call() == all_of_it


def test_nobody_waits_for_a_name_that_is_looked_up_for_ever(server, eager, tier):
    connections, go_on = tier._connections, threading.Event()
    server.stop()
    server.start()  # so that there is no connection
    connect = connections._connect

    def slow():
        go_on.wait()
        return connect()

    connections._connect = slow
    tier._timeout = 0.05
    assert tier.match(text(9)).result(60) == 0 and tier.stats.unanswered == 1
    tier._timeout = 60
    go_on.set()
    assert tier.match(text(9)).result(60) == 9


def test_a_restart_is_noticed_and_what_the_server_kept_is_found(server, tier):
    server.stop()
    server.start()
    assert (loaded(tier, text(9)) == payload(text(9))).all() and tier.match(text(9)).result() == 9
    server.stop(forget=True)
    server.start()
    assert tier.match(text(9)).result() == 0 == tier.stats.unanswered
    assert tier.store(text(9), payload(text(9))).result() == 9


def test_a_server_that_is_gone_is_left_alone_and_nobody_waits_for_it(server, tier, monkeypatch, caplog):
    monkeypatch.setattr(client, "LEAST_PAUSE", 1000.0)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 1000.0)
    server.stop()
    with caplog.at_level(logging.INFO, "pagedkv"):
        assert tier.match(text(9)).result() == 0 == len(loaded(tier, text(9)))
        assert tier.store(text(9), payload(text(9))).result() == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"] and tier.place in caplog.text
    server.start()
    assert tier.match(text(9)).result() == 0  # it is not asked yet
    assert tier.stats.unanswered == 4 and tier._connections._failures == 1 and not tier.is_available
    with caplog.at_level(logging.INFO, "pagedkv"):
        tier._connections._back_at = 0.0
        assert tier.is_available and tier.match(text(9)).result() == 9
    assert "answers again" in caplog.text and tier.is_available


def test_each_piece_has_only_the_time_that_is_left(monkeypatch):
    now, limits = [1000.0], []
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])

    class Socket:
        settimeout = limits.append

        def recv_into(self, buffer):
            now[0] += 1
            buffer[:1] = b"+"
            return 1

    wire = client.Wire(type("Connection", (), {"_sock": Socket()}))
    with pytest.raises(TimeoutError, match="no answer in time"):
        wire.reply(1003.0)
    assert limits == [3.0, 2.0, 1.0]


def test_pauses_grow_and_have_an_end(server, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    connections = client.Connections(server.url, 1.0)
    pauses = []
    for _ in range(12):
        connections.failed(None, ConnectionError("gone"))
        pauses.append(connections._back_at - now[0])
    assert pauses[:3] == pytest.approx([0.1, 0.2, 0.4]) and pauses[-1] == 30.0
    connections.failed(None, client.Unavailable("still"))
    assert connections._failures == 12
    connections.close()


def test_while_one_call_tries_a_server_again_the_others_go_on(server, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()
    with opened(server) as tier:
        tier._connections.failed(None, ConnectionError("gone"))
        tier._connections._back_at = 0.0

        def wait(name):
            if name == "TOUCH":
                reached.set()
                assert go_on.wait(60)

        server.before = wait
        for idle in tier._connections._idle:
            idle.close()
        tier._connections._idle.clear()
        first = tier.match(text(1))
        assert reached.wait(60)
        assert tier.match(text(1)).result() == 0 and not first.done()
        go_on.set()
        first.result()
    assert tier.stats.unanswered == 1


def test_a_full_server_keeps_the_beginning(server):
    server.most_values = 5
    with opened(server) as tier:
        assert tier.store(text(9), payload(text(9))).result() == 5 == tier.match(text(9)).result()
        assert (tier.stats.stored, tier.stats.failed, tier.stats.unanswered) == (5, 4, 0)
        assert (loaded(tier, text(9)) == payload(text(9))[:5]).all()


def test_a_reader_of_a_server_that_takes_no_writes_still_reads(server, tier):
    with opened(server, ttl=60) as reader:
        for name in ("SET", "EXPIRE", "UNLINK"):
            server.refusals[name] = "READONLY You can't write against a read only replica."
        assert reader.match(text(9)).result() == 9 == len(loaded(reader, text(9)))
        other = text(2, 8)
        assert reader.store(other, payload(other)).result() == 0 and reader.stats.failed == 2
        assert reader.stats.unanswered == 0


def test_texts_of_two_salts_share_nothing(server, tier):
    ids = text(9)
    assert tier.store(ids, payload(ids), "mine").result() == 9
    assert tier.match(ids, "mine").result() == 9 and tier.match(ids, "theirs").result() == 0
    assert len(server.values) == 18  # those without a salt, too


def test_what_is_cleared_while_it_is_stored_is_gone(server):
    reached, go_on = threading.Event(), threading.Event()

    def wait(name):
        if name == "SET":
            reached.set()
            assert go_on.wait(60)

    server.before = wait
    with opened(server) as tier:
        stored = tier.store(text(9), payload(text(9)))
        assert reached.wait(60)
        clearing = threading.Thread(target=tier.clear)
        clearing.start()
        while tier._clears == 0:
            pass
        go_on.set()
        clearing.join(60)
        assert stored.result() == 0 == tier.match(text(9)).result() and not server.values


def test_a_clear_that_fails_says_so(server, tier):
    server.refusals["UNLINK"] = "NOPERM no permission"
    with pytest.raises(TierError, match="could not be deleted: NOPERM"):
        tier.clear()
    server.stop()
    with pytest.raises(TierError, match="could not be deleted"):
        tier.clear()


# Addresses.


def test_a_server_that_is_not_there_yet_is_a_miss_and_a_line_in_the_log(server, eager, caplog):
    server.stop()
    with opened(server) as tier:
        assert tier.is_open and "fails, what it has is computed instead" in caplog.text
        server.start()
        assert tier.store(text(2), payload(text(2))).result() == 2


def test_passwords_are_given_and_told_to_nobody(caplog):
    server = RespServer("hunter2")
    with opened(server) as tier:
        assert tier.store(text(2), payload(text(2))).result() == 2
        assert "hunter2" not in repr(tier) + tier.place
    wrong = RespTier(server.url.replace("hunter2", "secret99"), timeout=60)
    with wrong.open(BLOCK):
        assert wrong.match(text(2)).result() == 0
    assert "WRONGPASS" in caplog.text or "invalid username-password" in caplog.text
    assert "secret99" not in caplog.text
    server.stop()


def test_bad_arguments_are_refused():
    for wrong in (7, "", "http://here", "valkey://:pass@host:port"):
        with pytest.raises(InvalidOperation, match="url: expected an address such as valkey://") as error:
            RespTier(wrong)
        assert "pass@" not in str(error.value)
    for name, value in {"namespace": "a b", "ttl": 0, "timeout": 0}.items():
        with pytest.raises(InvalidOperation, match=f"{name}: expected"):
            RespTier("valkey://localhost", **{name: value})


def test_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pagedkv\[resp\]'"):
        RespTier("valkey://localhost")


# In a ladder.


def test_a_ladder_counts_what_it_did_and_what_it_did_not(server, tier):
    ladder = Ladder([tier], lambda: BLOCK)
    ids = text(9)
    assert ladder.counts([future for future in ladder.match(ids, "") if future.result(60) is not None]) == [9]
    (load,) = ladder.load(ids, "", [9], 0, None)
    while not load.is_done:
        ladder.news.wait(0.01)
    assert (load.rows == payload(ids)).all()
    load.leave()
    server.values[keys_in_order(server)[0]] = b"no"
    loaded(tier, ids)
    server.stop()
    tier.match(ids).result()
    (figures,) = ladder.figures
    assert (figures.medium, figures.loads, figures.corrupt, figures.failed) == ("REMOTE", 9, 1, 1)
    ladder.close()
    assert tier.is_open  # it was open before
    with pytest.raises(InvalidOperation, match="is open for"):
        Ladder([tier], lambda: BlockFormat("other", SIZE, BYTES))
