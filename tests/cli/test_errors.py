from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.commands import call, start

from pagedkv.models import shipped_model_path


def failure(*arguments: object, **options) -> str:
    """Run a call that must fail and return what it says, after making sure that it is one line and nothing else."""
    result = call(*arguments, **options)
    assert result.exit_code == 2
    assert result.stdout == ""
    line, newline, rest = result.stderr.partition("\n")
    assert line.startswith("pagedkv: error: ") and newline and not rest, result.stderr
    return line.removeprefix("pagedkv: error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", 0], "-n: expected an integer in 1 … 2147483646, got 0"),
        (["-n", -3], "-n: expected an integer in 1 … 2147483646, got -3"),
        (["--beams", 0], "--beams: expected an integer in 1 … 2147483646, got 0"),
        (["--max-new-tokens", 0], "--max-new-tokens: expected an integer in 1 … 2147483646, got 0"),
        (["--block-size", 0], "--block-size: expected an integer in 1 … 2147483646, got 0"),
        (["--block-size", -16], "--block-size: expected an integer in 1 … 2147483646, got -16"),
        (["--num-blocks", 0], "--num-blocks: expected an integer in 1 … 2147483646, got 0"),
        (["--num-blocks", 10**15], "--num-blocks: expected an integer in 1 … 2147483646, got 1000000000000000"),
        (["--seed", -1], "--seed: expected an integer in 0 … 9223372036854775807, got -1"),
        (["--temperature", "nan"], "--temperature: expected a number of at least 0, got nan"),
        (["--temperature", "inf"], "--temperature: expected a number of at least 0, got inf"),
        (["--temperature", "-0.5"], "--temperature: expected a number of at least 0, got -0.5"),
        (["--top-p", "0"], "--top-p: expected a number above 0 and at most 1, got 0.0"),
        (["--top-p", "1.5"], "--top-p: expected a number above 0 and at most 1, got 1.5"),
        (["--top-p", "nan"], "--top-p: expected a number above 0 and at most 1, got nan"),
        (["--stream", "--sink-tokens", -1], "--sink-tokens: expected an integer in 0 … 2147483646, got -1"),
        (["--stream", "--window-tokens", 0], "--window-tokens: expected an integer in 1 … 2147483646, got 0"),
        (["--sink-tokens", 4], "--sink-tokens goes with --stream only"),
        (["--window-tokens", 4], "--window-tokens goes with --stream only"),
        (["-n", 2, "--beams", 2], "-n and --beams do not go together: samples are drawn at random, beams are not"),
        (["-n", 2, "--temperature", 0], "-n needs a --temperature above 0: at 0 all samples are the same"),
        (
            ["--beams", 2, "--temperature", 1],
            "--temperature and --beams do not go together: beam search does not sample",
        ),
        (["--stream", "-n", 2], "--stream writes one text: it does not go with -n"),
        (["--stream", "--beams", 2], "--stream writes one text: it does not go with --beams"),
    ],
)
def test_an_option_out_of_range_is_named(arguments, said):
    assert failure("generate", "x", *arguments) == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--tempersture", "1"], "No such option: --tempersture"),
        (["generate", "x", "--block-size", "many"], "Invalid value for '--block-size'"),
        (["generate", "x", "-n"], "Option '-n' requires an argument"),
        (["generate"], "Missing argument"),
        (["generate", "two", "prompts"], "unexpected extra argument"),
        (["genarate", "x"], "No such command 'genarate'"),
        (["info", "--wide"], "No such option: --wide"),
    ],
)
def test_a_wrong_call_is_one_line_that_points_to_the_help(arguments, said):
    line = failure(*arguments)
    assert said in line and "--help)" in line


def test_an_unknown_strategy_lists_the_known_ones():
    line = failure("generate", "x", "--strategy", "newest")
    assert line.startswith("--strategy: expected one of ") and line.endswith(", got 'newest'")
    assert all(name in line for name in ("fifo", "lfu", "longestfirst", "lru", "priority", "streamingllm"))


def test_a_strategy_without_its_argument_says_which():
    assert "levels" in failure("generate", "x", "--strategy", "priority")


@pytest.mark.parametrize(("prompt", "typed"), [("", ""), ("-", "")])
def test_an_empty_prompt(prompt, typed):
    assert failure("generate", prompt, input=typed).startswith("the prompt is empty")


def test_a_prompt_that_is_no_text():
    assert failure("generate", "-", input=b"\xff\xfe\x80") == "the prompt is not valid UTF-8"


# ---------------------------------------------------------------- the model's folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(shipped_model_path(), tmp_path / "model"))


def change_config(folder: Path, **values: object) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def test_a_missing_folder(tmp_path):
    assert failure("generate", "x", "--model", tmp_path / "none") == f"--model: there is no folder {tmp_path / 'none'}"


def test_a_bare_word_is_looked_up_in_the_cache_alone(monkeypatch):
    monkeypatch.setattr("pagedkv.cli.model_source._fetched", None)  # no network is tried
    line = failure("generate", "x", "--model", "gpt2")
    assert line.startswith("--model: there is no folder gpt2, and no model of that name in the Hugging Face cache ")


def test_a_file_is_no_folder(folder):
    assert "expected a folder" in failure("generate", "x", "--model", folder / "config.json")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in failure("generate", "x", "--model", folder)


@pytest.mark.parametrize(("text", "said"), [("{", "is no valid JSON"), ("[]", "names no model_type")])
def test_a_broken_config(folder, text, said):
    (folder / "config.json").write_text(text)
    assert said in failure("generate", "x", "--model", folder)


def test_a_model_type_that_nobody_knows(folder):
    change_config(folder, model_type="no_such_model")
    assert "no_such_model" in failure("generate", "x", "--model", folder)


def test_a_model_that_writes_no_text(folder):
    change_config(folder, model_type="t5")
    assert "T5Config" in failure("generate", "x", "--model", folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in failure("generate", "x", "--model", folder)


@pytest.mark.parametrize("kept", [0, 100, 1_000_000])
def test_weights_that_are_cut_off(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert f"cannot load {folder}" in failure("generate", "x", "--model", folder)


def test_weights_that_are_not_all_there_are_not_made_up(folder):
    change_config(folder, num_hidden_layers=5)
    assert "lack 9 tensors, model.layers.4." in failure("generate", "x", "--model", folder)


def test_weights_of_another_shape(folder):
    change_config(folder, intermediate_size=641)
    assert f"cannot load {folder}" in failure("generate", "x", "--model", folder)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_missing_or_broken_tokenizer(folder, text):
    if text is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(text)
    assert f"{folder} has no tokenizer that can be read" in failure("generate", "x", "--model", folder)


def test_a_device_that_is_not_there():
    assert failure("generate", "x", "--device", "warp").startswith("--device warp cannot be used")


# ---------------------------------------------------------------- too little room


def test_a_pool_too_small_for_the_prompt_says_how_many_blocks_it_takes():
    line = failure("generate", "x = 1\n" * 20, "--block-size", 8, "--num-blocks", 3)
    assert "tokens takes" in line and "blocks of 8 tokens, the pool has 3: raise --num-blocks" in line


def test_a_pool_that_fills_up_while_writing_says_so_after_the_text():
    result = call(
        "generate", "def f(", "--block-size", 4, "--num-blocks", 3, "--max-new-tokens", 50, "--temperature", 0
    )
    assert result.exit_code == 2 and result.stdout.startswith("def f(")
    line = result.stderr.splitlines()[-1]  # the first run says before that it compiles
    assert line.startswith(
        "pagedkv: error: the pool of 3 blocks of 4 tokens is full: the whole call takes up to 14 blocks"
    )
    assert "--num-blocks" in line and "Traceback" not in result.stderr


@pytest.mark.parametrize("options", [["--num-blocks", 2**31 - 2], ["-n", 10**7], ["--stream", "--num-blocks", 10**9]])
def test_a_pool_beyond_all_memory_is_refused(options):
    line = failure("generate", "x", *options)
    assert " GB, this machine has " in line and "lower --num-blocks" in line


def test_a_pool_too_small_for_sinks_and_window():
    line = failure("generate", "x", "--stream", "--num-blocks", 3, "--window-tokens", 64)
    assert "4 sink and 64 window tokens take 6 blocks of 16 tokens, the pool has 3" in line


def test_more_tokens_than_the_model_has_positions():
    line = failure("generate", "x", "--max-new-tokens", 5000)
    assert "exceed the model's 4096 positions: lower --max-new-tokens, or use --stream" in line


def test_a_window_that_the_model_has_no_positions_for():
    assert "the model's 4096 positions" in failure("generate", "x", "--stream", "--window-tokens", 4096)


# ---------------------------------------------------------------- what is shown of it


def test_debug_shows_the_traceback_and_the_line():
    result = call("generate", "x", "-n", 0, "--debug")
    assert result.exit_code == 2 and "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1] == "pagedkv: error: -n: expected an integer in 1 … 2147483646, got 0"


def test_an_error_that_nobody_foresaw_is_one_line_too(monkeypatch):
    def break_down(source, device, dtype):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("pagedkv.cli.generate.load_model", break_down)
    assert failure("generate", "x") == "RuntimeError: first line (run it again with --debug for the traceback)"


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_library_names_the_command_that_installs_it(library):
    with start("generate", "x", before=f"import sys; sys.modules[{library!r}] = None; ") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert err == f"pagedkv: error: {library} is not installed; install it with: pip install 'pagedkv[hf]'\n"
