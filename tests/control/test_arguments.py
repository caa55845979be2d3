"""What callers pass: errors name the argument that was given, what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest

from pagedkv import BlockManager, InvalidOperation


@pytest.fixture
def manager():
    manager = BlockManager(20, 4)
    manager.allocate(1, 6)
    manager.allocate(2, 5)
    return manager


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (-1, "expected an int in 0 … [0-9]*, got -1"),
        (1.5, "expected an int, got 1.5"),
        (True, "expected an int, got True"),
        ("ab", "expected ints in 1 dimension"),
        ({1: 2}, "expected a count, or one for each sequence, got {1: 2}"),
        ([1], "expected one entry for each of 2 sequences, got 1"),
        ([1, -1], "expected counts of at least 0, got -1"),
        ([1.0, 2.0], "expected ints in 1 dimension, got float64"),
        ([[1], [2]], "expected ints in 1 dimension, got int64 of shape"),
        (np.ones((2, 1), int), "expected ints in 1 dimension, got int64 of shape"),
        ([7, 1], "expected at most the tokens of the sequence, got 7 for S1"),
    ],
    ids=str,
)
def test_a_plan_names_its_own_argument(manager, wanted, text):
    before = manager.snapshot()
    with pytest.raises(InvalidOperation, match=f"num_query_tokens: {text}"):
        manager.plan([1, 2], wanted)
    assert manager.snapshot() == before


@pytest.mark.parametrize("wanted", [2, [2, 2], (2, 2), np.array([2, 2], np.uint8)], ids=repr)
def test_query_tokens_of_a_plan(manager, wanted):
    assert manager.plan([1, 2], wanted).positions.tolist() == [4, 5, 3, 4]


def test_counts_are_called_counts(manager):
    with pytest.raises(InvalidOperation, match="counts_or_tokens: expected counts of at least 0, got -1"):
        manager.append_batch([1, 2], [1, -1])
    with pytest.raises(InvalidOperation, match=r"counts_or_tokens\[1\]: expected token ids of at least 0, got -1"):
        manager.append_batch([1, 2], [[1], [-1]])


def test_an_absurd_count_is_told_the_limit(manager):
    with pytest.raises(InvalidOperation, match=f"sink_tokens: expected an int in 0 … {2**62}, got {2**63}"):
        manager.apply_streaming_llm(1, 2**63, 1)
    with pytest.raises(InvalidOperation, match="sink_tokens: expected an int of at least 0, got -1"):
        manager.apply_streaming_llm(1, -1, 1)
