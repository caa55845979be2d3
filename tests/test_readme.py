"""The examples of the README and of the tutorial run as they stand, and print what they say they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/tutorial.md")


def _examples(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
    return [example for example in found if "openai" not in example]  # tests/server/test_guide.py has a server for them


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    names: dict[str, object] = {"__name__": "example"}
    examples = _examples(page)
    assert len(examples) >= 5
    for example in examples:
        exec(compile(example, page, "exec"), names)
    assert capsys.readouterr().out


def test_readme_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    blocks, *_ = _examples("README.md")
    exec(compile(blocks, "README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines()[0] == "96"


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub, and the docs site alike, give the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_pages_leads_somewhere() -> None:
    roots = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    found = 0
    for page in [*roots, *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^):]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            led = page.parent / path if path else page
            assert led.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(led), f"{page.name}: {target}"
            found += bool(anchor)
    assert found >= 15
