"""The examples of docs/engine.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_examples_run(capsys):
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), names)
    shared = re.findall(r"(\d+) of (\d+) prompt tokens were computed by another", capsys.readouterr().out)
    assert len(shared) == 3 and int(shared[0][0]) == 0
    assert all(int(cached) > int(total) // 2 for cached, total in shared[1:])
    cache = names["llm"].core.runner.cache
    cache.check()
    assert cache.used_block_count == 0
