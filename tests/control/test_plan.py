"""The arrays of a plan, recomputed naively from what the sequences hold."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import BatchPlan, BlockManager, MissingExtra


def slots_of(manager, seq_id, dropped_slots):
    """All slots of a sequence's table that hold a visible token, in order."""
    size, table = manager.block_size, manager.get_sequence(seq_id).block_ids
    slots = [block * size + offset for block in table for offset in range(size)]
    start, end = dropped_slots
    return slots[:start] + slots[end:]


@settings(max_examples=60)
@given(
    lens=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    grown=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    sink=st.integers(0, 4),
    window=st.integers(0, 5),
    size=st.integers(1, 4),
)
def test_a_plan_follows_from_the_tables(lens, grown, sink, window, size):
    manager = BlockManager(200, size)
    seq_ids = list(range(10, 10 + len(lens)))
    for seq_id, count in zip(seq_ids, lens, strict=True):
        manager.allocate(seq_id, count)
    manager.apply_streaming_llm(seq_ids[0], sink, window)
    counts = grown[: len(lens)]
    plan = manager.append_batch(seq_ids, counts=counts)
    assert isinstance(plan, BatchPlan) and plan.num_sequences == len(lens) and plan.total_tokens == sum(counts)
    assert plan.cu_seqlens_q.tolist() == [0, *np.cumsum(counts).tolist()]
    slots, positions, text = [], [], []
    for i, (seq_id, count) in enumerate(zip(seq_ids, counts, strict=True)):
        info = manager.get_sequence(seq_id)
        visible = slots_of(manager, seq_id, plan.holes[i])[: info.num_tokens]
        span = range(info.num_tokens - count, info.num_tokens)
        slots += [visible[p] for p in span]
        positions += list(span)
        text += [p + info.num_dropped_tokens for p in span]
        assert plan.seq_lens[i] == info.num_tokens == len(visible)
        assert plan.block_tables[i, : info.num_blocks].tolist() == list(info.block_ids)
        hole = plan.holes[i, 1] - plan.holes[i, 0]
        assert info.num_blocks == -(-(info.num_tokens + hole) // size)
    assert plan.slot_mapping.tolist() == slots
    assert plan.positions.tolist() == positions and plan.text_positions.tolist() == text
    again = manager.plan(seq_ids, counts)
    for name in ("slot_mapping", "positions", "block_tables", "seq_lens", "cu_seqlens_q", "holes", "num_dropped"):
        assert getattr(again, name).tolist() == getattr(plan, name).tolist(), name


@pytest.mark.parametrize("left", [6, 5, 4])
def test_a_sequence_that_is_taken_back_to_its_sinks_has_no_hole(left):
    manager = BlockManager(20, 4)
    manager.allocate(1, 20)
    manager.apply_streaming_llm(1, 6, 4)
    assert manager.plan([1], 1).holes.tolist() == [[6, 8]]
    manager.truncate(1, left)
    assert np.diff(manager.plan([1], 1).holes).item() == 0
    assert manager.get_sequence(1).num_blocks == (left + 3) // 4
    manager.check()


def test_dtypes_and_shapes():
    manager = BlockManager(10, 2)
    manager.allocate(1, 3)
    manager.allocate(2, 5)
    plan = manager.append_batch([2, 1], counts=[2, 1])
    kinds = {name: (str(getattr(plan, name).dtype), getattr(plan, name).shape) for name in plan.__slots__[:-1]}
    assert kinds == {
        "seq_ids": ("int64", (2,)),
        "slot_mapping": ("int64", (3,)),
        "block_tables": ("int32", (2, 4)),
        "seq_lens": ("int32", (2,)),
        "cu_seqlens_q": ("int32", (3,)),
        "positions": ("int64", (3,)),
        "holes": ("int32", (2, 2)),
        "num_dropped": ("int64", (2,)),
        "copies": ("int32", (0, 2)),
    }


def test_the_default_is_what_is_not_committed():
    manager = BlockManager(10, 4)
    manager.allocate(1, [1, 2, 3, 4, 5])
    manager.commit(1)
    manager.append(1, [6, 7])
    assert manager.plan([1]).positions.tolist() == [5, 6]
    manager.commit(1)
    assert manager.plan([1]).total_tokens == 0


@pytest.mark.parametrize("batch", [[], (), np.empty(0, np.int64)])
def test_an_empty_batch(batch):
    manager = BlockManager(4, 2)
    for plan in (manager.plan(batch), manager.append_batch(batch), manager.append_batch(batch, [])):
        assert plan.num_sequences == plan.total_tokens == 0 and plan.cu_seqlens_q.tolist() == [0]
        manager.commit(plan)


def test_copies_of_several_calls_wait_for_one_plan():
    manager = BlockManager(10, 4)
    manager.allocate(1, 2)
    manager.fork(1, 2)
    manager.append(2, 1)
    manager.fork(2, 3)
    plan = manager.append_batch([3], counts=1)
    source = manager.get_sequence(1).block_ids[0]
    wanted = [[source, manager.get_sequence(seq_id).block_ids[0]] for seq_id in (2, 3)]
    assert plan.copies.tolist() == wanted, "a copy of a copy reads the first source: all are made at once"
    assert len(manager.plan([1]).copies) == 0


def test_forks_of_one_batch_leave_the_last_writer_the_block():
    manager = BlockManager(4, 4)
    info = manager.allocate(1, 2)
    manager.fork(1, 2)
    manager.fork(1, 3)
    plan = manager.append_batch([1, 2, 3], counts=1)
    assert len(plan.copies) == 2 and manager.used_block_count == 3
    assert manager.get_sequence(3).block_ids == info.block_ids
    assert len(set(plan.slot_mapping.tolist())) == 3


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_a_plan_as_tensors(device):
    manager = BlockManager(16, 4)
    manager.allocate(1, [1, 2, 3, 4, 5])
    manager.fork(1, 2)
    plan = manager.append_batch([1, 2], [6, 7])
    tensors = plan.torch(device)
    for name, tensor in tensors._asdict().items():
        array = getattr(plan, name)
        assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
        assert tensor.shape == array.shape and tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
    tensors.slot_mapping.zero_()
    assert plan.slot_mapping.any()


def test_a_plan_as_tensors_without_torch(monkeypatch):
    manager = BlockManager(4, 4)
    manager.allocate(1, 2)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match="torch"):
        manager.plan([1]).torch()


def test_the_arrays_of_a_plan_can_be_written_to():
    """Otherwise ``torch.from_numpy`` of one warns of undefined behaviour."""
    manager = BlockManager(16, 4)
    manager.allocate(1, 5)
    for plan in (manager.plan([1]), manager.append_batch([1]), manager.append_batch([])):
        for name in ("slot_mapping", "block_tables", "seq_lens", "cu_seqlens_q", "positions", "holes", "num_dropped"):
            assert getattr(plan, name).flags.writeable, name
            torch.from_numpy(getattr(plan, name))
