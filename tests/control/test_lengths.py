"""What the books cannot hold is refused by name: lengths beyond 32 bits."""

from __future__ import annotations

import pytest

from pagedkv import BlockManager, InvalidOperation

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
