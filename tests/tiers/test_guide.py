"""The example of docs/tiers.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "tiers.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(GUIDE), "exec"), names)
    assert capsys.readouterr().out == "stored 3 blocks\npromoted 48 tokens\ncached 48 of 50\n"
    names["cache"].check()
