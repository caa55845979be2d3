"""The guide "How much KV cache do I need?" is executed: what it prints is what the commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "how-much-cache.md"
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", flags=re.M | re.S)


def plain(text: str) -> str:
    """One space between words, no box drawing."""
    return " ".join(re.sub(r"[│─━╭╮╰╯*]", " ", text).split())


def test_the_guide_tells_what_happens(tmp_path, monkeypatch, capsys):
    from pagedkv.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    blocks = BLOCK.findall(GUIDE.read_text())
    assert len(blocks) >= 6
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, GUIDE.name, "exec"), {"__name__": "guide"})
            assert "of 512 tokens" in capsys.readouterr().out
            continue
        command, *promised = text.removeprefix("$ pagedkv ").splitlines()
        monkeypatch.setattr("sys.argv", ["pagedkv", *shlex.split(command)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        heard = capsys.readouterr()
        said = plain(heard.out + heard.err)
        for line in promised:
            assert plain(line) in said, f"{command}: {line!r} is not in {said}"
