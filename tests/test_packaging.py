"""What the package asks for, read from pyproject.toml, constraints.txt and the Makefile."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REPOSITORY = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
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


# What the base install brings, transitively; a name more is megabytes more for everybody.
BASE = {
    "numpy": "the books",
    "numba": "their kernels",
    "llvmlite": "numba",
    "typer": "the command",
    "shellingham": "typer",
    "annotated-doc": "typer",
    "rich": "the command",
    "pygments": "rich",
    "markdown-it-py": "rich",
    "mdurl": "markdown-it-py",
    "msgspec": "events, snapshots, traces",
    "xxhash": "fingerprints of kernels and blocks",
}


def test_the_base_install_brings_nothing_else():
    found, left = set(), [Requirement(text) for text in PROJECT["dependencies"]]
    while left:
        name = left.pop().name.lower().replace("_", "-")
        if name not in found:
            found.add(name)
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            left += [each for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert found == BASE.keys()


def test_the_base_install_has_the_command():
    code = """
import sys
for name in ("torch", "transformers", "pydantic", "fastapi"):
    sys.modules[name] = None
sys.argv = ["pagedkv", "info"]
from pagedkv.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and PROJECT["name"] in done.stdout, done.stderr


# What the built package says: README's links from anywhere, and where the project lives, both out of one line.


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The metadata of the package as it is built."""
    folder = tmp_path_factory.mktemp("metadata")
    build = f"from hatchling.build import prepare_metadata_for_build_wheel as make; print(make({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (text,) = folder.rglob("METADATA")
    return message_from_string(text.read_text("utf-8"))


def test_the_long_description_is_readme_with_addresses_that_work_anywhere(described):
    text = described.get_payload()
    readme = (ROOT / "README.md").read_text()
    prose = "".join(re.sub(r"```.*?```", "", text, flags=re.S))
    pictures, links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", prose), re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", prose)
    assert len(pictures) >= 4 and all(each.startswith(f"{REPOSITORY}/raw/main/docs/") for each in pictures)
    assert len(links) >= 20 and all(each.startswith("https://") for each in links)
    assert text.replace(f"{REPOSITORY}/raw/main/", "").replace(f"{REPOSITORY}/blob/main/", "").strip() == readme.strip()


def test_the_addresses_of_the_project_come_from_one_line(described):
    told = dict(line.split(", ") for line in described.get_all("Project-URL"))
    assert told["Repository"] == REPOSITORY and all(each.startswith(REPOSITORY) for each in told.values())
    tracked = [
        *ROOT.glob("*"),
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").glob("*"),
    ]
    texts = [path for path in tracked if path.suffix in (".md", ".py", ".toml", ".yml", ".cff", ".service", ".json")]
    assert {path.name for path in texts if REPOSITORY in path.read_text("utf-8")} == {"pyproject.toml", "CITATION.cff"}


def test_only_links_to_files_are_made_absolute(tmp_path):
    absolute = runpy.run_path(str(ROOT / "hatch_build.py"))["absolute"]
    (tmp_path / "a.md").touch()
    (tmp_path / "c.png").touch()
    left = "```python\nmade[0](a.md)\n```\n[d](#d) [e](https://e.org/) `x[1](y)`"
    made = absolute(f"[`a`](a.md#b) ![c](c.png)\n{left}", "https://h.org", tmp_path)
    assert made == f"[`a`](https://h.org/blob/main/a.md#b) ![c](https://h.org/raw/main/c.png)\n{left}"


def test_the_citation_is_of_this_version():
    from pagedkv import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == REPOSITORY and cited["keywords"] == PROJECT["keywords"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_the_source_archive_has_what_its_tests_read():
    asked = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = {*re.findall(r'ROOT / "([\w.-]+)"', tests)} - {"build"}  # what is made there is in no archive
    roots = {name for name in named if (ROOT / name).exists()}
    packed = {*asked, "pyproject.toml", "hatch_build.py", *(path.name for path in ROOT.glob("*.md"))}
    assert len(roots) > 8 and roots - packed == set()
