"""The live page in a real browser, where one is installed, against a real server with the real engine."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
import time

import httpx
import pytest
from tests.server.fake_snapshots import FakeEngine
from tests.server.local import make_engine, settle, thread

from pagedkv.engine.snapshot import take_snapshot
from pagedkv.tiers.rung import TierFigures

PATIENCE = 30.0
COUNTS = "return [...document.querySelectorAll('#legend b')].map((b) => Number(b.textContent.replaceAll(',', '')))"


@pytest.fixture(scope="module")
def served():
    with thread(make_engine(num_blocks=256, max_num_seqs=8)) as server:
        yield server
        settle(server.engine)


@pytest.fixture(autouse=True)
def leave(window):
    """Close the stream before a server goes: it would wait for its reader."""
    yield
    window.visit("about:blank")


def wait_for(window, script, wanted=bool):
    """Return what a script returns as soon as it is what is wanted."""
    deadline = time.monotonic() + PATIENCE
    while not wanted(value := window.run(script)):
        assert time.monotonic() < deadline, (script, value)
        time.sleep(0.05)
    return value


def open_page(window, url, width=1280, is_dark=False):
    window.show_as(width, is_dark=is_dark)
    window.visit(f"{url}/")
    wait_for(
        window, "return document.querySelectorAll('#legend b').length && document.getElementById('drawn').textContent"
    )


def write(url, words, tokens=120):
    body = {"prompt": words, "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def picture(window):
    """Return the map as it is drawn."""
    return window.run("return document.getElementById('map').toDataURL()")


def test_cells_change_while_requests_run(window, served):
    open_page(window, served.url)
    wait_for(window, COUNTS, lambda counts: sum(counts) == 256)
    before = picture(window)
    writers = [
        threading.Thread(target=write, args=(served.url, f"import os\n# {i}\ndef main():\n", 900)) for i in range(4)
    ]
    for writer in writers:
        writer.start()
    wait_for(window, COUNTS, lambda counts: counts[1] + counts[2] > 0)
    names = wait_for(
        window, "return [...document.querySelectorAll('#requests tbody th')].map((cell) => cell.textContent)"
    )
    during = picture(window)
    for writer in writers:
        writer.join()
    settle(served.engine)
    after = wait_for(window, COUNTS, lambda counts: counts[1] == 0 == counts[2])
    assert names and during != before
    assert after[3] == served.cache.cached_block_count > 0 and after[0] == 256 - after[3]
    assert wait_for(window, "return document.querySelector('[data-chart=tokens] output').textContent")
    assert window.console() == []
    assert {*map(own_part(served.url), window.requests())} <= {"/", "/page/…", "/v1/cache/stream"}


def own_part(url):
    def part(address):
        assert address.startswith((url, "data:", "about:")), f"asked somebody else: {address}"
        path = address.removeprefix(url)
        return "/page/…" if path.startswith("/page/") else path

    return part


def test_a_block_tells_its_owner_to_mouse_and_keyboard(window, served):
    open_page(window, served.url)
    writer = threading.Thread(target=write, args=(served.url, "class Stack:\n", 400))
    writer.start()
    words = wait_for(
        window,
        """
        const map = document.getElementById('map'), box = map.getBoundingClientRect();
        for (let i = 0; i < 60; i += 1) {
          const [x, y] = [box.left + 5 + 20 * (i % 50), box.top + 5 + 20 * Math.floor(i / 50)];
          const place = {clientX: x, clientY: y, bubbles: true};
          map.dispatchEvent(new PointerEvent('pointermove', place));
        }
        return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(
          () => resolve(document.getElementById('cell').textContent))));""",
    )
    assert words.startswith("Block ") and "undefined" not in words and "NaN" not in words
    words = wait_for(
        window,
        """
        const map = document.getElementById('map');
        map.focus();
        const press = (key) => map.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
        press('ArrowRight'); press('Home');
        return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(
          () => resolve(document.getElementById('cell').textContent))));""",
        lambda said: "held by" in said or ": cached" in said,
    )
    assert words.startswith("Block 0:") and "depth 0" in words
    assert re.search(r"last used \d+(\.\d)? s ago$", words), words
    writer.join()
    assert window.run("return document.activeElement.id") == "map"
    assert "active" in window.run("return document.getElementById('map').getAttribute('aria-label')")
    assert window.console() == []


@pytest.mark.parametrize(("width", "is_dark"), [(390, False), (390, True), (320, True), (1280, True)])
def test_it_fits_phones_and_the_night(window, served, width, is_dark):
    write(served.url, "import sys\n", 30)
    open_page(window, served.url, width, is_dark)
    assert window.run("return document.documentElement.scrollWidth") <= width
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) is is_dark
    assert window.run("return document.getElementById('map').clientWidth") <= width
    assert window.console() == []


# Cells of the requests that are not wholly seen: outside of their box, or wider than what they have.
HIDDEN_CELLS = """
const box = document.querySelector('#requests').parentElement.getBoundingClientRect();
return [...document.querySelectorAll('#requests tbody tr > *')].filter((cell) => {
  const own = cell.getBoundingClientRect();
  const isInside = own.width > 0 && own.left >= box.left - 1 && own.right <= box.right + 1;
  return !isInside || (cell.cellIndex && cell.scrollWidth > cell.clientWidth + 1);
}).map((cell) => cell.textContent)"""

# What stands beside each figure of the first request, and how large it is written.
LABELS = """
return [...document.querySelectorAll('#requests tbody tr:first-child td')].map((cell) => [
  getComputedStyle(cell, '::before').content.replaceAll('"', ''), parseFloat(getComputedStyle(cell).fontSize)])"""


@pytest.mark.parametrize("width", [320, 390, 430])
def test_a_phone_shows_every_figure_of_every_request_behind_its_label(window, served, monkeypatch, width):
    crowd = FakeEngine(5_000, at_once=12)
    for _ in range(60):
        crowd.step()
    for request in crowd.running:
        request.request_id = "cmpl-" + "0123456789abcdef" * 2
    busy = take_snapshot(crowd.cache, [*crowd.running, *crowd.waiting], crowd.stats())
    large = {"prompt_tokens": 1_048_576, "cached_tokens": 1_048_560, "output_tokens": 100_000, "age": 7_000.0}
    requests = (*(dataclasses.replace(each, **large) for each in busy.requests[:2]), *busy.requests[2:])
    busy = dataclasses.replace(busy, requests=requests)
    monkeypatch.setattr(served.engine, "snapshot", lambda: busy)
    time.sleep(0.3)  # until the last real snapshot is old
    open_page(window, served.url, width)
    rows = wait_for(window, "return document.querySelectorAll('#requests tbody tr').length", lambda rows: rows > 1)
    heads = window.run("return [...document.querySelectorAll('#requests thead th')].map((cell) => cell.textContent)")
    assert {"State", "Age"} <= set(heads) and rows >= 12
    labels = window.run(LABELS)
    assert [label for label, _ in labels] == heads[1:] and all(size >= 12 for _, size in labels)
    assert window.run(HIDDEN_CELLS) == []
    assert window.run("return document.documentElement.scrollWidth") <= width


def test_a_desk_shows_a_column_each(window, served):
    write(served.url, "import re\n", 20)
    open_page(window, served.url, 1280)
    displays = (
        "return [...document.querySelectorAll('#requests thead th')].map((cell) => getComputedStyle(cell).display)"
    )
    assert set(window.run(displays)) == {"table-cell"}
    assert window.run("return document.querySelector('#requests thead').getBoundingClientRect().width") > 300


def test_pause_holds_still_and_asks_for_nothing(window, served):
    open_page(window, served.url)
    window.run("document.getElementById('pause').click()")
    assert window.run("return document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    assert window.run("return document.getElementById('status').textContent") == "paused"
    before = picture(window)
    write(served.url, "def quiet():\n", 40)
    assert picture(window) == before
    window.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'p', bubbles: true}))")
    wait_for(window, "return document.getElementById('status').textContent", lambda words: words == "live")


def test_it_asks_for_a_key_and_forgets_it(window):
    with thread(make_engine(num_blocks=64), api_keys=("secret",)) as server:
        window.show_as(1280)
        window.visit(f"{server.url}/")
        wait_for(window, "return !document.getElementById('ask').hidden")
        submit = "document.getElementById('key').value = '%s'; document.querySelector('#ask button').click()"
        window.run(submit % "wrong")
        wait_for(window, "return document.getElementById('refusal').textContent")
        window.run(submit % "secret")
        wait_for(window, "return document.getElementById('status').textContent", lambda words: words == "live")
        assert window.run("return document.getElementById('ask').hidden")
        assert window.run("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert "secret" not in "".join(window.requests())
        # The browser itself notes refused requests; nothing else went wrong.
        assert all("401" in line for line in window.console())
        window.visit("about:blank")


def test_a_large_pool_is_drawn(window, served, monkeypatch):
    crowd = FakeEngine(100_000, at_once=64)
    for _ in range(40):
        crowd.step()
    big = take_snapshot(crowd.cache, [*crowd.running, *crowd.waiting], crowd.stats())
    monkeypatch.setattr(served.engine, "snapshot", lambda: big)
    time.sleep(0.3)  # until the last real snapshot is old
    open_page(window, served.url)
    counts = wait_for(window, COUNTS, lambda counts: sum(counts) == 100_000)
    assert dict(zip(big.counts(), counts, strict=True)) == big.counts()
    assert wait_for(window, "return Number(document.getElementById('drawn').dataset.milliseconds)") > 0
    assert window.run("return document.getElementById('map').clientHeight") <= 470
    assert window.console() == []


TIERS = """
return [...document.querySelectorAll('#tiers li')].map((band) => {
  const [name, bar, words] = band.children;
  return [name.textContent, bar.hidden ? null : bar.firstChild.clientWidth / bar.clientWidth, words.textContent];
})"""


@pytest.mark.parametrize(("width", "is_dark"), [(1280, False), (320, True)])
def test_tiers_are_bands_under_the_pool(window, served, monkeypatch, width, is_dark):
    engine, step = FakeEngine(64), itertools.count(1)

    def snapshot():
        now = next(step)
        disk = TierFigures(medium="DISK", blocks=25, total_blocks=100, hits=1, read_bytes=now << 20)
        engine.tier_figures = (disk, TierFigures(medium="<b>mine", hits=1200, corrupt=2, failed=1))
        return dataclasses.replace(engine.snapshot(), taken=1000.0 + now)

    monkeypatch.setattr(served.engine, "snapshot", snapshot)
    time.sleep(0.3)  # until the last real snapshot is old
    open_page(window, served.url, width, is_dark)
    disk, mine = wait_for(window, TIERS, lambda bands: len(bands) == 2 and "reads 1 MiB/s" in bands[0][2])
    assert disk == ["DISK", pytest.approx(0.25, abs=0.02), "25 of 100 blocks, reads 1 MiB/s, writes 0 B/s, 1 hit"]
    told = "blocks not told, reads 0 B/s, writes 0 B/s, 1,200 hits, 2 blocks corrupt, 1 call failed"
    assert mine == ["<b>mine", None, told]
    below = "return document.getElementById('tiers').getBoundingClientRect().top >= {}"
    assert window.run(below.format("document.getElementById('map').getBoundingClientRect().bottom"))
    assert window.run("return document.documentElement.scrollWidth") <= width
    monkeypatch.setattr(served.engine, "snapshot", FakeEngine(64).snapshot)
    assert wait_for(window, "return document.getElementById('tiers').hidden")
    assert window.console() == []


def test_hostile_names_are_only_text(window, served, monkeypatch):
    engine = FakeEngine(64)
    engine.step()
    for request in engine.running:
        request.request_id = f"<img src=x onerror=alert({request.num_prompt_tokens})>" + "x" * 300
    hostile = engine.snapshot()
    monkeypatch.setattr(served.engine, "snapshot", lambda: hostile)
    time.sleep(0.3)
    open_page(window, served.url, 390)
    wait_for(window, COUNTS, lambda counts: sum(counts) == 64)
    assert window.run("return document.querySelectorAll('#requests img').length") == 0
    assert "<img" in wait_for(window, "return document.querySelector('#requests tbody th').textContent")
    assert window.run("return document.documentElement.scrollWidth") <= 390
    assert window.console() == []
