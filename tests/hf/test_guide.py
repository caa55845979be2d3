"""The examples of docs/huggingface.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_the_examples_run(capsys):
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), names)
    cached, total = map(int, re.findall(r"(\d+) of (\d+) prompt tokens were cached", capsys.readouterr().out)[0])
    assert total - 24 <= cached < total
    manager = names["cache"].manager
    manager.check()
    assert manager.used_block_count == 0
