"""A plan lives as long as its tokens have the slots that it names; write and commit refuse it from then on."""

from __future__ import annotations

import pytest
import torch

from pagedkv import InvalidOperation, PagedKvCache, SequenceNotFound


def ones(plan):
    return torch.ones(plan.total_tokens, 1, 2)


def made(counts=3):
    """A cache whose sequence 1 has 20 tokens (or 17 and `counts`), of which the last are planned and not written."""
    cache = PagedKvCache(32, 4, 1, 2, dtype="float32")
    cache.allocate(1, 17)
    cache.commit(1)
    return cache, cache.append_batch([1], counts=counts)


def begin_anew(cache):
    cache.free(1)
    cache.allocate(1, 20)


CHANGES = {
    "stream": lambda cache: cache.apply_streaming_llm(1, 4, 10),
    "begin_anew": begin_anew,
    "truncate_and_append": lambda cache: (cache.truncate(1, 18), cache.append(1, 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plan_of_a_sequence_that_changed_is_refused_by_write_and_commit(change):
    cache, plan = made()
    cache.write(0, ones(plan), ones(plan), plan)
    change(cache)
    committed, bytes_before = cache.get_sequence(1).num_committed_tokens, cache.storage.keys(0).numpy().tobytes()
    for call in (lambda: cache.write(0, ones(plan), ones(plan), plan), lambda: cache.commit(plan)):
        with pytest.raises(InvalidOperation, match="the plan is stale: S1"):
            call()
    assert cache.get_sequence(1).num_committed_tokens == committed
    assert cache.storage.keys(0).numpy().tobytes() == bytes_before
    cache.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: None,
        lambda cache: cache.touch(1),
        lambda cache: cache.set_priority(1, 3),
        lambda cache: cache.fork(1, 2),
        lambda cache: cache.append_batch([1], counts=9),
        lambda cache: (cache.allocate(3, 5), cache.append(3, 4), cache.free(3)),
    ],
)
def test_a_plan_survives_what_leaves_its_tokens_where_they_are(change):
    cache, plan = made()
    change(cache)
    cache.write(0, ones(plan), ones(plan), plan)
    cache.commit(plan)
    cache.commit(plan)
    assert cache.get_sequence(1).num_committed_tokens == 20


def test_tokens_that_were_taken_back_are_not_written_and_the_rest_is_committed():
    """As rejected drafts are: truncated before the plan is committed."""
    cache, plan = made()
    cache.truncate(1, 18)
    with pytest.raises(InvalidOperation, match="stale: S1"):
        cache.write(0, ones(plan), ones(plan), plan)
    cache.commit(plan)
    assert cache.get_sequence(1).num_committed_tokens == 18


def test_blocks_that_a_commit_gave_back_are_not_written():
    """Two equal prompts: the second goes over to the blocks of the first, so its plan names blocks that are free."""
    cache = PagedKvCache(32, 4, 1, 2, dtype="float32")
    plans = []
    for seq_id in (1, 2):
        cache.allocate(seq_id, list(range(8)))
        plans.append(cache.plan([seq_id]))
        cache.write(0, ones(plans[-1]), ones(plans[-1]), plans[-1])
    for plan in plans:
        cache.commit(plan)
    cache.write(0, ones(plans[0]), ones(plans[0]), plans[0])
    with pytest.raises(InvalidOperation, match="stale: S2"):
        cache.write(0, ones(plans[1]), ones(plans[1]), plans[1])


def test_a_tail_that_was_copied_for_a_fork_is_not_written():
    """The old one is the fork's by now; what was written to it before went into the copy, and can be committed."""
    cache, plan = made(2)
    cache.write(0, ones(plan), ones(plan), plan)
    cache.fork(1, 2)
    cache.append(1, 1)
    with pytest.raises(InvalidOperation, match="stale: S1"):
        cache.write(0, ones(plan), ones(plan), plan)
    cache.commit(plan)
    keys, _ = cache.storage.gather(0, cache.plan([1], 3).slot_mapping)
    assert cache.get_sequence(1).num_committed_tokens == 19 and torch.equal(keys[:2], ones(plan))


def test_a_plan_of_a_sequence_that_ended_is_refused():
    cache, plan = made()
    cache.free(1)
    for call in (lambda: cache.write(0, ones(plan), ones(plan), plan), lambda: cache.commit(plan)):
        with pytest.raises(SequenceNotFound, match="S1"):
            call()


@pytest.mark.parametrize("left", [0, 1, 2, 4])
def test_a_sequence_that_streamed_and_went_back_below_its_sinks_is_attended(left):
    cache = PagedKvCache(32, 4, 1, 2, dtype="float32")
    cache.allocate(1, 20)
    plan = cache.plan([1])
    cache.write(0, ones(plan), ones(plan), plan)
    cache.commit(plan)
    cache.apply_streaming_llm(1, 4, 10)
    cache.truncate(1, left)
    plan = cache.append_batch([1], counts=2)
    assert plan.seq_lens.tolist() == [left + 2] and plan.holes[0, 0] == plan.holes[0, 1]
    cache.write(0, ones(plan), ones(plan), plan)
    assert torch.equal(cache.attend(0, ones(plan), plan), ones(plan))
    cache.check()


def test_a_plan_of_a_streamed_sequence_is_refused_once_tokens_were_taken_back_and_others_came():
    cache, _ = made()
    cache.apply_streaming_llm(1, 4, 10)  # its plans are later than the clock
    plan = cache.plan([1], 2)
    cache.truncate(1, 12)
    cache.append(1, 2)
    for refused in (lambda: cache.write(0, ones(plan), ones(plan), plan), lambda: cache.commit(plan)):
        with pytest.raises(InvalidOperation, match="the plan is stale: S1"):
            refused()


def test_another_sequence_that_streamed_makes_no_stale_plan_valid():
    cache, _ = made()
    cache.allocate(2, 20)
    for window in (15, 12, 9, 6):
        cache.apply_streaming_llm(2, 4, window)
    plan = cache.plan([1, 2], 2)
    cache.truncate(1, 18)
    cache.append(1, 2)
    with pytest.raises(InvalidOperation, match="the plan is stale: S1"):
        cache.commit(plan)


def test_a_fork_of_a_sequence_that_went_back_and_streamed_has_plans_of_its_own():
    cache, _ = made()
    cache.truncate(1, 18)
    cache.apply_streaming_llm(1, 4, 10)
    cache.fork(1, 2)
    cache.fork(1, 3)
    plan = cache.plan([2], 0)
    cache.append(2, 1)
    cache.commit(plan)
