"""The guide "From one machine to a fleet" is executed: what it prints is what the commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "fleet.md"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", flags=re.M | re.S)
PRINTED = [
    "prefix: 92.9%",
    "Thrifty: 88.3%",
    "[[96  0  0]\n [ 0  0  0]]",
    "('replica 0', 'replica 1') {'replica 0': 96",
]


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedkv.cli import main

    monkeypatch.setattr("sys.argv", ["pagedkv", *shlex.split(command)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def test_the_guide_tells_what_happens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    printed, commands, names = "", 0, {"__name__": "guide"}
    for kind, text in BLOCK.findall(GUIDE.read_text()):
        if kind == "python":
            exec(compile(text, GUIDE.name, "exec"), names)
            printed += capsys.readouterr().out
            continue
        for part in re.split(r"^\$ pagedkv ", text, flags=re.M)[1:]:
            command, *promised = part.splitlines()
            run(command, monkeypatch)
            heard = capsys.readouterr()
            said = " ".join((heard.out + heard.err).replace("*", " ").split())
            assert [line for line in promised if line not in said] == [] and promised
            commands += 1
    assert commands == 5 and [line for line in PRINTED if line not in printed] == []
