from __future__ import annotations

import gzip
import json
from dataclasses import asdict, fields

import pytest
from tests.cli.commands import call, start
from tests.cli.test_errors import failure
from tests.cli.test_info import NOTHING_HEAVY

from pagedkv.cli.trace import MEANINGS
from pagedkv.sim.reading import read_trace
from pagedkv.sim.synth import synthesize
from pagedkv.sim.trace import write_trace
from pagedkv.sim.trace_stats import describe
from pagedkv.sim.traffic import TRAFFIC, Traffic

LINES = [
    {"timestamp": 0, "input_length": 1300, "output_length": 20, "hash_ids": [7, 8, 9]},
    {"timestamp": 2500, "input_length": 1200, "output_length": 30, "hash_ids": [7, 8, 10]},
]


@pytest.fixture
def mooncake(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def words(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- describe


def test_the_screen_shows_the_figures(mooncake):
    result = call("trace", "describe", mooncake)
    assert result.exit_code == 0
    for line in (
        "two.jsonl mooncake, blocks of 512 tokens",
        "requests 2 in 2.5 s, 0.8 a second",
        "sessions not named",
        "tokens 2,500 in, 50 out",
        "input tokens 1,250 1,200 1,300 1,300 1,300",
        "hit ratio by block 33.3% 2 of 6 accesses",
        "hit ratio by token 41.0% 1,024 of 2,500 input tokens",
        "different blocks 4, 50.0% of them used once",
        "1 min 1 4 4",
        "10 min 1 4 4",
        "seconds 2.5 2.5 2.5 2.5 2.5",
        "blocks accessed 3 3 3 3 3",
        "1 50.0% 1 2",
        "3 0.0% 0 2",
        "1 2 2 1,024",
    ):
        assert line in words(result.stdout)


def test_json_is_the_whole_description(mooncake):
    result = call("trace", "describe", mooncake, "--json")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert json.loads(result.stdout) == json.loads(json.dumps(asdict(describe(read_trace(mooncake)))))


def test_other_blocks_and_a_named_format(mooncake):
    result = call("trace", "describe", mooncake, "--format", "mooncake", "--block-tokens", 434, "--json")
    assert json.loads(result.stdout)["content"]["hit_tokens"] == 868


def test_lengths_alone_say_that_hits_need_content(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    result = call("trace", "describe", path)
    assert result.exit_code == 0 and "requests 2 in 4.31 s" in words(result.stdout)
    assert "gives lengths only; hits, working sets and reuse need content" in words(result.stdout)
    assert "hit ratio" not in result.stdout
    assert json.loads(call("trace", "describe", path, "--json").stdout)["content"] is None


def test_a_broken_line_is_named_or_skipped_and_counted(mooncake):
    with mooncake.open("a") as file:
        file.write("{broken\n")
    assert f"{mooncake}" in (said := failure("trace", "describe", mooncake)) and "line 3" in said
    result = call("trace", "describe", mooncake, "--skip-bad")
    assert result.exit_code == 0 and "bad lines 1, skipped" in words(result.stdout)


def test_requests_out_of_order_are_told(mooncake):
    mooncake.write_text("".join(json.dumps(line) + "\n" for line in reversed(LINES)))
    result = call("trace", "describe", mooncake)
    assert result.exit_code == 0 and "out of order 1 of the requests, sorted by time" in words(result.stdout)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x00\xff\x80", b"[]"])
def test_what_is_no_trace(tmp_path, content):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    assert str(path) in failure("trace", "describe", path)


def test_a_file_that_is_not_there(tmp_path):
    assert "nothing.jsonl" in failure("trace", "describe", tmp_path / "nothing.jsonl")


def test_a_format_that_nobody_knows(mooncake):
    assert "format: expected one of mooncake, " in failure("trace", "describe", mooncake, "--format", "csv")


# ---------------------------------------------------------------- synth


def test_synth_writes_what_synthesize_makes(tmp_path):
    path = tmp_path / "made.jsonl.gz"
    result = call("trace", "synth", "agents", "-n", 50, "--seed", 3, "--rate", 2.5, "--set", "turns=9", "-o", path)
    assert result.exit_code == 0 and result.stdout == ""
    trace = synthesize("agents", requests=50, seed=3, rate=2.5, turns=9)
    assert f"{path}: 50 requests of" in result.stderr and f"{trace.num_accesses:,} block accesses" in result.stderr
    write_trace(trace, tmp_path / "same.jsonl.gz")
    assert path.read_bytes() == (tmp_path / "same.jsonl.gz").read_bytes()
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == 50


def test_synth_as_json(tmp_path):
    path = tmp_path / "made.jsonl"
    result = call("trace", "synth", "rag", "--accesses", 500, "--block-tokens", 64, "-o", path, "--json")
    said, trace = json.loads(result.stdout), synthesize("rag", accesses=500, block_tokens=64)
    assert said == {
        "path": str(path),
        "kind": "rag",
        "seed": 0,
        "block_tokens": 64,
        "requests": trace.num_requests,
        "sessions": int(trace.sessions.max()) + 1,
        "accesses": trace.num_accesses,
        "distinct_blocks": trace.num_distinct,
        "span_seconds": trace.times[-1],
    }


def test_what_was_made_can_be_described(tmp_path):
    path = tmp_path / "made.jsonl.gz"
    call("trace", "synth", "mixed", "-n", 100, "-o", path)
    found = json.loads(call("trace", "describe", path, "--json").stdout)
    assert found["content"]["hit_ratio"] == describe(synthesize("mixed", requests=100)).content.hit_ratio


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["video"], "KIND: expected one of chat, agents, rag, mixed, got 'video'"),
        (["chat", "-n", 0], "--requests: expected an int in 1 … 2147483647, got 0"),
        (["chat", "--accesses", -1], "accesses: expected an int in 1 … 1000000000000, got -1"),
        (["chat", "--rate", "-1"], "rate: expected a number in 1e-06 … 1e+09"),
        (["chat", "--rate", "nan"], "rate: expected a number in 1e-06 … 1e+09"),
        (["chat", "--seed", -1], "seed: expected an int in 0 … 9223372036854775807, got -1"),
        (["chat", "--set", "turns"], "--set: expected NAME=VALUE, got 'turns'"),
        (["chat", "--set", "turns=many"], "--set turns: expected a number, got 'many'"),
        (["chat", "--set", "turns=nan"], "turns: expected a number in 1 … 1e+12, got nan"),
        (["chat", "--set", "seed=1"], "--set: expected one of turns, "),
        (["chat", "--set", "idle_share=2"], "idle_share: expected a number in 0 … 1, got 2"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(arguments, said, tmp_path):
    assert said in failure("trace", "synth", *arguments, "-o", tmp_path / "made.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "made.jsonl"):
        assert "--output: expected a file in a folder that exists" in failure("trace", "synth", "chat", "-o", path)
    assert "--output" in failure("trace", "synth", "chat", "-n", 5)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize(
    "arguments", [["trace", "--help"], ["trace", "describe", "--help"], ["trace", "synth", "--help"]]
)
def test_nothing_heavy_is_imported_for_help(arguments):
    with start(*arguments, before=NOTHING_HEAVY) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "[]\n"


def test_help_of_synth_states_every_parameter_and_its_defaults():
    result = call("trace", "synth", "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    shown = words(result.stdout)
    for field in fields(Traffic):
        values = " ".join(f"{getattr(traffic, field.name):,g}" for traffic in TRAFFIC.values())
        name = "(--rate)" if field.name == "rate" else field.name
        assert f"{name} {MEANINGS[field.name] or 'its spread'} {values}" in shown


def test_the_table_of_meanings_is_complete():
    assert list(MEANINGS) == [field.name for field in fields(Traffic)]


def test_help_of_describe_names_every_option():
    result = call("trace", "describe", "--help", env={"COLUMNS": "200"})
    for option in ("--format", "--block-tokens", "--skip-bad", "--json", "--debug", "pagedkv trace describe trace"):
        assert option in result.stdout
