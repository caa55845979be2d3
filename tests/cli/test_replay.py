from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.cli.commands import call, start

from pagedkv.cli.replay import ReplayFacts
from pagedkv.cli.replay_options import split_names
from pagedkv.errors import InvalidOperation
from pagedkv.sim.curves import lru_curve
from pagedkv.sim.measures import closed_gap
from pagedkv.sim.optimum import optimal
from pagedkv.sim.queueing import Timing
from pagedkv.sim.reading import read_trace
from pagedkv.sim.replayer import ReplayResult, replay
from pagedkv.sim.replicas import Fleet
from pagedkv.sim.sweeps import parse_capacities, spread_capacities
from pagedkv.sim.tiered import Tiers, TierSpec

KEYS = ["strategy", "blocks", "accesses", "hit_blocks", "hit_ratio", "token_hit_ratio", "reclaimed", "seconds"]
IN_TIERS = ["--timed", "--tiers", "disk:5", "--bytes-per-token", "1"]
MINE = """
from pagedkv.control.strategies import LRU

class Mine(LRU):
    pass

class NotANumber(LRU):
    def score_blocks(self, blocks, now):
        return blocks.last_access * float("nan")
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A small Mooncake file: chats that grow by a block or two a turn, in random order."""
    rng = np.random.default_rng(7)
    path = tmp_path_factory.mktemp("traces") / "small.jsonl"
    chats, fresh = [[0] for _ in range(40)], 1
    lines = []
    for second in range(400):
        chat = chats[rng.zipf(1.3) % len(chats)]
        grown = int(rng.integers(1, 3))
        chat += range(fresh, fresh + grown)
        fresh += grown
        tokens = len(chat) * 512 - int(rng.integers(0, 512))
        lines.append({"timestamp": second * 1000, "input_length": tokens, "output_length": 64, "hash_ids": chat[:]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def replayed(*arguments):
    result = call("replay", *arguments, "--jobs", 1, "--json")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def failed(*arguments):
    result = call("replay", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("pagedkv: error: ")
    return result.stderr


def test_json_has_a_cell_for_every_strategy_and_capacity(trace):
    text = replayed(trace, "--blocks", "30,100", "--strategies", "lru,optimal,lfu")
    facts = msgspec.json.decode(text, type=ReplayFacts, strict=True)
    assert [list(cell) for cell in json.loads(text)["cells"]] == [KEYS] * 6
    assert list(json.loads(text)) == ["cells", "trace"]
    assert [(c.strategy, c.blocks) for c in facts.cells] == [
        (strategy, blocks) for strategy in ("lru", "optimal", "lfu") for blocks in (30, 100)
    ]
    read = read_trace(trace)
    for cell in facts.cells[:2]:
        expected = replay(read, cell.blocks)
        assert (cell.hit_blocks, cell.reclaimed, cell.accesses) == (
            expected.hit_blocks,
            expected.reclaimed,
            read.num_accesses,
        )
        assert cell.hit_ratio == expected.hit_blocks / read.num_accesses
        assert cell.token_hit_ratio == expected.hit_tokens / read.num_tokens
        assert cell.seconds > 0
    assert facts.cells[2].hit_blocks > facts.cells[0].hit_blocks
    assert (facts.trace.requests, facts.trace.distinct_blocks) == (400, read.num_distinct)
    assert facts.trace.attainable_hit_ratio == 1 - read.num_distinct / read.num_accesses


def test_processes_change_nothing_but_the_seconds(trace):
    def cells(jobs):
        result = call("replay", trace, "--blocks", "30,100", "--strategies", "lru,fifo,optimal", "-j", jobs, "--json")
        return [{key: cell[key] for key in KEYS[:-1]} for cell in json.loads(result.stdout)["cells"]]

    assert cells(1) == cells(2)


def test_capacities_can_be_shares_and_sizes(trace):
    distinct = read_trace(trace).num_distinct
    cells = json.loads(replayed(trace, "--blocks", "0.1k,50%,100,1m", "--strategies", "LRU"))["cells"]
    assert [cell["blocks"] for cell in cells] == [100, -(-distinct // 2), 1_000_000]
    assert {cell["strategy"] for cell in cells} == {"lru"}
    assert cells[-1]["hit_blocks"] == cells[-1]["accesses"] - distinct


def test_the_curve_agrees_with_the_replays(trace):
    facts = json.loads(replayed(trace, "--blocks", "33,101", "--strategies", "lru", "--curve"))
    curve, exact = facts["curve"], lru_curve(read_trace(trace))
    assert curve["blocks"] == sorted(set(curve["blocks"])) and {33, 101} <= set(curve["blocks"])
    assert 10 < len(curve["blocks"]) < 100
    for cell in facts["cells"]:
        place = curve["blocks"].index(cell["blocks"])
        assert curve["hit_ratio"][place] == cell["hit_ratio"]
        assert curve["token_hit_ratio"][place] == cell["token_hit_ratio"]
    assert curve["hit_ratio"][-1] == exact.attainable
    shown = call("replay", trace, "-b", "33,101", "-s", "lru", "--curve").stdout
    assert f"{exact.at(33):.2%}" in shown.partition("the exact LRU curve")[2]


def test_the_table_marks_the_best_and_tells_the_closed_gap(trace):
    result = call("replay", trace, "--blocks", "30,100", "--strategies", "lru,fifo,longest_first,optimal")
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("small.jsonl: 400 requests, ")
    assert lines[1].split() == ["blocks", "30", "100"]
    read = read_trace(trace)
    cells = {(name, blocks): replay(read, blocks, name) for name in ("lru", "fifo") for blocks in (30, 100)}
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:7]}
    assert list(rows) == ["lru", "fifo", "longest_first", "optimal"]
    assert rows["lru"][0] == f"{cells['lru', 30].hit_ratio:.2%}"
    ratios = {name: float(row[0].rstrip("%")) for name, row in rows.items() if name != "optimal"}
    starred = {name for name, row in rows.items() if row[1] == "*"}
    assert starred == {name for name, ratio in ratios.items() if ratio == max(ratios.values())}
    assert "*" not in rows["optimal"]
    gap = lines[lines.index(next(line for line in lines if line.startswith("gap from LRU"))) + 1 :][:2]
    assert [line.split()[0] for line in gap] == ["fifo", "longest_first"]


def test_the_closed_gap():
    def cell(strategy, hit_blocks):
        return ReplayResult(strategy, 10, 5, 100, hit_blocks, 0, 0, 0, 0.1)

    cells = {(c.strategy, 10): c for c in (cell("lru", 20), cell("optimal", 60), cell("good", 30), cell("bad", 10))}
    assert closed_gap(cells, "good", 10) == 0.25 and closed_gap(cells, "bad", 10) == -0.25
    assert closed_gap(cells, "lru", 10) is None and closed_gap(cells, "optimal", 10) is None
    assert closed_gap({k: c for k, c in cells.items() if k[0] != "optimal"}, "good", 10) is None
    assert closed_gap(cells | {("optimal", 10): cell("optimal", 20)}, "good", 10) is None


def test_many_capacities_fit_a_narrow_terminal(trace):
    result = call("replay", trace, "--strategies", "lru,fifo", env={"COLUMNS": "48"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines()[1:])) <= 48
    heads = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("blocks  ")]
    sizes = [int(size.replace(",", "")) for head in heads for size in head]
    assert sizes == spread_capacities(read_trace(trace).num_distinct)


def test_csv_holds_what_json_holds(trace, tmp_path):
    file = tmp_path / "cells.csv"
    strategies = "lru,streaming_llm:sink=4,window=512,fifo"
    text = replayed(trace, "--blocks", "30,100", "--strategies", strategies, "--csv", file)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == KEYS
    assert [{key: str(cell[key]) for key in KEYS} for cell in json.loads(text)["cells"]] == rows
    assert [row["strategy"] for row in rows[::2]] == ["lru", "streaming_llm:sink=4,window=512", "fifo"]
    printed = call("replay", trace, "-b", "30,100", "-s", strategies, "--csv", "-").stdout
    again = list(csv.DictReader(io.StringIO(printed)))
    assert [row | {"seconds": ""} for row in again] == [row | {"seconds": ""} for row in rows]


def test_the_report_is_one_file(trace, tmp_path):
    file = tmp_path / "report.html"
    result = call("replay", trace, "--blocks", "30,100", "--html", file)
    assert result.exit_code == 0 and "hit ratio" in result.stdout
    page = file.read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>") and "optimal" in page
    assert "pagedkv replay small.jsonl --blocks 30,100" in page


def test_in_time_requests_can_be_preempted_and_refused(trace):
    facts = json.loads(
        replayed(trace, "-b", "20,60,1k", "--timed", "--prefill-rate", 2000, "--decode-rate", 1, "-s", "lru")
    )
    assert [list(cell) for cell in facts["cells"]] == [[*KEYS, "preempted", "refused", "waits"]] * 3
    assert facts["timing"] == {
        "prefill_tokens_per_second": 2000,
        "decode_tokens_per_second": 1,
        "bytes_per_token": 0,
    }
    tight, middle, wide = facts["cells"]
    assert tight["refused"] > 0 and middle["preempted"] > 0
    assert wide["refused"] == wide["preempted"] == 0
    table = call("replay", trace, "-b", "60", "--timed", "--decode-rate", 1).stdout
    assert "requests preempted" in table and "optimal" not in table


def test_the_folder_at_hand_is_searched_for_every_class_that_is_named(trace, tmp_path, monkeypatch):
    (tmp_path / "another_of_the_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    told = call("replay", trace, "-b", "30", "-s", "priority:levels=3", "-j", 1, "--json")
    assert told.exit_code == 0 and str(tmp_path) not in sys.path
    for command in (("replay", trace, "-b", "30"), ("plan", trace, "-m", "llama-3.1-8b")):
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
        sys.modules.pop("another_of_the_test", None)
        result = call(*command, "-s", "lru,another_of_the_test:Mine", "-j", 1, "--json")
        assert result.exit_code == 0, result.stderr
        assert "another_of_the_test:Mine" in result.stdout


def test_a_strategy_of_ones_own_from_the_folder_at_hand(trace, tmp_path, monkeypatch):
    (tmp_path / "mine_of_the_test.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    mine = "mine_of_the_test:Mine"
    for jobs in (1, 2):
        result = call("replay", trace, "-b", "30", "-s", "lru", "--strategy-from", mine, "-j", jobs, "--json")
        stock, own = json.loads(result.stdout)["cells"]
        assert own["strategy"] == mine
        assert own | {"strategy": "", "seconds": 0} == stock | {"strategy": "", "seconds": 0}
    error = failed(trace, "-b", "30", "-j", 1, "--strategy-from", "mine_of_the_test:NotANumber")
    assert "The replay of mine_of_the_test:NotANumber with 30 blocks failed: " in error
    assert "NotANumber.score_blocks: expected to return integers" in error


TIERED = ["pool_hit_blocks", "pool_hit_ratio", "tiers", "restart", "attained"]


def test_tiers_are_told_in_json_csv_table_and_report(trace, tmp_path):
    page, file = tmp_path / "page.html", tmp_path / "cells.csv"
    options = ("-b", "30,60", "-s", "lru,lfu", "--tiers", "host:50,disk:50%", "--restart-at", "50%")
    text = replayed(trace, *options, "--html", page, "--csv", file)
    facts = msgspec.json.decode(text, type=ReplayFacts, strict=True)
    read = read_trace(trace)
    levels = [TierSpec("host", 50), TierSpec("disk", -(-read.num_distinct // 2))]
    assert [list(cell) for cell in json.loads(text)["cells"]] == [[*KEYS, *TIERED]] * 4
    assert json.loads(text)["tiers"] == {
        "levels": [{"medium": tier.medium, "blocks": tier.blocks, "strategy": "lru"} for tier in levels],
        "writes": "finish",
        "exclusive": False,
        "restart_at": 200,
    }
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for cell, row in zip(facts.cells, rows, strict=True):
        result = replay(read, cell.blocks, cell.strategy, tiers=Tiers(levels, restart_at=200))
        assert (cell.hit_blocks, cell.pool_hit_blocks) == (result.hit_blocks, result.pool_hit_blocks)
        assert cell.restart.hit_blocks == result.restart.hit_blocks > 0
        for found, tier in zip(cell.tiers, result.tiers, strict=True):
            assert (found.medium, found.hit_blocks, found.hit_tokens) == (tier.medium, tier.hit_blocks, tier.hit_tokens)
            assert found.written == tier.written > 0 and found.written_share == tier.written / read.num_accesses
            assert row[f"{tier.medium}_hit_blocks"] == str(tier.hit_blocks)
        assert row["restart_hit_ratio"] == str(result.restart.hit_ratio)
    shown = call("replay", trace, *options, env={"COLUMNS": "100"}).stdout
    first = facts.cells[0]
    for words in (
        f"a host tier of 50 blocks (lru) and a disk tier of {levels[1].blocks:,} blocks (lru), written on finish",
        *("a restart before request 201, at 3 min 20 s", "hit ratio in the 10% after the restart"),
        *(f"{first.pool_hit_ratio:.2%}", f"{first.tiers[1].hit_ratio:.2%}", f"{first.tiers[1].written:,}"),
    ):
        assert words in shown, words
    report = page.read_text(encoding="utf-8")
    beneath = f"and a host tier of 50 blocks and a disk tier of {levels[1].blocks:,} blocks"
    assert f"30 blocks {beneath}" in report or f"60 blocks {beneath}" in report
    assert "hits in disk" in report and f">{first.tiers[1].written:,}<" in report and "after the restart" in report


def test_a_fleet_is_told_in_json_csv_and_table(trace):
    asked = ("-b", 60, "--replicas", "1,3", "--routing", "round_robin,prefix")
    facts = json.loads(replayed(trace, *asked))
    whole = read_trace(trace)
    fleets = [Fleet(1, "round_robin"), Fleet(3, "round_robin"), Fleet(3, "prefix")]
    expected = [replay(whole, 60, fleet=fleet) for fleet in fleets]
    cells = facts["cells"]
    assert [cell["hit_blocks"] for cell in cells] == [result.hit_blocks for result in expected]
    told = [(result.fleet.replicas, result.fleet.routing, result.fleet.busiest) for result in expected]
    assert [tuple(cell["fleet"].values()) for cell in cells] == told and "tiers" not in cells[0]
    rows = list(csv.DictReader(io.StringIO(call("replay", trace, *asked, "--csv", "-").stdout)))
    assert [(row["strategy"], row["replicas"], row["routing"]) for row in rows][1:] == [
        ("lru", "3", "round_robin"),
        ("lru", "3", "prefix"),
    ]
    table = call("replay", trace, *asked).stdout
    for row in (
        "lru, one pool",
        "lru, 3 x round_robin",
        "lru, 3 x prefix",
        "computed by the busiest replica, over the mean",
    ):
        assert row in table
    assert len(json.loads(replayed(trace, "-b", 60, "--replicas", 2))["cells"]) == 4, "every policy by default"
    assert "fleet" not in replayed(trace, "-b", 60, "-s", "lru")


def test_fleets_with_tiers_in_time_are_told_in_json_csv_table_and_report_with_the_same_digits(trace, tmp_path):
    page, file = tmp_path / "page.html", tmp_path / "cells.csv"
    options = ("-b", "60,90", "--replicas", "1,3", "--routing", "round_robin,prefix", "--tiers", "host:50,shared:25%")
    options += ("--timed", "--prefill-rate", 500, "--decode-rate", 20, "--bytes-per-token", "1KB")
    options += ("--tier-speeds", "host:2MB/s,shared:1MB", "--tier-latencies", "shared:0.01")
    facts = msgspec.json.decode(replayed(trace, *options, "--html", page, "--csv", file), type=ReplayFacts, strict=True)
    read = read_trace(trace)
    levels = [
        TierSpec("host", 50, bytes_per_second=2e6),
        TierSpec("shared", -(-read.num_distinct // 4), bytes_per_second=1e6, latency=0.01),
    ]
    fleets = [Fleet(1, "round_robin"), Fleet(3, "round_robin"), Fleet(3, "prefix")]
    asked = [(fleet, blocks) for fleet in fleets for blocks in (60, 90)]
    timing = Timing(500, 20, 1000)
    expected = [replay(read, blocks, timing=timing, tiers=levels, fleet=fleet) for fleet, blocks in asked]
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
    for cell, row, result in zip(facts.cells, rows, expected, strict=True):
        best = optimal(read, result.blocks, tiers=levels, order=result.order)
        assert cell.attained == result.hit_blocks / best.hit_blocks <= 1
        told = [*map(result.ttft_percentile, (50, 90, 99)), result.mean_queueing, result.utilisation.tolist()]
        assert list(msgspec.structs.astuple(cell.waits)) == told and told[2] > told[0] > 0
        assert (float(row["ttft_p99"]), float(row["attained"])) == (told[2], cell.attained)
        assert row["utilisation"] == " ".join(map(str, told[-1])) and int(row["shared_written"]) > 0
    assert facts.tiers.levels[1].latency == 0.01 and facts.timing["bytes_per_token"] == 1000
    table, report = call("replay", trace, *options).stdout, page.read_text(encoding="utf-8")
    for result in expected:
        for digits in (f"{result.ttft_percentile(99):.2f}", f"{result.mean_queueing:.2f}", f"{result.hit_ratio:.2%}"):
            assert digits in table and f">{digits}<" in report
    for words in (
        "seconds to the first token, p99",
        "utilisation, the busiest replica",
        "lru, 3 x prefix",
        "shared tier",
    ):
        assert words in table and words in report


def test_the_optimum_over_a_fleet_and_its_tiers_is_one_row(trace, tmp_path):
    page = tmp_path / "page.html"
    options = ("-b", 60, "--replicas", "1,3", "--routing", "prefix", "--tiers", "shared:50", "-s", "optimal,lru")
    cells = json.loads(replayed(trace, *options, "--html", page))["cells"]
    assert [(cell["strategy"], "fleet" in cell) for cell in cells] == [("optimal", False), ("lru", True), ("lru", True)]
    read = read_trace(trace)
    assert cells[0]["hit_blocks"] == optimal(read, 110).hit_blocks == cells[1]["hit_blocks"] / cells[1]["attained"]
    rows = list(csv.DictReader(io.StringIO(call("replay", trace, *options, "--csv", "-").stdout)))
    assert [row["shared_hit_blocks"] == "" for row in rows] == [True, False, False]
    assert "best possible" in page.read_text(encoding="utf-8")


def test_a_routing_policy_of_ones_own_from_the_folder_at_hand(trace, tmp_path, monkeypatch):
    (tmp_path / "my_routing.py").write_text(
        "class First:\n    def order(self, request, candidates):\n        return range(len(candidates))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (cell,) = json.loads(replayed(trace, "-b", 60, "--replicas", 3, "--routing", "my_routing:First"))["cells"]
    assert cell["fleet"] == {"replicas": 3, "routing": "my_routing:First", "busiest": 3.0}


def test_how_tiers_are_used_can_be_chosen(trace):
    read, told = read_trace(trace), {}
    for options, tiers in (
        (["--exclusive"], Tiers([TierSpec("disk", 90)], "reclaim", True)),
        (["--tier-writes", "reclaim"], Tiers([TierSpec("disk", 90)], "reclaim")),
        (["--tier-writes", "second-hit", "--tier-strategy", "lfu"], Tiers([TierSpec("disk", 90, "lfu")], "second-hit")),
        (["--restart-at", "90s"], Tiers([TierSpec("disk", 90)], restart_at=90)),
    ):
        (cell,) = json.loads(replayed(trace, "-b", "40", "-s", "lru", "--tiers", "disk:90", *options))["cells"]
        result = replay(read, 40, tiers=tiers)
        told[options[0]] = cell["hit_blocks"], cell["tiers"][0]["written"]
        assert told[options[0]] == (result.hit_blocks, result.tiers[0].written), options
    assert len(set(told.values())) >= 3
    alone = json.loads(replayed(trace, "-b", "40", "-s", "lru", "--restart-at", "1h"))["cells"][0]
    assert list(alone) == KEYS  # no tiers, and a restart that never comes
    assert "the restart lies behind the last request" in call("replay", trace, "-b", "40", "--restart-at", "1h").stdout


def test_all_strategies_are_those_without_arguments(trace):
    cells = json.loads(replayed(trace, "-b", "30", "-s", "all"))["cells"]
    names = [cell["strategy"] for cell in cells]
    assert {"lru", "fifo", "lfu", "longestfirst", "optimal"} <= set(names) and "priority" not in names
    best = max(cells, key=lambda cell: cell["hit_blocks"])
    assert best["hit_blocks"] == cells[-1]["hit_blocks"] and cells[-1]["strategy"] == "optimal"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-b", "0"], "a cache without a block finds nothing, got '0'"),
        (["-b", "10,0%"], "got '0%'"),
        (["-b", "many"], "error: --blocks: expected capacities such as 1000,10k,25% or auto, got 'many'"),
        (["-b", "-5"], "got '-5'"),
        (["-b", "2.5"], "expected whole blocks"),
        (["-b", "99g"], "expected whole blocks"),
        (["-b", ","], "got ','"),
        (["-s", "no_such"], "one of adaptive, fifo, "),
        (["-s", "no_such"], "optimal, got 'no_such'"),
        (["-s", ""], "--strategies: expected names"),
        (["-s", "priority:levels=0"], "levels: expected an int"),
        (["--strategy-from", "mine.py:Best"], "expected module:Class, not a file"),
        (["--strategy-from", "best"], "expected module:Class, got 'best'"),
        (["--strategy-from", "no.such.module:Best"], "cannot be imported: ModuleNotFoundError"),
        (["--strategy-from", "json:loads"], "cannot be made without arguments"),
        (["--prefill-rate", "5"], "--prefill-rate needs --timed"),
        (["--decode-rate", "5"], "--decode-rate needs --timed"),
        (["--timed", "--decode-rate", "0"], "--decode-rate: expected a number above 0, got 0.0"),
        (["--timed", "--prefill-rate", "nan"], "--prefill-rate: expected a number above 0, got nan"),
        (["--timed", "-s", "lru,optimal"], "the optimum knows no time"),
        (["--tiers", "tape:5"], "--tiers: expected tiers such as disk:100k or host:20k,disk:25%, got 'tape:5'"),
        (["--tiers", "disk"], "--tiers: expected tiers such as"),
        (["--tiers", "disk:many"], "--tiers: expected tiers such as"),
        (["--tiers", "disk:0"], "tiers: a cache without a block finds nothing, got '0'"),
        (["--tiers", "disk:5,disk:6"], "--tiers: expected at most one of each medium, got disk, disk"),
        (["--tiers", ","], "--tiers: expected tiers such as"),
        (["--tiers", "disk:5", "--tier-writes", "often"], "--tier-writes: expected one of finish, reclaim, second-hit"),
        (
            ["--tiers", "disk:5", "--exclusive", "--tier-writes", "finish"],
            "--exclusive goes with --tier-writes reclaim",
        ),
        (["--tiers", "disk:5", "--tier-strategy", "no_such"], "--tier-strategy: expected one of adaptive"),
        (["--tiers", "shared:5,disk:6"], "--tiers: expected the shared one last, got shared, disk"),
        (["--restart-at", "50%", "--timed"], "--timed knows no restart"),
        (["--bytes-per-token", "5"], "--bytes-per-token needs --timed"),
        (["--timed", "--bytes-per-token", "many"], "--bytes-per-token: expected a size such as"),
        (["--tiers", "disk:5", "--tier-speeds", "disk:2GB"], "--tier-speeds needs --timed and --tiers"),
        (["--timed", "--tier-latencies", "disk:1"], "--tier-latencies needs --timed and --tiers"),
        (["--timed", "--tiers", "disk:5", "--tier-speeds", "disk:2GB"], "--tier-speeds needs --bytes-per-token"),
        ([*IN_TIERS, "--tier-speeds", "host:2GB"], "--tier-speeds: expected tiers of --tiers such as disk:…"),
        ([*IN_TIERS, "--tier-speeds", "disk:fast"], "--tier-speeds: expected a size such as"),
        ([*IN_TIERS, "--tier-latencies", "disk:soon"], "--tier-latencies: expected seconds, got 'soon'"),
        ([*IN_TIERS, "--tier-latencies", "disk:-1"], "--tier-latencies: expected a number of at least 0"),
        (["--exclusive"], "--exclusive needs --tiers"),
        (["--tier-writes", "finish"], "--tier-writes needs --tiers"),
        (["--restart-at", "soon"], "--restart-at: expected a moment such as 50%, 90s, 30min or 1h, got 'soon'"),
        (["--restart-at", "120%"], "--restart-at: expected a moment"),
        (["--routing", "prefix"], "--routing needs --replicas"),
        (["--replicas", "many"], "--replicas, --routing: expected numbers and names"),
        (["--replicas", ","], "--replicas, --routing: expected numbers and names"),
        (["--replicas", "0"], "--replicas: expected an int in 1"),
        (["--replicas", "2", "--routing", "fastest"], "--routing: expected module:Class or one of round_robin"),
        (["--replicas", "2", "--routing", "no_such:Thing"], "cannot be imported and made: ModuleNotFoundError"),
        (["--replicas", "8", "-b", "7"], "--blocks: expected at least one for each of 8 replicas, got 7"),
        (
            ["--replicas", "8", "-b", "9", "--tiers", "disk:7"],
            "--tiers: expected at least one block for each of 8 replicas, got 7",
        ),
        (["--replicas", "2", "--timed", "-s", "optimal"], "the optimum knows no time"),
        (["--jobs", "0"], "error: --jobs: expected an int in 1"),
        (["--json", "--csv", "-"], "both want stdout"),
        (["--csv", "/no/such/folder/cells.csv"], "--csv: expected a file in a folder that exists"),
        (["--html", "/no/such/folder/page.html"], "--html: expected a file in a folder that exists"),
        (["--html", "/"], "--html: expected a file"),
        (["--format", "no_such"], "error: --format: expected one of mooncake"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(trace, arguments, said):
    assert said in failed(trace, *arguments)


def test_a_trace_that_is_no_good(tmp_path):
    assert str(tmp_path / "nowhere.jsonl") in failed(tmp_path / "nowhere.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert str(empty) in failed(empty, "--format", "mooncake")
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n")
    assert "the format azure carries lengths only" in failed(lengths)


def test_a_broken_line_is_named_or_skipped(trace, tmp_path):
    broken = tmp_path / "broken.jsonl.gz"
    lines = trace.read_text().splitlines()
    with gzip.open(broken, "wt") as file:
        file.write("\n".join([*lines[:5], '{"timestamp": "soon', *lines[5:]]) + "\n")
    assert "6" in failed(broken, "-b", "30").partition("broken.jsonl.gz")[2]
    whole = json.loads(replayed(trace, "-b", "30", "-s", "lru"))
    result = call("replay", broken, "-b", "30", "-s", "lru", "--skip-bad", "--json")
    assert "1 broken record" in result.stderr
    facts = json.loads(result.stdout)
    assert facts["trace"]["skipped"] == 1
    assert facts["cells"][0]["hit_blocks"] == whole["cells"][0]["hit_blocks"]


def test_a_pipe_without_a_writer_says_that_it_waits(trace, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with start("replay", str(pipe), "-b", "30", "-s", "lru", "-j", "1", "--json") as process:
        assert process.stderr.readline().endswith("waiting for a writer, this is a pipe\n")
        pipe.write_bytes(trace.read_bytes())
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    whole = json.loads(replayed(trace, "-b", "30", "-s", "lru"))
    assert json.loads(out)["cells"][0]["hit_blocks"] == whole["cells"][0]["hit_blocks"]


def test_ctrl_c_ends_the_processes_too(trace, tmp_path):
    (tmp_path / "slow_of_the_test.py").write_text(
        "import os, pathlib, time\nfrom pagedkv.control.strategies import LRU\n"
        "class Slow(LRU):\n"
        "    def score_blocks(self, blocks, now):\n"
        "        if now > 20:\n"
        f"            pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "            time.sleep(600)\n"
        "        return blocks.last_access\n"
    )
    arguments = [*("replay", str(trace), "-b", "30,40", "-s", "slow_of_the_test:Slow", "-j", "2")]
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with start(*arguments, env=os.environ | {"PYTHONPATH": paths}, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("lru,fifo", ["lru", "fifo"]),
        (" LRU , Optimal,", ["lru", "optimal"]),
        ("streaming_llm:sink=4,window=512,lru", ["streaming_llm:sink=4,window=512", "lru"]),
        ("StreamingLLM(sink=4, window=512),FIFO", ["StreamingLLM(sink=4, window=512)", "FIFO"]),
        ("Pair(1,2),lru", ["Pair(1,2)", "lru"]),
        ("priority:levels=3,mine:Best", ["priority:levels=3", "mine:Best"]),
        ("", []),
    ],
)
def test_strategies_are_split_at_their_commas(text, names):
    assert split_names(text) == names


@pytest.mark.parametrize(
    ("text", "capacities"),
    [
        ("1000", [1000]),
        ("10_000, 1k,2K", [10_000, 1000, 2000]),
        ("1.5k,2m", [1500, 2_000_000]),
        ("10%,100%,200%", [100, 1000, 2000]),
        ("0.01%", [1]),
        ("33.3%", [333]),
        ("50%,500", [500]),
        ("auto", [8, 16, 32, 63, 125, 250, 500, 1000]),
    ],
)
def test_capacities(text, capacities):
    assert parse_capacities(text, 1000) == capacities


def test_capacities_of_a_tiny_trace():
    assert spread_capacities(3) == [1, 2, 3] and spread_capacities(0) == [1]
    with pytest.raises(InvalidOperation, match="finds nothing, got '50%'"):
        parse_capacities("50%", 0)
