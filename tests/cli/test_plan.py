from __future__ import annotations

import html
import json
import re

import pytest
from tests.cli.commands import call, start

from pagedkv.cli.plan import parse_size
from pagedkv.cli.terminal import Failure
from pagedkv.errors import ModelConfigError, PagedKvError
from pagedkv.sim.model_shape import read_model
from pagedkv.sim.planner import plan
from pagedkv.sim.reading import read_trace

ARGUMENTS = ("--model", "llama-3.1-8b", "--strategies", "lru,lfu")
KEYS = [
    *("trace", "model", "hardware", "target", "attainable", "attainable_tokens", "attainable_blocks", "prefill_flops"),
    *("prefill_seconds", "levels", "at_target", "knee", "memory", "load", "verdict", "strategies", "notes", "curves"),
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A small Mooncake file: ten chats that grow by a block a turn."""
    file = tmp_path_factory.mktemp("traces") / "chats.jsonl"
    lines = []
    for turn in range(12):
        for chat in range(10):
            ids = [chat * 100 + block for block in range(turn + 1)]
            arrival = (turn * 10 + chat) * 1000
            length = 512 * len(ids) - 12
            lines.append({"timestamp": arrival, "input_length": length, "output_length": 20, "hash_ids": ids})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_one_screen(trace):
    result = call("plan", trace, *ARGUMENTS, "--memory", "4GiB", env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) <= 48 and max(map(len, result.stdout.splitlines())) <= 120
    for words in (
        *("chats.jsonl: 120 requests in 1 min 59 s", "128 KiB per token", "64 MiB per block", "in bfloat16"),
        "attainable",
        *("84.6% of the blocks", "50%", "80%", "> 90%", "95%", "99%", "With 4 GiB: 64 blocks", "the optimum"),
        *("400 TFLOP/s × 0.5", "requests at a time", "knee of LRU", "verdict", "imited by"),
    ):
        assert words in result.stdout, words


def test_the_json_is_the_plan(trace):
    result = call("plan", trace, *ARGUMENTS, "--target", 0.85, "--memory", "4GiB", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    told = json.loads(result.stdout)
    made = plan(read_trace(trace), read_model("llama-3.1-8b"), target=0.85, memory=4 * 2**30, strategies=["lru", "lfu"])
    assert list(told) == KEYS
    assert [level["share"] for level in told["levels"]] == [0.5, 0.8, 0.85, 0.9, 0.95, 0.99]
    assert told["at_target"]["lru"]["blocks"] == made.at_target.lru.blocks
    assert told["at_target"]["lru"]["gib"] == made.at_target.lru.blocks / 16
    assert told["memory"]["blocks"] == 64 and told["memory"]["lru"]["hit_ratio"] == made.memory.lru.hit_ratio
    assert told["verdict"]["kind"] == made.verdict.kind and told["model"]["bytes_per_token"] == 131_072
    assert [curve["strategy"] for curve in told["curves"]] == ["lru", "optimal", "lfu"]
    assert told["hardware"] == {"tflops": 400.0, "mfu": 0.5, "decode_tokens_per_second": 50.0}


def test_a_disk_is_priced_where_its_rate_is_given(trace, monkeypatch, tmp_path):
    options = ("--memory", "2GiB", "--prefill-rate", 700)
    shown = call("plan", trace, *ARGUMENTS, *options, "--disk-read", "1.0 GB/s", env={"COLUMNS": "140"})
    assert shown.exit_code == 0, shown.stderr
    for words in ("1 GB/s give 7.63 k tokens/s; computed are 700", "with 2 GiB of memory alone", "memory or disk",
                  "Buy the disk", "found on it"):  # fmt: skip
        assert words in shown.stdout, words
    told = json.loads(call("plan", trace, *ARGUMENTS, *options, "--disk-read", "1GB/s", "--json").stdout)
    made = plan(read_trace(trace), read_model("llama-3.1-8b"), memory=2**31, strategies=["lru", "lfu"],
                prefill_rate=700, disk_read=1e9)  # fmt: skip
    assert list(told) == [*KEYS[:-1], "disk", "curves"] and told["disk"]["choice"] == "disk"
    assert [price["first_token"] for price in told["disk"]["prices"]] == [p.first_token for p in made.disk.prices]
    assert told["disk"]["memory"]["gib"] == 2.0
    monkeypatch.setattr("pagedkv.sim.disk_plan.measure_read_rate", lambda folder: 5e8 if folder == tmp_path else 0)
    told = json.loads(call("plan", trace, *ARGUMENTS, "--disk-read", tmp_path, "--json").stdout)
    assert told["disk"]["read_bytes_per_second"] == 5e8


def test_options_reach_the_plan(trace):
    options = ("--kv-dtype", "fp8", "--tflops", 990, "--mfu", 0.25, "--decode-rate", 10, "--window-as-full")
    told = json.loads(call("plan", trace, "-m", "gpt-oss-20b", "-s", "lru", *options, "--json").stdout)
    assert told["model"]["kv_dtype"] == "fp8" and told["model"]["bytes_per_token"] == 24 * 1024
    assert told["model"]["window_bytes_per_sequence"] == 0
    assert told["hardware"] == {"tflops": 990.0, "mfu": 0.25, "decode_tokens_per_second": 10.0}
    assert any("scales of fp8" in note for note in told["notes"])


def test_the_windows_are_told(trace):
    result = call("plan", trace, "-m", "gpt-oss-20b", "-s", "lru", env={"COLUMNS": "200"})
    assert "24 layers (12 full, 12 windowed), 20.9 B parameters, 4.19 B active" in result.stdout
    assert "3 MiB for the windows of a running request" in result.stdout and "2.0× the memory" in result.stdout


def test_traffic_that_is_never_repeated_has_a_screen_too(tmp_path):
    file = tmp_path / "once.jsonl"
    line = '{"timestamp": %d, "input_length": 512, "output_length": 1, "hash_ids": [%d]}\n'
    file.write_text("".join(line % (second, second) for second in range(20)))
    result = call("plan", file, *ARGUMENTS)
    assert result.exit_code == 0 and "Nothing to reuse" in result.stdout and "the optimum" not in result.stdout


def test_the_report_is_written(trace, tmp_path):
    page = tmp_path / "plan.html"
    result = call("plan", trace, *ARGUMENTS, "--target", 0.8, "--skip-bad", "--html", page)
    assert result.exit_code == 0, result.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "llama-3.1-8b" in text
    assert "pagedkv plan chats.jsonl --model llama-3.1-8b --target 0.8 --strategies lru,lfu --skip-bad --html" in text


PARTS = ("levels", "memory", "disk", "fleet", "load", "notes")
FLEET = ("--replicas", "1,2", "--routing", "sticky,prefix", "--host-memory", "0,1GiB", "--disk", "0,2GB")
PRICES = ("--price-replica-hour", 2.5, "--price-gib-hour", 0.004, "--price-disk-gib-hour", 0.0001)


def numbers_of(text):
    return set(re.findall(r"\d[\d,]*(?:\.\d+)?", text))


def read_parts(page):
    """The verdict and the sections of a report that tell the plan, without markup."""
    text = page.read_text(encoding="utf-8")
    parts = [re.search(rf'<section id="{part}".*?</section>', text, re.DOTALL) for part in PARTS]
    assert all(parts[:5])
    verdict = re.search(r'<p class="verdict">(.*?)</p>', text)
    return html.unescape(re.sub("<[^>]+>", " ", " ".join([verdict[1], *(part[0] for part in parts if part)])))


@pytest.mark.parametrize(("share", "model"), [(0.5, "llama-3.1-8b"), (0.99, "gpt-oss-20b"), (0.9, "qwen3.5-9b")])
def test_screen_and_report_tell_the_same_figures(trace, tmp_path, share, model):
    page = tmp_path / "plan.html"
    options = ("--gpu", "h200", "--memory", "1GiB", "--disk-read", "2GB/s", "--target", share, "--ttft-p99", "90s")
    result = call(
        "plan", trace, *ARGUMENTS, "--model", model, *options, *FLEET, *PRICES, "--html", page, env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.stderr
    told, shown = numbers_of(result.stdout), numbers_of(read_parts(page))
    assert len(told) > 80 and told ^ shown == set()


def test_a_fleet_is_planned_to_order(trace):
    options = ("--memory", "4GiB", *FLEET, *PRICES, "--target", 0.5)
    shown = call("plan", trace, *ARGUMENTS, *options, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.stderr
    told = json.loads(call("plan", trace, *ARGUMENTS, *options, "--json").stdout)
    assert list(told) == [*KEYS[:-1], "fleet", "curves"]
    fleet = told["fleet"]
    for words in ("what to order", "k prompt tokens/s, decodes 50 of", "wanted   50% of the attainable", "one pool"):
        assert words in shown.stdout, words
    assert " ".join(fleet["verdict"].split()[:6]) in shown.stdout
    assert fleet["best"] == fleet["nearest"] and fleet["best"]["meets"] and fleet["best"]["share"] >= 0.5
    assert fleet["options"]["prices"] == {"replica_hour": 2.5, "gib_hour": 0.004, "disk_gib_hour": 0.0001}
    assert fleet["candidates"] == (1 + 2) * 2 * 2 and len(fleet["one_pool"]) == 2
    assert all(outcome["cost"] >= 2.5 for outcome in fleet["outcomes"])


def test_a_time_alone_may_be_wanted_of_a_fleet(trace):
    options = ("--memory", "1GiB", "--replicas", 2, "--routing", "prefix", "--ttft-p99", "10min", "--json")
    fleet = json.loads(call("plan", trace, *ARGUMENTS, *options).stdout)["fleet"]
    assert fleet["options"]["share"] is None and fleet["options"]["ttft_p99"] == 600


def test_a_gpu_by_name_gives_memory_and_rates(trace):
    told = json.loads(call("plan", trace, *ARGUMENTS, "--gpu", "h100", "--json").stdout)
    weights = told["model"]["parameters"] * 2
    assert told["memory"]["bytes"] == round(0.9 * 80 * 2**30) - weights
    assert told["hardware"]["tflops"] == 989.4
    assert told["notes"][0] == "a replica has 72 GiB of 1 × h100: 15 GiB for the weights, 57 GiB for its pool"
    own = ("--tflops", 500, "--decode-rate", 30, "--memory", "4GiB")
    told = json.loads(call("plan", trace, *ARGUMENTS, "--gpu", "h100", *own, "--json").stdout)
    assert told["hardware"] == {"tflops": 500.0, "mfu": 0.5, "decode_tokens_per_second": 30.0}
    assert told["memory"]["bytes"] == 2**32
    more = ("--gpu", "h100", "--gpus-per-replica", 2, "--weight-bits", 8, "--gpu-memory-share", 0.8)
    told = json.loads(call("plan", trace, *ARGUMENTS, *more, "--json").stdout)
    assert told["memory"]["bytes"] == round(2 * 0.8 * 80 * 2**30) - weights // 2
    assert told["hardware"]["tflops"] == 2 * 1978.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--target", "90"),
            "--target: expected a share of the attainable hits above 0 and at most 1 (0.9 is 90%), got 90",
        ),
        (("--target", "nan"), "--target: expected a share"),
        (("--target", "much"), "--target"),
        (("--memory", "40"), "--memory: expected a size such as 40GiB or 80GB, got '40'"),
        (("--memory", "1MiB"), "error: --memory: expected at least 64 MiB"),
        (("--strategies", ","), "--strategies: expected names"),
        (("--strategies", "no-such"), "got 'no-such'"),
        (("--tflops", "0"), "--tflops: expected a number above 0"),
        (("--mfu", "1.5"), "--mfu: expected a number above 0 and at most 1, got 1.5"),
        (("--decode-rate", "nan"), "--decode-rate: expected"),
        (("--prefill-rate", "0"), "--prefill-rate: expected a number above 0, got 0.0"),
        (("--disk-read", "fast"), "--disk-read: expected a rate such as 1.0GB/s, or a folder on the disk to measure"),
        (("--disk-read", "1GB"), "--disk-read: expected a rate such as 1.0GB/s"),
        (("--disk-read", "0GB/s"), "--disk-read: expected a rate such as 1.0GB/s"),
        (("--kv-dtype", "int3"), "error: --kv-dtype: expected one of float16"),
        (("--model", "no-such-model"), "a model of the local hub cache, or a known name: deepseek-v3, deepseek-v3.2"),
        (("--model", "qwen3.5-35b"), "a known name: qwen3.5-35b-a3b"),
        (("--gpu", "h101"), "error: --gpu: expected one of h100, "),
        (("--gpu", "l4", "--model", "llama-3.1-70b"), "--gpus-per-replica: expected at least 7: 70.6 B weights"),
        (("--replicas", "2"), "--replicas: expected the memory of a replica: --memory 40GiB, or --gpu h100"),
        (("--replicas", "many", "--memory", "1GiB"), "--replicas, --routing: expected numbers and names"),
        (("--replicas", "2", "--routing", "no-such", "--memory", "1GiB"), "no-such"),
        (("--replicas", "2", "--memory", "1GiB", "--ttft-p99", "2"), "--ttft-p99: expected a time such as 2s or 500ms"),
        (
            ("--replicas", "2", "--memory", "1GiB", "--host-memory", ","),
            "--host-memory: expected sizes such as 0,60GiB",
        ),
        (
            ("--replicas", "2", "--memory", "1GiB", "--disk", "1MiB"),
            "--disk: expected 0, or at least a block of 64 MiB",
        ),
        (("--replicas", "2", "--memory", "1GiB", "--shared-read", "fast"), "--shared-read: expected a rate such as"),
        (("--replicas", "2", "--memory", "1GiB", "--price-gib-hour", "-1"), "expected a number"),
        (("--model", "{"), "model config inline JSON: expected a JSON object"),
        (("--model", '{"hidden_size": "x"}'), "hidden_size: expected an int in 1"),
        (("--html", "/no/such/folder/plan.html"), "--html: expected a file in a folder that exists"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trace, arguments, message):
    result = call("plan", trace, *ARGUMENTS, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_lengths_alone_are_refused_with_the_reason(tmp_path):
    file = tmp_path / "lengths.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    result = call("plan", file, *ARGUMENTS)
    assert result.exit_code == 2 and "lengths only" in result.stderr


def test_a_plan_needs_a_model_and_a_trace(trace, tmp_path):
    assert "--model" in call("plan", trace).stderr
    assert call("plan", tmp_path / "none.jsonl", *ARGUMENTS).exit_code == 2
    (tmp_path / "empty.jsonl").write_text("")
    assert call("plan", tmp_path / "empty.jsonl", *ARGUMENTS).exit_code == 2


def test_help_shows_examples_and_every_option():
    result = call("plan", "--help", env={"COLUMNS": "200"})
    for words in (
        *("--model", "--target", "--memory", "--strategies", "--kv-dtype", "--window-as-full", "--tflops", "--mfu"),
        *("--decode-rate", "--format", "--block-tokens", "--skip-bad", "--jobs", "--json", "--html", "--debug"),
        "pagedkv plan trace.jsonl.gz --model llama-3.1-8b",
    ):
        assert words in result.stdout, words


def test_a_plan_needs_no_torch(trace):
    watch = "import atexit, sys; atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))\n"
    process = start("plan", str(trace), "--model", "pysmall", "--strategies", "lru", "--json", before=watch)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.endswith("set()\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GiB", 40 * 2**30), ("80 GB", 80 * 10**9), ("1.5tib", 3 * 2**39), ("512MiB", 2**29), ("2kb", 2000)],
)
def test_sizes(text, size):
    assert parse_size("--memory", text) == size


@pytest.mark.parametrize("text", ["", "40", "GiB", "-1GiB", "1e3GiB", "40 gigs", "0GiB", "nan", "9" * 30 + "PiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(Failure, match="--memory: expected a size"):
        parse_size("--memory", text)


def test_the_errors_are_typed():
    assert issubclass(ModelConfigError, PagedKvError) and issubclass(ModelConfigError, ValueError)
