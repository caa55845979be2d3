"""The examples of docs/huggingface.md and docs/chats.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def names_after(guide, at_least):
    """Run the examples of a guide one after the other; returns what they have defined."""
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(), flags=re.DOTALL)
    assert len(examples) >= at_least
    for example in examples:
        exec(compile(example, guide, "exec"), names)
    return names


def test_the_examples_run(capsys):
    names = names_after("huggingface.md", 4)
    cached, total = map(int, re.findall(r"(\d+) of (\d+) prompt tokens were cached", capsys.readouterr().out)[0])
    assert total - 24 <= cached < total
    manager = names["cache"].manager
    manager.check()
    assert manager.used_block_count == 0


def test_chats_survive_restarts(capsys):
    names_after("chats.md", 2)
    said = capsys.readouterr().out
    (first, _), (cached, total) = re.findall(r"(\d+) of (\d+) prompt tokens came from the disk", said)[:2]
    assert int(first) == 0 and int(total) - 32 < int(cached) < int(total)
    ((before, one), (after, other)) = re.findall(r"\((\d+), (\d+)\)", said)
    assert int(before) == 0 < int(after) and one == other
