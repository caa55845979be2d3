"""What callers pass: errors name the argument that was given, what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
    with pytest.raises(InvalidOperation, match="counts: expected counts of at least 0, got -1"):
        manager.append_batch([1, 2], counts=[1, -1])
    with pytest.raises(InvalidOperation, match=r"tokens\[1\]: expected token ids of at least 0, got -1"):
        manager.append_batch([1, 2], [[1], [-1]])


def test_an_absurd_count_is_told_the_limit(manager):
    with pytest.raises(InvalidOperation, match=f"sink_tokens: expected an int in 0 … {2**62}, got {2**63}"):
        manager.apply_streaming_llm(1, 2**63, 1)
    with pytest.raises(InvalidOperation, match="sink_tokens: expected an int of at least 0, got -1"):
        manager.apply_streaming_llm(1, -1, 1)


@pytest.mark.parametrize("ids", [[28, 17], (28, 17), np.array([28, 17], np.int32), torch.tensor([28, 17])], ids=repr)
def test_a_flat_batch_of_tokens_is_one_id_each(ids):
    """What a sampler returns, ``logits.argmax(-1)``, is token ids and never counts."""
    manager = BlockManager(20, 4)
    for seq_id in (1, 2):
        manager.allocate(seq_id, [1, 2, 3])
    plan = manager.append_batch([1, 2], ids)
    assert plan.num_query_tokens.tolist() == [1, 1]
    manager.commit(plan)
    assert manager.match_prefix([1, 2, 3, 28, 0]) == manager.match_prefix([1, 2, 3, 17, 0]) == 4
    assert manager.match_prefix([1, 2, 3, 18, 0]) == 3


@pytest.mark.parametrize("tokens", [1, 3, True, np.int64(2), torch.tensor(2), 1.5, "12", {0: 1}], ids=repr)
def test_a_number_is_no_token_ids(manager, tokens):
    before = manager.snapshot()
    with pytest.raises(InvalidOperation, match=r"tokens: expected token ids, .*counts=") as caught:
        manager.append_batch([1, 2], tokens)
    assert caught.value.argument == "tokens" and manager.snapshot() == before


def test_ids_and_counts_exclude_each_other(manager):
    with pytest.raises(InvalidOperation, match="counts: expected None where tokens are given, got 1"):
        manager.append_batch([1, 2], [5, 6], counts=1)


@pytest.mark.parametrize(
    "tokens", [[1], [1, 2, 3], np.ones((3, 1), int), [1.0, 2.0], [[1], 2], [1, [2]], torch.ones(2)]
)
def test_what_is_no_batch_of_ids_changes_nothing(manager, tokens):
    before = manager.snapshot()
    with pytest.raises(InvalidOperation, match="tokens"):
        manager.append_batch([1, 2], tokens)
    assert manager.snapshot() == before
