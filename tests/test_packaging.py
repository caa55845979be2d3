"""What the package asks for, read from pyproject.toml, constraints.txt and the Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    name.lower().replace("_", "-"): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
}

# The last release with a published advisory of what a server or a loader of model files would run into.
LAST_FAULTY = {"torch": "2.7.1", "fastapi": "0.120.4", "starlette": "0.49.0"}


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize(("name", "version"), LAST_FAULTY.items())
def test_no_release_with_a_known_hole_is_admitted(name, version):
    asked = [each for each in requirements() if each.name == name]
    assert asked and not any(each.specifier.contains(version) for each in asked)


def test_the_pinned_versions_are_admitted():
    asked = [each for each in requirements() if each.name.lower() in PINS]
    assert len(asked) > 20
    assert [str(each) for each in asked if PINS[each.name.lower()] not in each.specifier] == []


def test_everything_is_installed_with_the_pinned_versions():
    calls = [line for line in (ROOT / "Makefile").read_text().splitlines() if "$(PIP) " in line]
    assert len(calls) >= 3
    assert [line for line in calls if "-c constraints.txt" not in line] == []
