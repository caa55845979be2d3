"""Block tables cost what is used: one very long sequence beside many short ones, moves, and memory that is refused."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import BlockManager, CorruptedState, OutOfMemory
from pagedkv.control import block_tables


def short_of_room(manager):
    """Leave no room behind the segments in use."""
    state = manager._state
    manager._state = state._replace(tables=state.tables[: state.counter("tables_top")].copy())
    return manager


def test_a_very_long_sequence_beside_many_short_ones():
    manager = BlockManager(160_000, 1)
    manager.allocate(0, 100_000)
    for seq_id in range(1, 10_001):
        manager.allocate(seq_id, 3)
    held = 100_000 + 10_000 * block_tables.SHORTEST
    assert manager.table_memory_bytes <= 4 * 4 * held, "of 4 bytes an entry, segments twice and an array twice as long"
    assert manager.plan([0, 1], 1).block_tables.shape == (2, 100_000)
    manager.append(0, 20_000)
    manager.check()
    assert manager.get_sequence(10_000).num_blocks == 3


def test_what_a_long_sequence_took_is_used_again():
    manager = BlockManager(100_000, 1)
    for _ in range(5):
        manager.allocate(0, 90_000)
        manager.free(0)
    most = manager.table_memory_bytes
    assert most <= 4 * 4 * 90_000
    for seq_id in range(20_000):
        manager.allocate(seq_id, 1)
    for seq_id in range(20_000):
        manager.free(seq_id)
        manager.allocate(seq_id, 2)
    assert manager.table_memory_bytes <= 4 * 4 * block_tables.SHORTEST * 20_000
    manager.check()


def test_every_sequence_was_long_once():
    """A row keeps its segment for the next sequence; not for ever, or all would be as wide as the longest again."""
    manager = BlockManager(20_000, 1)
    for seq_id in range(1000):
        manager.allocate(seq_id, 1)
    for seq_id in range(1000):
        manager.append(seq_id, 10_000)
        manager.truncate(seq_id, 1)
    assert manager.table_memory_bytes <= 4 * 4 * (10_000 + 1000 * block_tables.SHORTEST)
    manager.check()


def test_rows_without_a_sequence_have_no_segment_once_tables_are_laid_out_anew():
    manager = BlockManager(100, 1)
    for seq_id in range(40):
        manager.allocate(seq_id, 1)
    for seq_id in range(40):
        manager.free(seq_id)
    short_of_room(manager).allocate(1, 20)
    assert manager._state.sequences["room"].sum() == manager._state.counter("tables_top") == 32
    manager.check()


def test_a_segment_that_just_does_not_fit():
    for missing in (0, 1):
        manager = BlockManager(100, 1)
        manager.allocate(1, block_tables.SHORTEST)
        state = manager._state
        length = state.counter("tables_top") + 2 * block_tables.SHORTEST - missing
        manager._state = state._replace(tables=state.tables[:length].copy())
        manager.append_batch([1])
        assert (len(manager._state.tables) == length) == (missing == 0)
        manager.check()


steps = st.lists(
    st.tuples(st.sampled_from("aaggggfft.x"), st.integers(0, 5), st.integers(0, 5), st.integers(0, 70)), max_size=60
)


@settings(max_examples=60)
@given(steps=steps)
def test_tables_that_move_keep_their_blocks(steps):
    manager, tables = BlockManager(4000, 1), {}
    for what, seq_id, other, count in steps:
        kept = tables.get(seq_id, ())
        if what == "a" and seq_id not in tables:
            manager.allocate(seq_id, count)
        elif what == "g" and tables:
            manager.append_batch(list(tables), counts=[count if key == seq_id else key % 2 for key in tables])
        elif what == "f" and seq_id in tables and other not in tables:
            manager.fork(seq_id, other)
            assert manager.get_sequence(other).block_ids == kept
        elif what == "t" and seq_id in tables:
            kept = kept[: min(count, len(kept))]
            manager.truncate(seq_id, len(kept))
        elif what == "x" and seq_id in tables:
            manager.free(seq_id)
            kept = ()
        elif what == ".":
            short_of_room(manager)
        tables = {info.seq_id: info.block_ids for info in manager.snapshot().sequences}
        assert tables.get(seq_id, ())[: len(kept)] == kept
        manager.check()


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("table", 8, "segments of block tables overlap"),
        ("room", 8, "segments of block tables lost"),
        ("table", 10**6, "end beyond what was handed out"),
    ],
)
def test_check_sees_segments_that_are_wrong(field, value, what):
    manager = BlockManager(100, 1)
    for seq_id in range(3):
        manager.allocate(seq_id, 10)
    manager._state.sequences[field][1] = value
    with pytest.raises(CorruptedState, match=what):
        manager.check()


def free_id(manager):
    return max(manager.sequence_ids) + 1


@pytest.mark.parametrize(
    "call",
    [
        lambda manager: manager.allocate(100, 70),
        lambda manager: manager.append(1, 70),
        lambda manager: manager.append_batch([1, 2], counts=70),
        lambda manager: manager.fork(1, free_id(manager)),
    ],
)
def test_tables_that_do_not_fit_into_memory(call, monkeypatch):
    manager = BlockManager(1000, 1)
    manager.allocate(1, 2)
    manager.allocate(2, 3)
    short_of_room(manager)
    before = manager.snapshot()

    def refuse(length, dtype):
        raise MemoryError("Unable to allocate 30.5 GiB")

    monkeypatch.setattr(block_tables.np, "zeros", refuse)
    with pytest.raises(OutOfMemory, match=r"block tables of 2 sequences take [\d,]+ bytes, which the system refuses"):
        call(manager)
    monkeypatch.undo()
    manager.check()
    assert manager.snapshot() == before
    call(manager)
    manager.check()


def test_nobody_is_evicted_for_the_slot_of_a_state_when_tables_do_not_fit_into_memory(monkeypatch):
    manager = BlockManager(100, 1, on_full="evict", num_states=2)
    manager.allocate(1, 2)
    manager.allocate(2, 3)
    short_of_room(manager)
    before = manager.snapshot()

    def refuse(length, dtype):
        raise MemoryError

    monkeypatch.setattr(block_tables.np, "zeros", refuse)
    with pytest.raises(OutOfMemory, match="block tables of 2 sequences"):
        manager.allocate(3, 40)
    monkeypatch.undo()
    assert manager.snapshot() == before
    manager.check()
    manager.allocate(3, 40)
    assert manager.sequence_ids == [2, 3]
    manager.check()


def test_tables_are_as_long_as_memory_allows(monkeypatch):
    manager = BlockManager(5000, 1)
    manager.allocate(1, 1000)
    zeros = np.zeros

    def refuse(length, dtype):
        if length > 6000:
            raise MemoryError
        return zeros(length, dtype)

    monkeypatch.setattr(block_tables.np, "zeros", refuse)
    manager.append(1, 3000)
    assert manager.get_sequence(1).num_blocks == 4000
    manager.check()


@pytest.fixture
def little_memory():
    """Let the process have 256 MiB more and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "call", [lambda cache, ids: cache.plan(ids, 0), lambda cache, ids: cache.append_batch(ids, counts=1)]
)
def test_a_plan_that_does_not_fit_into_memory(call, request):
    manager = BlockManager(130_000, 1)
    ids = list(range(2000))
    for seq_id in ids:
        manager.allocate(seq_id, 1 if seq_id else 100_000)
    call(manager, ids[-2:])
    before = manager.snapshot()
    request.getfixturevalue("little_memory")
    with pytest.raises(OutOfMemory, match="block tables of 2000 sequences, 100000 blocks each, take 800,000,000 bytes"):
        call(manager, ids)
    assert manager.snapshot() == before
    manager.check()


def test_a_plan_that_does_not_fit_into_memory_evicts_nobody(request):
    manager = BlockManager(105_000, 1, on_full="evict")
    ids = list(range(2000))
    for seq_id in [5000, *ids]:
        manager.allocate(seq_id, 1 if seq_id else 100_000)
    manager.append_batch([5000], counts=manager.free_block_count)
    before = manager.snapshot()
    request.getfixturevalue("little_memory")
    with pytest.raises(OutOfMemory, match="which the system refuses"):
        manager.append_batch(ids)
    assert manager.snapshot() == before
    manager.check()
