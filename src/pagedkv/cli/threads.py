"""How many threads torch gets: more than one is a loss where the work of a layer is small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["threads_for"]

_SMALL = 100_000_000
"""Parameters. Below it one token takes a layer some microseconds, and threads wait for each other longer than that."""


@contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """Let torch run on one thread while a small model writes; ``OMP_NUM_THREADS`` in the environment has its way.

    On cores that other processes use too, threads that wait for each other after every small product cost far more
    than they bring.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
