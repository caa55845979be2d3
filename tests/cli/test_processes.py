"""The command as a user runs it: pipes, signals, text that comes while it is written."""

from __future__ import annotations

import json
import os
import signal

import pytest
from tests.cli.commands import start

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and pipes of POSIX")

PATIENCE = 240  # seconds: the first run compiles


def test_text_comes_while_it_is_written_and_ctrl_c_ends_it_quietly():
    with start("generate", "def fibonacci(n):", "--max-new-tokens", "4000") as process:
        assert process.stdout.read(40).startswith("def fibonacci(n):")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err and "error" not in err


def test_ctrl_c_is_the_way_to_end_a_text_without_end():
    with start("generate", "import os\n", "--stream", "--window-tokens", "12", "--block-size", "4") as process:
        process.stdout.read(200)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and out.endswith("\n") and "Traceback" not in err
    assert "dropped tokens" in err and "tokens/s" in err


def test_nobody_reads_on():
    with start("generate", "def fibonacci(n):", "--max-new-tokens", "4000") as process:
        process.stdout.read(30)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(PATIENCE) == 141 and "Traceback" not in err and "Exception" not in err


@pytest.mark.parametrize("command", [("info",), ("trace", "describe"), ("replay", "-b", "2", "-s", "lru", "-j", "1")])
def test_nobody_reads_a_table(command, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n')
    with start(*command, *([] if command == ("info",) else [str(trace)])) as process:
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(PATIENCE) == 141 and "Traceback" not in err and "Exception" not in err


def test_a_pipe_in_and_a_file_out_without_unicode(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    options = ("--max-new-tokens", "8", "--show-blocks", "--json")
    with (
        (tmp_path / "out").open("wb") as out,
        start("generate", "-", *options, stdout=out, env=environment) as process,
    ):
        _, err = process.communicate("x = 1  # naive\n", timeout=PATIENCE)
    assert process.returncode == 0, err
    report = json.loads((tmp_path / "out").read_bytes())
    assert report["prompt"] == "x = 1  # naive\n" and len(report["token_ids"][0]) <= 8
    assert "# active" in err and "Traceback" not in err
