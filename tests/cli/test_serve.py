"""What ``pagedkv serve`` refuses before it serves anybody."""

from __future__ import annotations

import gc
import inspect
import os
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from pagedkv.cli.app import app
from pagedkv.cli.loading import _out_of_sight

pytest.importorskip("fastapi")


def failure(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments], env=env)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.strip().splitlines() if "compiling its kernels" not in line]
    assert len(lines) == 1 and lines[0].startswith("pagedkv: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--port", "70000"], "--port"),
        (["--dtype", "int4"], "--dtype: expected auto, float32"),
        (["--max-body", "0"], "--max-body: expected at least 1"),
        (["--write-timeout", "nan"], "--write-timeout: expected seconds"),
        (["--log-format", "xml"], "--log-format: expected"),
        (["--operator-key", "a"], "--operator-key: expected api_keys"),
        (["/nowhere/at/all"], "there is no folder"),
        (["--api-key-file", "/nowhere"], "--api-key-file: cannot read"),
        (["--chat-template", "/nowhere"], "--chat-template: cannot read"),
        (["--host", "256.1.1.1"], "--host: cannot listen"),
        (["--record-events", "/nowhere/events"], "--record-events: cannot write"),
        (["--events-endpoint", "nowhere"], "--events-endpoint: expected an address"),
        (["--block-size", "0", "--port", "0"], "--block-size: expected an int"),
        (["--disk", "chats"], "--disk: expected --disk-size beside it"),
        (["--disk-size", "5GB"], "--disk-size: expected --disk beside it"),
        (["--disk-read-only"], "--disk-read-only: expected --disk beside it"),
        (
            ["--disk", "chats", "--disk-read-only", "--disk-size", "5GB"],
            "--disk-size: expected none beside --disk-read-only",
        ),
        (["--disk", "chats", "--disk-size", "much"], "--disk-size: expected a size such as 40GiB or 80GB, got 'much'"),
        (["--host-memory", "8GiB"], "--host-memory: expected a pool on a device, got one on the CPU"),
        (["--host-memory", "8"], "--host-memory: expected a size such as 40GiB or 80GB, got '8'"),
        (["--resp", "http://cache:6379"], "--resp: expected an address such as valkey://host:6379/0"),
        (["--resp", "valkey://cache", "--resp-ttl", "0"], "--resp-ttl: expected an int"),
        (["--resp-ttl", "60"], "--resp-ttl: expected --resp beside it"),
        (["--warm", "/nowhere"], "--warm: cannot read /nowhere: No such file"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], text: str) -> None:
    assert text in failure(*arguments)


def test_a_port_that_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in failure("--port", str(taken.getsockname()[1]))


def test_directories_that_cannot_be_had(tmp_path: Path) -> None:
    from pagedkv.tiers import BlockFormat, DiskTier

    def said(name: str, size: str = "10MB") -> str:
        return failure("--port", "0", "--disk", str(tmp_path / name), "--disk-size", size)

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    assert "expected an empty directory or a tier's, got one with 'thesis.tex'" in said("theirs")
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "years of work"
    assert "--disk-size: expected at least" in said("small", "1kB")
    with DiskTier(tmp_path / "used", "1MB").open(BlockFormat("ours", 16, 512)):
        told = said("used")
        assert f"is in use by process {os.getpid()}" in told and "--disk-read-only" in told


def test_tiers_are_asked_nearest_first(tmp_path: Path) -> None:
    from pagedkv.cli.engine_options import TierOptions

    both = TierOptions(disk=tmp_path, disk_size="1MB", host_memory="1MiB", resp="valkey://cache")
    assert [tier.medium for tier in both.tiers()] == ["CPU", "DISK", "REMOTE"] and TierOptions().tiers() == []


def test_a_second_server_reads_what_the_first_writes(tmp_path: Path) -> None:
    from pagedkv.cli.serve import TierOptions
    from pagedkv.tiers import DiskTier

    first, second = TierOptions(disk=tmp_path, disk_size="1MB"), TierOptions(disk=tmp_path, disk_read_only=True)
    tiers = [tier for options in (first, second) for tier in options.tiers()]
    assert all(isinstance(tier, DiskTier) for tier in tiers)
    assert [tier.is_read_only for tier in tiers if isinstance(tier, DiskTier)] == [False, True]


def test_cuda_graphs_without_a_device() -> None:
    told = failure("--port", "0", "--cuda-graphs")
    assert told.endswith("--cuda-graphs: expected a model on a CUDA device, got one on cpu")


def test_libraries_are_imported_without_the_garbage_collector() -> None:
    for module, off in (("no_such_library", True), ("socket", False)):
        with _out_of_sight(module):
            assert gc.isenabled() is not off
        assert gc.isenabled() and (gc.get_freeze_count() > 0) is off
        gc.unfreeze()
    with pytest.raises(ImportError), _out_of_sight("no_such_library"):
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_warming_up_is_nobodys_request() -> None:
    from tests.server.local import make_engine

    engine = make_engine(num_blocks=8)
    before = engine.stats()
    engine.llm.warm_up()
    assert engine.stats() == before


def test_a_file_without_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# nobody yet\n\n")
    assert "holds no key" in failure("--api-key-file", str(keys))


def test_keys_of_a_file(tmp_path: Path) -> None:
    from pagedkv.cli.serve import read_keys

    keys = tmp_path / "keys"
    keys.write_text("# ours\nalice\n\n  bob  \n")
    assert read_keys(keys) == ("alice", "bob") and read_keys(None) == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "server.toml",
            'port = 9000\napi_keys = ["a", "b"]\nblock_size = 8\nmax_queue = 3\nprefix_caching = false\n'
            'disk = "/chats"\ndisk_size = "2GB"\nwarm = ["one.txt", "two.json"]\n',
        ),
        (
            "server.json",
            '{"port": 9000, "api_keys": ["a", "b"], "block_size": 8, "max_queue": 3, "prefix_caching": false, '
            '"disk": "/chats", "disk_size": "2GB", "warm": ["one.txt", "two.json"]}',
        ),
    ],
)
def test_a_config_file_sets_what_no_option_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    import pagedkv.cli.serve as serve

    taken: list[Any] = []
    monkeypatch.setattr(serve, "run", lambda *arguments: taken.extend(arguments))
    file = tmp_path / name
    file.write_text(text)
    result = CliRunner().invoke(app, ["serve", "--config", str(file), "--max-queue", "7"])
    assert result.exit_code == 0, result.output
    _, engine, config, tiers = taken
    assert (engine.block_size, engine.prefix_caching, engine.max_num_seqs) == (8, False, 256)
    assert (config.port, config.api_keys, config.max_queue, config.host) == (9000, ("a", "b"), 7, "127.0.0.1")
    assert (tiers.disk, tiers.disk_size, tiers.warm) == (Path("/chats"), "2GB", ("one.txt", "two.json"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot = 1\n", "prot is no setting; did you mean port?"),
        ("[server]\nport = 1\n", "server is no setting; expected allow_hosts, "),
        ('config = "server.toml"\n', "config is no setting"),
        ("port = \n", "cannot be read"),
        ('port = "x"\n', 'port: expected a whole number, got "x"'),
        ("port = true\n", "port: expected a whole number, got true"),
        ("max_queue = 3.7\n", "max_queue: expected a whole number, got 3.7"),
        ("max_prompt_tokens = [1]\n", "max_prompt_tokens: expected a whole number, got [1]"),
        ('request_timeout = "long"\n', 'request_timeout: expected a number, got "long"'),
        ('prefix_caching = "no"\n', 'prefix_caching: expected true or false, got "no"'),
        ("host = [1, 2]\n", "host: expected a text, got [1, 2]"),
        ("disk = 1979-05-27\n", 'disk: expected a text, got "1979-05-27"'),
        ('warm = "file"\n', 'warm: expected a list of texts, got "file"'),
        ("api_keys = [1]\n", "api_keys: expected a list of texts, got [1]"),
        ('model_name = "a"\nserved-model-name = "b"\n', "served-model-name: expected model_name once"),
        ("max_body = 0\n", "--max-body: expected at least 1"),
    ],
)
def test_a_config_file_that_makes_no_sense(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    assert told in failure("--config", str(file))


def sample(annotation: Any) -> tuple[str, Any]:
    """Return a value of the type of an option that no option has by default, in TOML and as it arrives."""
    hint = str(get_args(annotation)[0])
    for kind, text, value in (
        ("list[str]", '["x", "y"]', ["x", "y"]),
        ("bool", "true", True),
        ("int", "7", 7),
        ("float", "0.25", 0.25),
        ("Path", '"/x"', "/x"),
        ("str", '"x"', "x"),
    ):
        if kind in hint:
            return text, value
    raise AssertionError(f"{annotation} is nothing that a file can hold")


def test_every_option_can_be_set_in_a_file_and_the_command_line_wins(tmp_path: Path) -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    hints = inspect.signature(command.callback).parameters
    settings = [each for each in command.params if each.name != "config"]
    assert len(settings) == len(hints) - 2  # the context, the file itself
    file = tmp_path / "server.toml"

    def taken(name: str, *arguments: str) -> Any:
        found = command.make_context("serve", ["--config", str(file), *arguments]).params[name]
        return str(found) if isinstance(found, Path) else list(found) if isinstance(found, tuple) else found

    for each in settings:
        text, value = sample(hints[each.name].annotation)
        text, value = ("false", False) if each.default is True else (text, value)
        for key in {each.name, *(flag[2:] for flag in each.opts if flag.startswith("--"))}:
            file.write_text(f"{key} = {text}\n")
            assert taken(each.name) == value, key
        flag = max(each.opts, key=len)
        if each.param_type_name == "argument":
            assert taken(each.name, "/other") == "/other"
        elif isinstance(value, bool):
            back = each.opts if each.default else each.secondary_opts
            assert each.name == "debug" or taken(each.name, max(back, key=len)) is (not value)
        elif isinstance(value, list):
            assert taken(each.name, flag, "other") == ["other"]
        else:
            assert str(taken(each.name, flag, "9")).startswith("9")


def test_options_have_the_names_and_the_defaults_of_the_library() -> None:
    from pagedkv.cli.engine_options import EngineOptions
    from pagedkv.engine import LLM

    library = inspect.signature(LLM).parameters
    options = [each for each in fields(EngineOptions) if each.name not in ("device", "dtype")]
    assert {each.name: each.default for each in options} == {each.name: library[each.name].default for each in options}


def test_help_has_examples() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0 and "curl" in result.output and "PAGEDKV_API_KEYS" in result.output
