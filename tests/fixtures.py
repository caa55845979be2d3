"""A fixture for those parts of the tests that run models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

__all__ = ["one_thread"]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tiny models spend their time waking threads: one is many times faster, on a busy machine above all."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
