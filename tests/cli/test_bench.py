from __future__ import annotations

import msgspec
import pytest
from tests.cli.commands import call

from pagedkv.cli import bench
from pagedkv.cli.bench import BenchResult, median_seconds

SMALL = ("--sequences", 4, "--prompt", 100, "--batch", 2, "--context", 50, "--q-heads", 4, "--kv-heads", 2)
QUICK = (*SMALL, "--head-dim", 16, "--seconds", 0.01)


def test_help_names_every_option_and_shows_examples():
    result = call("bench", "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in ("--sequences", "--dtypes", "--device", "--seconds", "--json", "pagedkv bench attention"):
        assert word in result.stdout


def test_everything_is_measured_and_told_as_json(monkeypatch):
    monkeypatch.setattr(bench, "_REPLAYED", 2000)
    result = call("bench", *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    found = msgspec.json.decode(result.stdout, type=BenchResult, strict=True)
    assert {figure.part for figure in found.figures} == {"books", "attention", "replay"}
    assert all(figure.value > 0 for figure in found.figures)
    names = [figure.name for figure in found.figures]
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        assert f"decode, {dtype}" in names and f"prefill, {dtype}" in names
    assert found.info.cores >= 1


def test_a_part_alone_as_a_table():
    result = call("bench", "books", "books", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("append_batch") == 1
    assert "96 of them found cached" in " ".join(result.stdout.split())
    assert "decode" not in result.stdout and "lru" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], "PART: expected one of books, attention, replay, got 'speed'"),
        (["--batch", 0], "--batch: expected an int of at least 1, got 0"),
        (["--seconds", "nan"], "--seconds: expected a number above 0, got nan"),
        (["--q-heads", 6, "--kv-heads", 4], "--q-heads: expected a multiple of --kv-heads 4, got 6"),
        (["attention", "--dtypes", "int3"], "int3"),
        (["attention", "--dtypes", ","], "--dtypes: expected"),
        (["attention", "--device", "nowhere"], "--device nowhere cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, words):
    result = call("bench", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("pagedkv: error: ") and words in result.stderr


def test_calls_take_turns():
    taken = []
    times = median_seconds([lambda: taken.append("a"), lambda: taken.append("b")], 0.0)
    assert "".join(taken) == "ab" * 6 and len(times) == 2
