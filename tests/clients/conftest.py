"""A server of the shipped model for clients that people use; run by ``make test-clients``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.server.local import SMALL, Process, process

MODEL = "pysmall"
KEY = "key-a"

os.environ |= {"HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("server") / "log"
    with process(log, *SMALL, "--dtype", "float32", env={"PAGEDKV_API_KEYS": f"{KEY} key-b"}) as started:
        yield started
        assert started.stop() == 0, log.read_text()
        assert "Traceback" not in log.read_text()
