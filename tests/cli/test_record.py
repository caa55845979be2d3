"""The script that records the terminal: what it draws is what the terminal showed, when it did."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from scripts.record import FRAME, LAST, PAUSE, Scene, draw, frames

SVG = "{http://www.w3.org/2000/svg}"
SCENE = Scene("a <title>", 20, 3, ())


def test_rows_are_seen_when_they_were_on_the_screen():
    events = [(10.0, b"$ run"), (10.5, b"\r\n\x1b[32mone\x1b[0m \x1b[2mdim\x1b[0m"), (11.0, b"\r\x1b[2Ktwo & more")]
    found = frames(SCENE, events)
    assert [when for when, _ in found] == [0.0, 0.5, 1.0]
    assert [[run[1] for run in row] for row in found[1][1]] == [["$ run"], ["one", "dim"], []]
    picture = ElementTree.fromstring(draw(SCENE, found))
    total = 1.0 + LAST
    groups = {"".join(group.itertext()): group for group in picture.iter(f"{SVG}g")}
    assert set(groups) == {"onedim", "two & more"}  # what is always there needs no group
    assert groups["onedim"].get("visibility") == "hidden" and groups["two & more"].get("visibility") == "visible"
    animate = groups["onedim"].find(f"{SVG}animate")
    assert animate.get("values") == "hidden;visible;hidden"
    times = [float(part) * total for part in animate.get("keyTimes").split(";")]
    assert times == pytest.approx([0.0, 0.5, 1.0], abs=1e-3)


def test_long_pauses_are_cut_and_what_comes_at_once_is_one_screen():
    events = [(0.0, b"a"), (60.0, b"b"), (60.0 + FRAME / 10, b"c"), (60.0 + FRAME / 5, b"d")]
    found = frames(SCENE, events)
    assert [row[0][0][1] for _, row in found] == ["a", "ab", "abcd"]
    assert found[1][0] == PAUSE and found[2][0] < PAUSE + FRAME
