"""``--kv-dtype``: what it refuses, and that it is what the pool holds."""

from __future__ import annotations

import json

import pytest
from tests.cli.commands import call


@pytest.mark.parametrize("command", [("generate", "x"), ("serve",)], ids=str)
def test_an_unknown_dtype_is_refused(command):
    result = call(*command, "--kv-dtype", "int4")
    assert result.exit_code == 2
    assert "--kv-dtype: expected float32, bfloat16, float16, int8, fp8, got int4" in result.stderr


@pytest.mark.parametrize("way", [(), ("--stream", "--window-tokens", "28")], ids=str)
def test_quantised_blocks_take_little_more_than_half(way):
    def told(dtype):
        result = call("generate", "import os", "--max-new-tokens", 4, "--kv-dtype", dtype, "--json", *way)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["memory"]["paged"]

    # Heads of 32 elements, of one byte each, and four bytes for their scale.
    assert told("int8") / told("float16") == told("fp8") / told("float16") == (32 + 4) / 64
