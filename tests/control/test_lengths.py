"""What the books cannot hold is refused by name: lengths beyond 32 bits, tables that the system has no memory for."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import BlockManager, InvalidOperation, OutOfMemory
from pagedkv.control import state

MOST = 2**31 - 1


def long_pool():
    """Blocks so large that a few hold more tokens than 32 bits count, without room for token ids: none are known."""
    manager = BlockManager(4, 1)
    manager._state.counters[0].block_size = 2**30
    return manager


def test_the_longest_sequence():
    manager = long_pool()
    assert manager.allocate(1, MOST).num_tokens == MOST
    plan = manager.plan([1], 1)
    assert plan.seq_lens.tolist() == [MOST] and plan.positions.tolist() == [MOST - 1]
    manager.check()


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.allocate(2, MOST + 1),
        lambda manager: manager.append(1, MOST - 9),
        lambda manager: manager.append_batch([1], counts=MOST - 9),
    ],
)
def test_a_longer_one_is_refused(call):
    manager = long_pool()
    manager.allocate(1, 10)
    before = manager.snapshot()
    with pytest.raises(
        InvalidOperation, match="tokens: expected sequences of at most 2147483647 tokens, got 2147483648"
    ):
        call(manager)
    assert manager.snapshot() == before
    manager.check()


def free_id(manager):
    return max(manager.sequence_ids) + 1


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.allocate(100, 70),
        lambda manager: manager.append(1, 70),
        lambda manager: manager.append_batch([1, 2], counts=70),
        lambda manager: [manager.allocate(free_id(manager), 0) for _ in range(70)],
        lambda manager: [manager.fork(1, free_id(manager)) for _ in range(70)],
    ],
)
def test_tables_that_do_not_fit_into_memory(call, monkeypatch):
    manager = BlockManager(1000, 1)
    manager.allocate(1, 2)
    manager.allocate(2, 3)
    zeros = np.zeros

    def refuse(shape, dtype=float):
        if isinstance(shape, tuple) and len(shape) == 2 and dtype is np.int32:
            raise MemoryError("Unable to allocate 30.5 GiB")
        return zeros(shape, dtype)

    monkeypatch.setattr(state.np, "zeros", refuse)
    with pytest.raises(OutOfMemory, match=r"block tables of \d+ sequences, \d+ blocks each, take [\d,]+ bytes"):
        call(manager)
    monkeypatch.undo()
    manager.check()
    assert manager.get_sequence(1).num_tokens == 2 and manager.get_sequence(2).num_tokens == 3
    call(manager)
    manager.check()
