from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pagedkv.engine.text import StopStrings

texts = st.text(alphabet="ab c", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab c", min_size=1, max_size=6), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first stop string ends, and which it is; by looking at every end."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return end, max(here, key=len)
    return None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(texts, stop_lists, st.lists(st.integers(0, 40), max_size=10), st.booleans())
@example("aab", ["ab", "aab"], [1, 2], False)
@example("ababac", ["abac", "bab"], [3], True)
def test_streamed_pieces_are_the_text_up_to_the_first_stop(text, stops, cuts, include):
    found = first_stop(text, stops)
    if found is None:
        expected = text
    else:
        expected = text[: found[0] if include else found[0] - len(found[1])]
    stopper, shown = StopStrings(stops, include=include), ""
    for piece in pieces_of(text, cuts):
        shown += stopper.push(piece)
        assert expected.startswith(shown)
        if stopper.matched is not None:
            break
    assert shown + stopper.flush() == expected
    assert stopper.matched == (found[1] if found else None)


@given(texts, stop_lists)
def test_what_is_held_back_is_exactly_what_may_begin_a_stop(text, stops):
    stopper, shown = StopStrings(stops), ""
    for place, character in enumerate(text):
        shown += stopper.push(character)
        if stopper.matched is not None:
            return
        seen = text[: place + 1]
        held = max(n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n]))
        assert shown == seen[: len(seen) - held]


def test_a_stop_across_pieces():
    stopper = StopStrings(["</s>"])
    assert [stopper.push(piece) for piece in ("hello<", "/", "b></", "s> gone")] == ["hello", "", "</b>", ""]
    assert stopper.matched == "</s>"
    assert stopper.push("more") == "" and stopper.flush() == ""


def test_unsearched_pieces_pass_and_do_not_begin_a_stop():
    stopper = StopStrings(["abc"])
    assert stopper.push("xa") == "x"
    assert stopper.push("b", search=False) == "ab"
    assert stopper.push("c") == "c" and stopper.matched is None
    assert stopper.push("abc") == "" and stopper.matched == "abc"


@pytest.mark.parametrize("stop", ["a" * 50_000, "a" * 49_999 + "b"])
def test_long_stop_strings_cost_no_more_than_the_text(stop):
    """Quadratic work would take minutes here; the suite's time limit is the judge."""
    stopper, shown = StopStrings([stop]), ""
    for _ in range(49_999):
        shown += stopper.push("a")
    assert (shown, stopper.push("c")) == ("", "a" * 49_999 + "c")
