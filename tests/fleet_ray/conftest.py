"""Two replicas of the shipped model on Ray Serve, and one engine beside them; run by ``make test-fleet``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from tests.server.local import SMALL, Process, process

MODEL = "pysmall"
OPTIONS = [*SMALL, "--dtype", "float32"]

os.environ |= {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[str]:
    """Of Ray's sessions; the paths of its sockets have to be short."""
    folder = tempfile.mkdtemp(prefix="pkv-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with process(tmp_path_factory.mktemp("one") / "log", *OPTIONS) as started:
        yield started


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, ray_folder: str) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("fleet") / "log"
    with process(log, *OPTIONS, "--replicas", "2", "--drain-timeout", "10", env={"RAY_TMPDIR": ray_folder}) as started:
        yield started
        assert started.stop() == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
