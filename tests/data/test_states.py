"""StateStorage: rows of tensors, copied as the books say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv import InvalidOperation, OutOfMemory, PagedKvCache
from pagedkv.data.states import StateStorage


def test_the_last_of_several_copies_to_one_slot_counts():
    states = StateStorage(4)
    states.add((2,), torch.float32, "cpu")
    states.tensors[0][:] = torch.arange(4)[:, None]
    states.num_tokens[:] = states.writes[:] = np.arange(4)
    states.copy(np.array([[0, 3], [1, 2], [1, 3]], np.int32))
    assert states.tensors[0][:, 1].tolist() == [0, 1, 1, 1]
    assert states.num_tokens.tolist() == states.writes.tolist() == [0, 1, 1, 1]


def test_a_slot_that_is_given_anew_is_of_no_text():
    cache = PagedKvCache(8, 4, 1, 2, num_states=1)
    cache.allocate(1, 5)
    cache.states.num_tokens[cache.state_slots([1])] = 5
    cache.free(1)
    cache.allocate(1, 5)
    assert cache.states.num_tokens[cache.state_slots([1])] == 0


def test_a_state_has_parts_of_their_own_types():
    states = StateStorage(3)
    assert states.add((2, 5), torch.bfloat16, "cpu") == 0
    assert states.add((), torch.float32, "cpu") == 1
    assert states.slot_memory_bytes == 24 and states.total_memory_bytes == 72


def test_without_slots_there_are_no_states():
    with pytest.raises(InvalidOperation, match="num_states: expected at least 1, for states, got 0"):
        StateStorage(0).add((1,), torch.float32, "cpu")
    assert StateStorage(0).slot_memory_bytes == 0


def test_what_does_not_fit_is_named():
    with pytest.raises(OutOfMemory, match=r"3 times \[1099511627776\] of torch.float32 cannot be allocated"):
        StateStorage(3).add((2**40,), torch.float32, "cpu")


def test_a_cache_counts_them_and_copies_them():
    cache = PagedKvCache(8, 4, 1, 2, dtype="float32", num_states=3)
    cache.states.add((10,), torch.float32, "cpu")
    blocks = cache.spec.total_memory_bytes
    assert cache.total_memory_bytes == blocks + 120 and cache.used_memory_bytes == 0
    cache.allocate(1, 1)
    assert cache.used_memory_bytes == cache.block_memory_bytes + 40
    cache.states.tensors[0][cache.state_slots([1])] = 7.0
    cache.fork(1, 2)
    assert cache.states.tensors[0][cache.state_slots([2])].eq(7).all()
    assert not len(cache.take_state_copies())
