from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.fixtures import one_thread

__all__ = ["one_thread"]

pytest.importorskip("fastapi")
pytest.importorskip("transformers")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Any]]:
    """Two engines of the shipped model, and a third to compare with."""
    from tests.server.local import make_engine

    yield {name: make_engine(num_blocks=256) for name in ("a", "b", "alone")}
