from __future__ import annotations

import importlib.metadata
import sys

import msgspec
import pytest
from tests.cli.commands import call, start

import pagedkv
from pagedkv.cli.info import Info
from pagedkv.models import shipped_model_path

NOTHING_HEAVY = """
import atexit, sys
atexit.register(lambda: print(sorted({"torch", "transformers", "numba"} & sys.modules.keys()), file=sys.stderr))
"""


def test_version():
    result = call("--version")
    assert result.exit_code == 0 and result.stdout == f"pagedkv {pagedkv.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_command_alone_shows_its_help(arguments):
    result = call(*arguments)
    assert result.exit_code == 0 and "Usage: pagedkv" in result.stdout
    assert all(word in result.stdout for word in ("generate", "info", "--version"))


def test_help_of_generate_names_every_option_and_shows_examples():
    result = call("generate", "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in (
        *("--model", "-n ", "--beams", "--max-new-tokens", "--temperature", "--top-p", "--seed", "--block-size"),
        *("--num-blocks", "--strategy", "--stream", "--sink-tokens", "--window-tokens", "--json", "--show-blocks"),
        *("--debug", "--device", "--echo", "--no-echo", 'pagedkv generate "def fibonacci(n):"'),
    ):
        assert option in result.stdout
    for default in ("the shipped model", "128; none with --stream", "0.7; 0 with --beams"):
        assert default in result.stdout


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["generate", "--help"], ["info"]])
def test_nothing_heavy_is_imported_for(arguments):
    with start(*arguments, before=NOTHING_HEAVY) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "[]\n"


def test_info_as_json_tells_what_is_installed():
    result = call("info", "--json")
    assert result.exit_code == 0
    info = msgspec.json.decode(result.stdout, type=Info, strict=True)
    assert info.pagedkv == pagedkv.__version__
    assert info.python == ".".join(map(str, sys.version_info[:3]))
    assert info.packages["numpy"] == importlib.metadata.version("numpy")
    assert info.cores >= 1 and info.backends["cpu"] and info.backends["reference"]
    assert info.shipped_model is not None and info.shipped_model.path == str(shipped_model_path())
    assert 5 < info.shipped_model.megabytes < 10


def test_info_as_a_table_says_the_same():
    result = call("info")
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert ["pagedkv", pagedkv.__version__] in [[row[0], row[1].strip()] for row in rows]
    assert str(shipped_model_path()) in result.stdout


def test_info_without_torch():
    with start("info", "--json", before="import sys; sys.modules['torch'] = None; ") as process:
        out, err = process.communicate(timeout=60)
    info = msgspec.json.decode(out, type=Info)
    assert process.returncode == 0 and err == ""
    assert not info.backends["cpu"] and not info.backends["reference"]
