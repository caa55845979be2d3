"""What the docs site takes from elsewhere: the project's address from pyproject.toml, and references in docstrings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
REFERENCE = {
    name
    for page in (ROOT / "docs" / "reference").glob("*.md")
    for name in re.findall(r"^::: (.+)$", page.read_text(), re.M)
}
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([\w.]+)`")


def on_config(config: Any) -> Any:
    """Lead to the repository at the foot of each page: with `repo_url` pages would ask GitHub how many stars it has."""
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    address = hooks["custom"]["repository"]
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": address, "name": "The repository"}]
    return config


def link(role: re.Match[str]) -> str:
    """Return the name of a role as code, with a link where the reference has it."""
    name = role[1]
    return f"[`{name}`][{name}]" if name in REFERENCE else f"`{name}`"


class Roles(griffe.Extension):
    """Links the roles of reStructuredText, by which docstrings lead to one another in an editor."""

    def on_instance(self, *, obj: griffe.Object, **rest: Any) -> None:
        """Replace the roles of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
