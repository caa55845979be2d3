"""The public door: what it shows, and what it costs to open."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pagedkv
from pagedkv import MissingExtra


def python(code: str) -> object:
    """Run code in a fresh interpreter and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_is_sorted_and_without_doubles():
    assert pagedkv.__all__ == sorted(set(pagedkv.__all__))


@pytest.mark.parametrize("name", pagedkv.__all__)
def test_every_name_resolves_to_a_documented_object(name):
    value = getattr(pagedkv, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(pagedkv)


def test_all_and_the_type_checkers_view_agree():
    tree = ast.parse(Path(pagedkv.__file__).read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("pagedkv")
    ]
    seen = {(alias.name, node.module) for node in imports for alias in node.names}
    assert seen == set(pagedkv._HOME_OF.items())
    assert set(pagedkv._HOME_OF) == set(pagedkv.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PagedKVCache'"):
        pagedkv.PagedKVCache  # noqa: B018


def test_import_loads_none_of_the_heavy_modules():
    loaded = python("import json, sys, pagedkv; dir(pagedkv); print(json.dumps(list(sys.modules)))")
    heavy = {"torch", "numba", "numpy", "transformers", "typer", "rich"}
    assert not heavy & {name.partition(".")[0] for name in loaded}
    assert [name for name in loaded if name.startswith("pagedkv")] == ["pagedkv"]


def test_control_plane_works_without_torch():
    code = """
import json, sys
sys.modules["torch"] = None
import pagedkv
for name in ("BlockManager", "KvCacheSpec", "LRU", "BatchPlan", "CacheSnapshot"):
    getattr(pagedkv, name)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("torch."))))
"""
    assert python(code) == []


def test_missing_torch_says_how_to_install_it():
    code = """
import json, sys
sys.modules["torch"] = None
import pagedkv
try:
    pagedkv.KvStorage
except pagedkv.MissingExtra as error:
    print(json.dumps([str(error), error.module, error.extra]))
"""
    message, module, extra = python(code)
    assert "pip install 'pagedkv[torch]'" in message
    assert (module, extra) == ("torch", "torch")


def test_missing_extra_is_an_import_error():
    assert issubclass(MissingExtra, ImportError)
