"""The cache, and the books alone with a data plane of their owner, under random interleavings of every public call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import rule, run_state_machine_as_test
from tests.stateful.machine import CacheMachine

from pagedkv import BlockManager, PagedKvCache

SHORT = settings(max_examples=60, stateful_step_count=50)


class WithTensors(CacheMachine):
    """``PagedKvCache``: real keys and values in two layers."""

    def make(self, num_blocks, block_size, **options):
        return PagedKvCache(num_blocks, block_size, 1, 2, num_layers=2, v_head_dim=1, dtype="float32", **options)

    def store(self, plan, values):
        column = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
        self.cache.write(0, torch.cat([column, -column], dim=2), column + 0.25, plan)
        self.cache.write(1, torch.cat([-column, column], dim=2), column + 0.5, plan)

    def stored(self, slots):
        keys, values = zip(*(self.cache.storage.gather(layer, slots) for layer in (0, 1)), strict=True)
        found = keys[0][:, 0, 0]
        same = (
            (keys[0][:, 0, 1] == -found)
            & (keys[1][:, 0, 0] == -found)
            & (keys[1][:, 0, 1] == found)
            & (values[0][:, 0, 0] == found + 0.25)
            & (values[1][:, 0, 0] == found + 0.5)
        )
        return torch.where(same, found, -1).tolist()

    def contents(self):
        layers = [side(layer) for layer in (0, 1) for side in (self.cache.storage.keys, self.cache.storage.values)]
        return [layer.numpy().tobytes() for layer in layers]


class BooksAlone(CacheMachine):
    """``BlockManager``: its owner keeps one number per slot and makes the copies that plans ask for."""

    checks_every_step = False  # so that copies of several calls wait for one plan

    def make(self, num_blocks, block_size, **options):
        self.pool = np.full((num_blocks, block_size), -1.0)
        return BlockManager(num_blocks, block_size, **options)

    def obey(self, plan):
        sources, destinations = plan.copies.T
        assert len(set(destinations.tolist())) == len(destinations)
        self.pool[destinations] = self.pool[sources]
        plan.copies = plan.copies[:0]  # a plan that is held back must not make them again
        return plan

    def store(self, plan, values):
        self.pool.reshape(-1)[plan.slot_mapping] = values

    def stored(self, slots):
        return self.pool.reshape(-1)[slots].tolist()

    def contents(self):
        return self.pool.tobytes()

    @rule()
    def look(self):
        self.check_contents()

    def teardown(self):
        if hasattr(self, "cache"):
            self.check_contents()


@pytest.mark.parametrize("machine", [WithTensors, BooksAlone])
def test_every_public_call_in_any_order(machine):
    run_state_machine_as_test(machine, settings=SHORT)


def run_steps(machine, steps):
    """Run a machine until it has made so many steps."""
    machine.steps = 0
    many = settings(max_examples=2_000, stateful_step_count=50, deadline=None, database=None)
    while machine.steps < steps:
        run_state_machine_as_test(machine, settings=many)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [WithTensors, BooksAlone])
def test_half_a_million_steps(machine):
    run_steps(machine, 500_000)
