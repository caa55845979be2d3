"""The report in a real browser, where one is installed: no errors, no requests, no sideways scrolling on a phone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.sim.test_report import NASTY, some_results, some_trace

from pagedkv.sim.curves import lru_curve
from pagedkv.sim.report import replay_report


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with everything that can be too wide: long names, many sizes, a hostile trace."""
    trace = some_trace(name=NASTY + "a-long-name" * 20)
    results = [replace(r, blocks=r.blocks * 10**i) for r in some_results(trace) for i in range(8)]
    results += [replace(r, strategy="my_module.eviction:AStrategyWithALongName") for r in results[:4]]
    path = tmp_path_factory.mktemp("report") / "report.html"
    command = "pagedkv replay " + "x" * 300
    path.write_text(replay_report(trace, results, lru_curve(trace), command=command, chosen_blocks=8), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "is_dark"), [(390, False), (390, True), (1280, False), (1280, True), (320, False)])
def test_the_report_is_quiet_and_fits(window, report, width, is_dark):
    window.show_as(width, is_dark=is_dark)
    window.open(report)
    assert window.console() == []
    assert [address for address in window.requests() if not address.startswith("data:")] == [report.as_uri()]
    assert window.run("return document.documentElement.scrollWidth") <= width
    shown = "return [...document.querySelectorAll('figure svg.chart')].filter(c => c.getBoundingClientRect().width)"
    kinds = window.run(shown + ".map(c => c.getAttribute('class'))")
    assert set(kinds) == {"chart narrow" if width <= 640 else "chart wide"} and len(kinds) == 5
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) is is_dark
    outside = """
        return [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
          const frame = chart.getBoundingClientRect();
          return [...chart.querySelectorAll('text')].filter((text) => {
            const box = text.getBoundingClientRect();
            return frame.width && (box.left < frame.left - 1 || box.right > frame.right + 1);
          }).map((text) => text.textContent);
        });"""
    assert window.run(outside) == []


def test_points_speak_and_tables_sort(window, report):
    window.show_as(1280)
    window.open(report)
    point = window.run(
        """
        const dot = document.querySelector('#curve svg.wide .dot');
        dot.scrollIntoView({block: 'center'});
        const box = dot.getBoundingClientRect();
        const words = dot.querySelector('title').textContent;
        const place = {clientX: box.left + 3, clientY: box.top + 3, bubbles: true};
        dot.dispatchEvent(new PointerEvent('pointermove', place));
        const tip = document.getElementById('tip');
        return [words, tip.textContent, getComputedStyle(tip).visibility];"""
    )
    assert point[0] and point[1:] == [point[0], "visible"]
    order = window.run(
        """
        const head = document.querySelectorAll('.matrix thead th')[1];
        head.querySelector('button').click();
        const values = () => [...document.querySelectorAll('.matrix tbody tr')].map(r => +r.cells[1].dataset.value);
        const falling = values();
        const first = head.getAttribute('aria-sort');
        head.querySelector('button').click();
        return [falling, first, values(), head.getAttribute('aria-sort')];"""
    )
    assert order[0] == sorted(order[0], reverse=True) and order[1] == "descending"
    assert order[2] == sorted(order[2]) and order[3] == "ascending"
    assert window.console() == []


def test_a_script_in_the_page_could_not_run(window, report, tmp_path):
    """The security policy holds even where escaping would fail."""
    broken = tmp_path / "broken.html"
    injected = "<script>document.title = 'taken'</script><img src='https://example.invalid/x.png'></main>"
    broken.write_text(report.read_text(encoding="utf-8").replace("</main>", injected), encoding="utf-8")
    window.show_as(1280)
    window.open(broken)
    assert window.run("return document.title") != "taken"
    assert len([line for line in window.console() if "Content Security Policy" in line]) == 2
