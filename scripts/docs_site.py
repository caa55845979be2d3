"""What the docs site takes from elsewhere: the project's address from pyproject.toml, and references in docstrings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([\w.]+)`")


def on_config(config: Any) -> Any:
    """Give the site the address of the repository."""
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    config.repo_url = hooks["custom"]["repository"]
    config.repo_name = "pagedkv"
    config.edit_uri = ""
    return config


class Roles(griffe.Extension):
    """Writes the roles of reStructuredText, which docstrings use for editors, as the code that they name."""

    def on_instance(self, *, obj: griffe.Object, **rest: Any) -> None:
        """Replace the roles of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
