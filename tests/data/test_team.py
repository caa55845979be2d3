"""The team of threads: every job is done once and whole, whoever comes late or never."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from pagedkv.data.simd import fetch_add
from pagedkv.data.team import run_in_threads, wait_until
from pagedkv.jit import compiled

ITEMS = 1000
compiled_only = pytest.mark.skipif("NUMBA_DISABLE_JIT" in os.environ, reason="threads are for compiled kernels")


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@compiled
def _count_items(counters, seen):
    """Count each of the items that is taken."""
    while True:
        item = fetch_add(counters, 0, 1)
        if item >= len(seen):
            return
        seen[item] += 1


@compiled
def _in_phases(counters, sums, num_phases):
    """Add one to every number, phase after phase; no phase begins before the last one ended."""
    size = len(sums)
    while True:
        work = fetch_add(counters, 0, 1)
        if work >= num_phases * size:
            return
        phase, place = work // size, work % size
        wait_until(counters, 1, phase * size)
        before = sums[place - 1] if place else sums[size - 1]
        if before >= phase:
            sums[place] += 1
        fetch_add(counters, 1, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_is_worked_on_once(threads):
    for _ in range(50):
        seen = np.zeros(ITEMS, np.int64)
        run_in_threads(_count_items, (np.zeros(1, np.int64), seen), threads)
        assert (seen == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_phase_sees_what_the_one_before_it_wrote(threads):
    sums = np.zeros(16, np.int64)
    run_in_threads(_in_phases, (np.zeros(2, np.int64), sums, 50), threads)
    assert (sums == 50).all()
