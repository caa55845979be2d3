"""The docs site: every page in its navigation, every public name in its reference. `make check` builds it."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
DOORS = (
    "pagedkv",
    "pagedkv.engine",
    "pagedkv.fleet",
    "pagedkv.hf",
    "pagedkv.models",
    "pagedkv.server",
    "pagedkv.sim",
    "pagedkv.tiers",
    "pagedkv.vllm",
)


def pages_of(navigation: list[Any]) -> list[str]:
    """Return the pages of a navigation in their order."""
    found: list[str] = []
    for entry in navigation:
        for value in entry.values():
            found += [value] if isinstance(value, str) else pages_of(value)
    return found


def public_names(door: str) -> set[str]:
    """Return what a door shows, without opening it: transformers takes seconds."""
    home = ROOT / "src" / Path(*door.split("."))
    for node in ast.parse((home / "__init__.py").read_text()).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
            and isinstance(node.value, ast.List)
        ):
            return set(ast.literal_eval(node.value))
    return set(importlib.import_module(door).__all__)


def test_every_page_has_one_place_in_the_navigation() -> None:
    placed = pages_of(SITE["nav"])
    assert sorted(placed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_a_warning_ends_the_build_and_every_link_is_looked_at() -> None:
    assert SITE["strict"] is True
    assert {*SITE["validation"]["links"].values(), *SITE["validation"]["nav"].values()} == {"warn"}


def test_pages_fetch_nothing_from_elsewhere() -> None:
    assert SITE["theme"]["font"] is False and not SITE.get("extra_javascript") and not SITE.get("extra_css")
    pictures = [
        found for page in DOCS.rglob("*.md") for found in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    ]
    assert pictures and [address for address in pictures if "//" in address] == []


def test_the_repository_is_named_in_one_place_and_nobody_is_asked_about_it() -> None:
    config = SimpleNamespace(extra={})
    runpy.run_path(str(ROOT / "scripts" / "docs_site.py"))["on_config"](config)
    (link,) = config.extra["social"]
    assert link["link"] in (ROOT / "pyproject.toml").read_text()
    assert "repo_url" not in SITE and not hasattr(config, "repo_url")


@pytest.mark.parametrize("door", DOORS)
def test_every_public_name_is_in_the_reference(door: str) -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    told = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    assert len(told) == len(re.findall(r"^::: ", text, re.M))
    missing = {name for name in public_names(door) if f"{door}.{name}" not in told}
    assert [name for name in missing if f"pagedkv.{name}" not in told] == []  # errors are at home in pagedkv


def test_the_reference_names_nothing_that_is_not_there() -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M):
            door, _, last = name.rpartition(".")
            assert last in public_names(door), f"{page.name}: {name}"


def test_the_example_of_the_first_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "index.md").read_text(), re.M | re.S)
    exec(compile(example, "index.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == "96\n"


def test_the_logo_is_drawn_of_a_pool() -> None:
    drawn = runpy.run_path(str(ROOT / "scripts" / "draw_logo.py"))
    picture = drawn["draw"](drawn["pool"]())
    assert all(colour in picture for colour in drawn["COLOURS"].values())
    assert [place.name for place in drawn["PLACES"] if place.read_text() != picture] == []


def test_the_table_of_first_contact_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "first_contact.py"))
    names = ("clone", "venv", "install", "first", "again")

    def way(name: str, extras: str, seconds: float) -> Any:
        times = dict.fromkeys(names, seconds)
        return script["Way"](name, extras, times, dict(times), {"numba": 35.0, "llvmlite": 173.0, "pip": 17.0}, 300.0)

    best = [script["quickest"]([way(*each, 4.0), way(*each, 2.0)]) for each in script["WAYS"]]
    kept = (DOCS / "first-contact.md").read_text()
    (torch,) = re.findall(r"torch ([\d.]+\S*)\. ", kept)
    made = script["page"](best, 30.0, torch, 2)
    assert "| `pip install '.[serve]'` | 300 | 6.0 (6.0) | 2.0 (2.0) | **8** | 2.0 (2.0) |" in made
    assert made.index("| llvmlite | 173.0 |") < made.index("| numba | 35.0 |") and "| pip |" not in made
    assert re.sub(r"[\d.,]+", "#", kept).splitlines()[:20] == re.sub(r"[\d.,]+", "#", made).splitlines()[:20]
