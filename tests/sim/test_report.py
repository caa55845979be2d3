"""The report: well-formed, harmless, and its figures are those that went in."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.traces import as_requests, as_trace, chained_requests

from pagedkv.sim.curves import lru_curve
from pagedkv.sim.model_shape import read_model
from pagedkv.sim.optimum import optimal
from pagedkv.sim.planner import plan
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.report import facts, plan_report, replay_report
from pagedkv.sim.report.charts import byte_ticks
from pagedkv.sim.report.evidence import Evidence
from pagedkv.sim.report.html import Markup, tag, text
from pagedkv.sim.trace import Trace

NASTY = "<script>alert(1)</script>&amp;\"'\x00\ud800 ]]> </title><img src=x onerror=alert(2)>"
SVG = "{http://www.w3.org/2000/svg}"


def some_trace(**changes: object) -> Trace:
    requests = [[0, 1, 2], [0, 1, 3, 4], [5, 6], [0, 1, 2, 7], [5, 6, 8], [0, 1, 3, 4, 9]]
    times = np.array([0.0, 3.0, 3.0, 65.0, 700.0, 4000.0])
    sessions = np.array([0, 0, 1, 0, 1, 0])
    return replace(as_trace(requests, block_tokens=16), times=times, sessions=sessions, **changes)


def result_of(trace: Trace, strategy: str, blocks: int, hits: list[int]) -> ReplayResult:
    found = np.array(hits, np.int32)
    return ReplayResult(
        strategy=strategy,
        blocks=blocks,
        requests=trace.num_requests,
        accesses=trace.num_accesses,
        hit_blocks=int(found.sum()),
        tokens=trace.num_tokens,
        hit_tokens=trace.hit_tokens(found),
        reclaimed=3,
        seconds=0.25,
        hits=found,
    )


def some_results(trace: Trace) -> list[ReplayResult]:
    found = {
        ("lru", 4): [0, 2, 0, 1, 0, 2],
        ("lru", 8): [0, 2, 0, 3, 2, 2],
        ("fifo", 4): [0, 2, 0, 0, 0, 1],
        ("fifo", 8): [0, 2, 0, 3, 2, 4],
    }
    return [result_of(trace, name, blocks, hits) for (name, blocks), hits in found.items()]


def parsed(document: str) -> ET.Element:
    """The document as XML: stricter than any browser about tags, quotes and entities."""
    head, body = document.split("\n", 1)
    assert head == "<!DOCTYPE html>"
    return ET.fromstring(body)


def words(element: ET.Element | None) -> str:
    assert element is not None
    return "".join(element.itertext())


def table_rows(page: ET.Element, caption: str) -> list[list[ET.Element]]:
    table = next(t for t in page.iter("table") if t.findtext("caption") == caption)
    return [list(row) for row in table.iterfind("tbody/tr")]


def whole_report() -> str:
    trace = some_trace()
    best = [replace(optimal(trace, blocks), seconds=0.5) for blocks in (4, 8)]
    return replay_report(
        trace, some_results(trace), lru_curve(trace), best, chosen_blocks=8, command="pagedkv replay x"
    )


@pytest.fixture
def full_report() -> str:
    return whole_report()


def test_every_section_is_there(full_report):
    page = parsed(full_report)
    keys = [section.get("id") for section in page.iter("section")]
    assert keys == ["curve", "results", "time", "depth", "sessions", "gaps", "trace", "method"]
    assert page.findtext("head/title").startswith("test: ")
    assert "pagedkv replay x" in words(page.find(".//pre"))


def test_ids_are_unique_and_labels_point_to_them(full_report):
    page = parsed(full_report)
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    labels = [name for element in page.iter() for name in (element.get("aria-labelledby") or "").split()]
    assert labels and set(labels) <= set(ids)


def test_every_chart_has_two_sizes_and_tells_what_it_shows(full_report):
    page = parsed(full_report)
    for figure in page.iter("figure"):
        wide, narrow = figure.findall(f"{SVG}svg")
        assert (wide.get("class"), narrow.get("class")) == ("chart wide", "chart narrow")
        for chart in (wide, narrow):
            assert chart.get("role") == "img"
            assert words(chart.find(f"{SVG}title")) and words(chart.find(f"{SVG}desc"))
            left, top, width, height = map(float, chart.get("viewBox").split())
            for shape in chart.iter():
                for name, limit in (("x", width), ("x1", width), ("cx", width), ("y", height), ("cy", height)):
                    assert 0 <= float(shape.get(name, 0)) <= limit


def test_what_rows_are_sorted_by_is_a_number(full_report):
    values = [cell.get("data-value") for cell in parsed(full_report).iter() if "data-value" in cell.attrib]
    assert len(values) > 50 and all(np.isfinite(float(value)) for value in values)


def test_the_tables_hold_the_results_to_the_last_digit():
    trace = some_trace()
    results = some_results(trace)
    page = parsed(replay_report(trace, results))
    cells = {(result.strategy, result.blocks): result for result in results}

    rows = table_rows(page, "Hit ratio by strategy and size")
    assert sorted(words(row[0]) for row in rows) == ["fifo", "lru"]
    for row in rows:
        values = [float(cell.get("data-value")) for cell in row[1:]]
        assert values == [cells[words(row[0]), blocks].hit_ratio for blocks in (4, 8)]

    for name, blocks, hits, accesses, ratio, by_tokens, reclaimed, _ in table_rows(page, "Every replay in full"):
        result = cells.pop((words(name), int(words(blocks))))
        assert (int(words(hits)), int(words(accesses))) == (result.hit_blocks, result.accesses)
        assert (words(ratio), words(by_tokens)) == (f"{result.hit_ratio:.6f}", f"{result.token_hit_ratio:.6f}")
        assert int(words(reclaimed)) == result.reclaimed
    assert not cells


def test_a_timed_replay_tells_who_had_to_wait():
    trace = some_trace()
    results = [replace(some_results(trace)[0], preempted=7, refused=1), some_results(trace)[2]]
    rows = table_rows(parsed(replay_report(trace, results)), "Every replay in full")
    assert [[words(cell) for cell in row[8:]] for row in rows] == [["7", "1"], ["0", "0"]]


def test_the_best_strategy_of_each_size_is_marked():
    trace = some_trace()
    rows = table_rows(parsed(replay_report(trace, some_results(trace))), "Hit ratio by strategy and size")
    marked = {words(row[0]): [cell.find("span/b[@class='best']") is not None for cell in row[1:]] for row in rows}
    assert marked == {"lru": [True, False], "fifo": [False, True]}


def test_the_detailed_figures_add_up_to_the_replay(full_report):
    page = parsed(full_report)
    fifo = some_results(some_trace())[3]  # the best at the chosen size
    rows = table_rows(page, "The figures by depth")
    touched = sum(int(row[1].get("data-value")) for row in rows)
    found = sum(int(row[1].get("data-value")) * float(row[2].get("data-value")) for row in rows)
    assert (touched, round(found, 6)) == (fifo.accesses, fifo.hit_blocks)
    rows = table_rows(page, "The figures over time")
    found = sum(int(row[2].get("data-value")) * max(float(row[3].get("data-value")), 0) for row in rows)
    assert round(found, 6) == fifo.hit_blocks
    sessions = [int(row[1].get("data-value")) for row in table_rows(page, "The figures per session")]
    assert sum(sessions) == 2
    reuses = [int(row[1].get("data-value")) for row in table_rows(page, "The figures of reuse gaps")]
    assert sum(reuses) == some_trace().num_accesses - some_trace().num_distinct


def test_the_curve_is_drawn_where_its_figures_are(full_report):
    trace = some_trace()
    curve = lru_curve(trace)
    for row in table_rows(parsed(full_report), "The figures of LRU’s curve"):
        blocks, ratio = int(row[0].get("data-value")), float(row[1].get("data-value"))
        assert ratio == curve.at(blocks)


def test_sizes_are_told_in_gib_where_the_model_is_known():
    trace = some_trace()
    page = parsed(replay_report(trace, some_results(trace), lru_curve(trace), bytes_per_token=2**26))
    heads = [words(head) for head in page.iterfind(".//table[@class='matrix']/thead/tr/th")]
    assert heads == ["strategy", "4\u00a0GiB4 blocks", "8\u00a0GiB8 blocks"]


@pytest.mark.parametrize(
    ("bytes_per_token", "units"), [(2**10, {"KiB"}), (2**26, {"GiB"}), (2**36, {"TiB"}), (2**35, {"GiB", "TiB"})]
)
def test_the_sizes_on_an_axis_have_the_unit_in_which_they_are_round(bytes_per_token, units):
    trace = some_trace()
    page = parsed(replay_report(trace, some_results(trace), lru_curve(trace), bytes_per_token=bytes_per_token))
    drawing = next(element for element in page.iter() if element.tag.endswith("}svg"))
    ticks = [element for element in drawing.iter() if element.get("class") == "tick"]
    labels = [words(tick).split("\u00a0") for tick in ticks if tick.get("text-anchor") == "middle"]
    assert len(labels) >= 2 and {unit for _, unit in labels} == units
    assert all(float(number) < 1024 and (2 * float(number)).is_integer() for number, _ in labels)


@given(st.floats(1, 2**60), st.floats(1, 2**20), st.integers(4, 12))
def test_ticks_of_bytes_lie_on_the_axis_and_are_few(low, factor, most):
    ticks = byte_ticks(low, low * factor, most)
    assert len(ticks) <= most and ticks == sorted(set(ticks))
    assert all(low * 0.998 <= tick <= low * factor * 1.002 for tick in ticks)
    assert len(ticks) >= 2 or factor < 4


def test_text_of_the_user_is_shown_and_harmless():
    trace = some_trace(name=NASTY, format=NASTY)
    results = [replace(result, strategy=NASTY) for result in some_results(trace)[:1]]
    document = replay_report(trace, results, lru_curve(trace), command=NASTY)
    page = parsed(document)
    assert len(list(page.iter("script"))) == len(list(page.iter("style"))) == 1
    assert not list(page.iter("img"))
    assert not [element for element in page.iter() if any(name.startswith("on") for name in element.keys())]
    assert words(page.find(".//header//bdi")) == NASTY.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    document.encode("utf-8")


def test_nothing_is_fetched(full_report):
    page = parsed(full_report)
    links = [element for element in page.iter() if element.get("src") or element.get("href")]
    assert [link.get("href") for link in links] == ["data:,"]
    style = words(page.find("head/style"))
    assert "url(" not in style and "@import" not in style
    policy = page.find("head/meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy.startswith("default-src 'none'")


def test_the_same_input_gives_the_same_document(full_report):
    assert whole_report() == full_report


def of(trace: Trace, *hits: int, strategy: str = "lru", blocks: int = 4) -> tuple[Trace, list[ReplayResult]]:
    return trace, [result_of(trace, strategy, blocks, list(hits))]


def usual(**changes: object) -> tuple[Trace, list[ReplayResult]]:
    trace = replace(some_trace(), **changes)
    return trace, some_results(trace)


def without_hits_by_request() -> tuple[Trace, list[ReplayResult]]:
    trace, results = usual()
    return trace, [replace(result, hits=np.zeros(0, np.int32)) for result in results]


DEGENERATE = {
    "no results": lambda: (some_trace(), []),
    "one point": lambda: of(some_trace(), 0, 2, 0, 1, 0, 2),
    "no hits known by request": without_hits_by_request,
    "all hits zero": lambda: of(some_trace(), 0, 0, 0, 0, 0, 0, blocks=1),
    "no sessions": lambda: usual(sessions=np.full(6, -1)),
    "one request": lambda: of(as_trace([[0, 1, 2]]), 0),
    "no request": lambda: of(as_trace([])),
    "nothing twice": lambda: of(as_trace([[0], [1], [2, 3]]), 0, 0, 0),
    "empty requests": lambda: of(as_trace([[], [0], []]), 0, 0, 0),
    "lengths only": lambda: (replace(as_trace([[], []], input_tokens=[5, 6]), has_content=False), []),
    "only the optimum": lambda: (some_trace(), [optimal(some_trace(), 4)]),
    "all at once": lambda: usual(times=np.zeros(6)),
    "for years": lambda: usual(times=some_trace().times * 1e6),
    "eleven strategies": lambda: (
        some_trace(),
        [result_of(some_trace(), f"s{i}", 4, [0, 2, 0, 1, 0, i % 3]) for i in range(11)],
    ),
    "huge": lambda: of(some_trace(), 0, 2, 0, 3, 2, 4, blocks=2**31 - 2),
}


@pytest.mark.parametrize("bytes_per_token", [None, 131072])
@pytest.mark.parametrize("has_curve", [False, True])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_gives_a_report(case, has_curve, bytes_per_token):
    trace, results = DEGENERATE[case]()
    curve = lru_curve(trace) if has_curve and trace.has_content else None
    page = parsed(replay_report(trace, results, curve, bytes_per_token=bytes_per_token))
    assert words(page.find("body/header/h1"))
    attributes = " ".join(value for element in page.iter() for value in element.attrib.values())
    assert not re.search(r"\b(nan|inf)\b", attributes + words(page.find("body/main")))


def test_the_verdict_names_what_limits():
    def verdict(*results: ReplayResult) -> str:
        return words(parsed(replay_report(trace, list(results))).find("body/header/h1"))

    trace = some_trace()
    assert verdict(result_of(trace, "lru", 8, [0, 2, 0, 3, 2, 4])).startswith("Large enough: lru in 8 blocks")
    assert verdict(result_of(trace, "lru", 4, [0, 2, 0, 0, 0, 0])).startswith("Limited by capacity")
    limits = (result_of(trace, "lru", 4, [0, 2, 0, 0, 0, 0]), result_of(trace, "optimal", 4, [0, 2, 0, 3, 2, 3]))
    assert verdict(*limits).startswith("Limited by the strategy")


def test_a_plan_is_reported_with_its_own_figures():
    trace = some_trace()
    made = plan(trace, read_model("llama-3.1-8b"), target=0.9, strategies=["lru", "fifo"], jobs=1)
    page = parsed(plan_report(made, trace, command="pagedkv plan x"))
    keys = [section.get("id") for section in page.iter("section")]
    assert keys == ["curve", "levels", "time", "depth", "sessions", "gaps", "load", "trace", "method"]
    assert words(page.find("body/header/h1")).startswith("90% of what can be found needs ")
    assert words(page.find("body/header/p[@class='verdict']")) == made.verdict.text
    rows = table_rows(page, "Memory by share of the attainable hit ratio")
    assert [float(row[0].get("data-value")) for row in rows] == [level.share for level in made.levels]
    for row, level in zip(rows, made.levels, strict=True):
        sizes = [int(cell.get("data-value")) for cell in row[2:5]]
        assert sizes == [level.lru.bytes, level.best.bytes, level.optimum.bytes]


def test_a_plan_says_what_given_memory_gives():
    trace = some_trace()
    made = plan(trace, read_model("llama-3.1-8b"), memory=2**23, strategies=["lru", "fifo"], jobs=1)
    page = parsed(plan_report(made, trace))
    assert made.memory is not None
    rows = table_rows(page, "The given memory")
    ratios = {words(row[0]): float(row[1].get("data-value")) for row in rows}
    expected = {size.strategy: size.hit_ratio for size in made.memory.all}
    assert ratios == expected | {"the optimum": made.memory.optimum.hit_ratio}


def test_a_plan_without_reuse_is_reported():
    trace = as_trace([[0], [1], [2, 3]])
    page = parsed(plan_report(plan(trace, read_model("llama-3.1-8b"), jobs=1), trace))
    assert words(page.find("body/header/h1")).startswith("Nothing to reuse")


def test_markup_escapes_all_but_markup():
    assert tag("p", "<&>", Markup("<b/>"), None) == "<p>&lt;&amp;&gt;<b/></p>"
    assert tag("br") == "<br/>"
    assert tag("a", class_="x y", data_value=1.5, hidden=True, lang=None) == (
        '<a class="x y" data-value="1.5" hidden="hidden"></a>'
    )
    assert tag("i", title='"><script>') == '<i title="&quot;&gt;&lt;script&gt;"></i>'
    assert text("\x0b") == "\ufffd"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(scheme):
    style = files("pagedkv.sim.report").joinpath("style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
    # WCAG 2.2: 4.5 for text, 3 for what a chart is made of.
    for name, least in {**dict.fromkeys(("ink", "soft", "c1", "c2", "c3", "c4"), 4.5), "quiet": 3, "bar": 3}.items():
        for ground in ("card", "page") if name in ("ink", "soft") else ("card",):
            light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


def test_colours_go_to_what_differs_from_lru():
    trace = some_trace()
    lru = some_results(trace)[:2]
    twin = [replace(result, strategy="twin") for result in lru]
    others = [replace(result, strategy=f"s{i}", hit_blocks=i) for i in range(4) for result in lru]
    evidence = Evidence(trace, [*twin, *lru, *others])
    assert evidence.looks == {
        "lru": "c1", "optimal": "ink", "twin": "quiet", "s3": "c2", "s2": "c3", "s1": "c4", "s0": "quiet"
    }  # fmt: skip
    assert evidence.best is not None and evidence.best.strategy == "lru"


# --- The arrays behind the charts, against loops that are obviously right ---


@st.composite
def traces_with_hits(draw: st.DrawFn) -> tuple[Trace, np.ndarray]:
    trace = as_trace(draw(chained_requests()))
    count = trace.num_requests
    gaps = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5, 400.0]), min_size=count, max_size=count))
    sessions = draw(st.lists(st.integers(-1, 4), min_size=count, max_size=count))
    lengths = np.diff(trace.offsets)
    hits = [draw(st.integers(0, int(length))) for length in lengths]
    times = np.cumsum([0.0, *gaps[1:]])[:count]
    return replace(trace, times=times, sessions=np.array(sessions, np.int64)), np.array(hits, np.int32)


@given(traces_with_hits(), st.sampled_from([None, 0.5, 3.0, 1000.0]))
@settings(max_examples=60, deadline=None)
def test_windows_count_what_falls_into_them(case, seconds):
    trace, hits = case
    windows = facts.per_window(trace, hits, seconds)
    requests, accesses, found = Counter(), Counter(), Counter()
    for i, ids in enumerate(as_requests(trace)):
        window = int(trace.times[i] // windows.seconds)
        requests[window] += 1
        accesses[window] += len(ids)
        found[window] += int(hits[i])
    places = range(len(windows.accesses))
    assert windows.requests.tolist() == [requests[place] for place in places]
    assert windows.accesses.tolist() == [accesses[place] for place in places]
    assert windows.hit_blocks.tolist() == [found[place] for place in places]
    assert sum(requests.values()) == windows.requests.sum() == trace.num_requests
    if seconds is None:
        assert len(windows.accesses) <= 60


@pytest.mark.parametrize(("span", "width"), [(0, 1), (59.9, 1), (60, 2), (3600, 120), (86400 * 365, 86400 * 7)])
def test_windows_have_round_widths(span, width):
    assert facts.window_seconds(span) == width
    assert span / width < 60


@given(traces_with_hits())
@settings(max_examples=60, deadline=None)
def test_depths_count_every_block_of_every_request(case):
    trace, hits = case
    touched, found = Counter(), Counter()
    for ids, hit in zip(as_requests(trace), hits.tolist(), strict=True):
        touched.update(range(len(ids)))
        found.update(range(hit))
    depths = facts.per_depth(trace, hits)
    assert depths.accesses.tolist() == [touched[depth] for depth in range(len(touched))]
    assert depths.hit_blocks.tolist() == [found[depth] for depth in range(len(touched))]


@given(traces_with_hits())
@settings(max_examples=60, deadline=None)
def test_sessions_and_requests_add_up(case):
    trace, hits = case
    touched, found = Counter(), Counter()
    for session, ids, hit in zip(trace.sessions.tolist(), as_requests(trace), hits.tolist(), strict=True):
        touched[session] += len(ids)
        found[session] += hit
    named = sorted(session for session in touched if session >= 0 and touched[session])
    shares = facts.per_session(trace, hits)
    assert shares.accesses.tolist() == [touched[session] for session in named]
    assert shares.hit_blocks.tolist() == [found[session] for session in named]
    assert shares.ratios.tolist() == [found[session] / touched[session] for session in named]

    single = facts.per_request(trace, hits)
    lengths = [len(ids) for ids in as_requests(trace)]
    assert single.accesses.tolist() == [length for length in lengths if length]
    assert single.hit_blocks.tolist() == [h for h, length in zip(hits.tolist(), lengths, strict=True) if length]


@given(traces_with_hits(), st.sampled_from([1, 3, 1000]))
@settings(max_examples=60, deadline=None)
def test_gaps_are_the_times_between_uses_of_a_block(case, chunk):
    trace, _ = case
    edges = np.array([0.1, 0.5, 1.0, 8.0, 100.0])
    expected, last = [0] * 4, {}
    for time, ids in zip(trace.times.tolist(), as_requests(trace), strict=True):
        for block in ids:
            if block in last:
                gap = time - last[block]
                inside = [b for b in range(4) if edges[b] <= gap < edges[b + 1]]
                expected[inside[0] if inside else 0 if gap < edges[0] else 3] += 1
            last[block] = time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "_CHUNK", chunk)
        gaps = facts.reuse_gaps(trace, edges)
    assert gaps.counts.tolist() == expected
    assert gaps.total == trace.num_accesses - trace.num_distinct


def test_a_quantile_is_the_end_of_the_bin_that_reaches_it():
    gaps = facts.Gaps(np.array([1.0, 2.0, 4.0, 8.0]), np.array([1, 0, 3]))
    assert [gaps.quantile(share) for share in (0.25, 0.26, 1.0)] == [2.0, 8.0, 8.0]
    assert facts.Gaps(gaps.edges, np.zeros(3, np.int64)).quantile(0.5) == 0.0
