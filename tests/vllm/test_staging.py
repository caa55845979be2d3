"""Memory that two processes share, and its runs of rows."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import TierError
from pagedkv.vllm.staging import Runs, Staging


def test_two_who_open_it_see_the_same_rows(tmp_path):
    one = Staging.create(1000, 92, tmp_path)
    assert one.rows.shape == (10, 92) and stat.S_IMODE(os.stat(one.path).st_mode) == 0o600
    other = Staging(one.path, 10, 92)
    one.rows[3] = 7
    one.tickets[3] = 5
    assert (other.rows[3] == 7).all() and other.tickets[3] == 5 and not other.rows[4].any()
    one.unlink()
    assert os.listdir(tmp_path) == []
    other.rows[4] = 9
    assert (one.rows[4] == 9).all()


def test_memory_that_cannot_be_had_is_an_error_at_the_start(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(TierError, match="No space left on device; give less as `staging`"):
        Staging.create(1000, 92, tmp_path)
    assert os.listdir(tmp_path) == []


def test_one_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(TierError, match="cannot be opened"):
        Staging(str(tmp_path / "none"), 10, 92)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=60))
def test_runs_never_overlap_and_come_back(steps):
    runs, taken = Runs(5, 25), []
    for count, gives in steps:
        if gives and taken:
            runs.give_back(*taken.pop(count % len(taken)))
            continue
        free = sorted(set(range(5, 25)) - {row for first, length in taken for row in range(first, first + length)})
        first, length = runs.take(count)
        assert length <= count and set(range(first, first + length)) <= set(free)
        longest = best = 0
        for row in range(5, 25):
            longest = longest + 1 if row in free else 0
            best = max(best, longest)
        assert length == min(count, best)
        if length:
            taken.append((first, length))
    for each in taken:
        runs.give_back(*each)
    assert runs.num_free == 20
