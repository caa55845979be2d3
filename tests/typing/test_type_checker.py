"""A type checker sees the mistakes that a program makes, and no public name hides them behind Any."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from pagedkv import typing
from pagedkv.control.strategies import as_strategy
from pagedkv.data.attention import BACKENDS
from pagedkv.spec import DTYPE_BYTES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DOORS = ("pagedkv", "pagedkv.engine", "pagedkv.hf", "pagedkv.sim", "pagedkv.tiers")

# Where a caller's own types are passed on, or the engine fills in what it is alone to read.
LOOSE = {
    "fingerprint_of.settings": "whatever JSON or str() knows",
    "fingerprint_of_files.settings": "whatever JSON or str() knows",
    "generate.return": "what transformers' generate() returns",
    "generate.kwargs": "those of transformers' generate(), which has their types",
    "Request.prompt_token_ids": "ids as they were given, then an array",
    "CacheReport.of.batch": "made by the cache",
    "CacheReport.of.config": "made by the cache",
    "Request.beams": "filled in by the engine",
    "Request.grammar": "filled in by the engine",
    "Structured.json": "a schema: whatever JSON holds",
    "Request.prompt_logprobs": "filled in by the engine",
}


@cache
def said() -> dict[str, dict[int, list[str]]]:
    """Return what mypy says of the programs, by file and line. It keeps what it knows where `make check` does."""
    pytest.importorskip("mypy")
    programs = [str(HERE / name) for name in ("wrong_programs.py", "right_programs.py")]
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    found: dict[str, dict[int, list[str]]] = {Path(program).name: {} for program in programs}
    for line in done.stdout.splitlines():
        error = re.match(r".*?(\w+\.py):(\d+): error: (.*)", line)
        assert error or " note: " in line, done.stdout + done.stderr
        if error:
            found[error[1]].setdefault(int(error[2]), []).append(error[3])
    assert done.returncode == 1, done.stderr
    return found


def test_every_wrong_line_is_refused_and_no_other():
    lines = (HERE / "wrong_programs.py").read_text().splitlines()
    expected = {number: line.partition("# E: ")[2] for number, line in enumerate(lines, start=1) if "# E: " in line}
    found = said()["wrong_programs.py"]
    assert len(expected) >= 30
    missed = {number: text for number, text in expected.items() if text not in " ".join(found.get(number, []))}
    assert missed == {}, found
    assert found.keys() - expected.keys() == set(), found


def test_right_programs_pass():
    assert said()["right_programs.py"] == {}


def test_names_of_types_are_those_of_the_library():
    assert set(get_args(typing.DtypeName)) == set(DTYPE_BYTES)
    assert set(get_args(typing.Backend)) == {"auto", *BACKENDS}
    for name in get_args(typing.StrategyName):
        as_strategy(name)


def public_functions() -> Iterator[tuple[str, object]]:
    """Yield every public function, and the public methods and properties of every public class, by name."""
    for door in DOORS:
        module = importlib.import_module(door)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.isclass(value):
                yield name, value
                continue
            for base in value.__mro__:
                for key, member in vars(base).items() if base.__module__.startswith("pagedkv") else ():
                    if not key.startswith("_") or key in ("__init__", "__call__"):
                        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                        yield name if key == "__init__" else f"{name}.{key}", member


def is_loose(annotation: object) -> bool:
    """Tell whether an annotation says Any or object somewhere."""
    nodes = ast.walk(ast.parse(annotation, mode="eval")) if isinstance(annotation, str) else ()
    return any(isinstance(node, ast.Name) and node.id in ("Any", "object") for node in nodes)


def test_no_public_signature_says_any():
    functions = list(public_functions())
    assert len(functions) > 400
    found = {
        f"{name}.{argument}"
        for name, function in functions
        for argument, annotation in getattr(function, "__annotations__", {}).items()
        if is_loose(annotation)
    }
    assert found == set(LOOSE)
