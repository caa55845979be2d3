from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.engine.prompt_lookup import propose
from pagedkv.errors import InvalidOperation


def plain(ids: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """The longest match wins, then the last; beyond the text it goes on in what it says itself."""
    best, source = shortest - 1, None
    for length in range(shortest, longest + 1):
        starts = [s for s in range(len(ids) - length) if ids[s : s + length] == ids[len(ids) - length :]]
        if starts and length > best:
            best, source = length, starts[-1] + length
    if source is None:
        return []
    grown = list(ids)
    for place in range(count):
        grown.append(grown[source + place])
    return grown[len(ids) :]


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5))
def test_the_longest_then_latest_match_is_followed(ids, count, one, other):
    shortest, longest = sorted((one, other))
    drafts = propose(np.array(ids, np.int64), count, longest=longest, shortest=shortest)
    assert drafts.dtype == np.int64
    assert drafts.tolist() == (plain(ids, count, longest, shortest) if count else [])


def test_examples():
    assert propose(np.array([5, 6, 7, 8, 1, 5, 6]), 3).tolist() == [7, 8, 1]
    assert propose(np.array([1, 2, 9, 1, 2, 3, 1, 2]), 1).tolist() == [3]  # the last of two places
    assert propose(np.array([4, 1, 2, 9, 8, 1, 2, 7, 4, 1, 2]), 2).tolist() == [9, 8]  # a longer match counts more
    assert propose(np.array([3, 3, 3]), 4).tolist() == [3, 3, 3, 3]
    assert propose(np.array([1, 2, 3]), 4).tolist() == []
    assert propose(np.array([1]), 4).tolist() == []
    assert propose(np.array([], np.int64), 4).tolist() == []


def test_a_long_text_is_searched_to_its_beginning():
    ids = np.arange(500_000)
    ids[-2:] = ids[10:12]
    assert propose(ids, 4).tolist() == [12, 13, 14, 15]


def test_the_text_is_left_alone():
    ids = np.array([1, 2, 3, 1, 2])
    propose(ids, 3)
    assert ids.tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((np.array([1.0]), 1), "token_ids"),
        ((np.array([[1]]), 1), "token_ids"),
        ((np.array([1], np.int32), 1), "token_ids"),
        ((np.array([1]), -1), "count"),
    ],
)
def test_refusals(arguments, named):
    with pytest.raises(InvalidOperation, match=named):
        propose(*arguments)
    with pytest.raises(InvalidOperation, match="shortest"):
        propose(np.array([1]), 1, longest=2, shortest=3)
