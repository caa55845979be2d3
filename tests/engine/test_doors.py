"""The public door of the engine: what it shows, and that it opens without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pagedkv.engine


@pytest.mark.parametrize("name", pagedkv.engine.__all__)
def test_every_name_resolves_to_a_documented_object(name):
    value = getattr(pagedkv.engine, name)
    assert value.__name__ == name and value.__doc__ and name in dir(pagedkv.engine)


def test_all_is_sorted_and_what_the_type_checker_sees():
    assert pagedkv.engine.__all__ == sorted(set(pagedkv.engine.__all__))
    tree = ast.parse(Path(pagedkv.engine.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "pagedkv" in str(node.module)]
    seen = {alias.name: node.module for node in imports for alias in node.names if alias.name != "MissingExtra"}
    assert seen == pagedkv.engine._HOMES


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        pagedkv.engine.Engine  # noqa: B018


def test_parameters_and_outputs_need_no_torch():
    code = """
import sys
sys.modules["torch"] = None
from pagedkv.engine import EngineStats, Request, RequestOutput, RequestRefused, SamplingParams
try:
    from pagedkv.engine import LLM
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'pagedkv[hf]'" in done.stdout, done.stderr
