from __future__ import annotations

import pytest
from tests.fixtures import one_thread

__all__ = ["one_thread"]

pytest.importorskip("fastapi")
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
