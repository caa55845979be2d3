"""``pagedkv check-model``: what the exam finds, as a table, as JSON, and in the exit code."""

from __future__ import annotations

import json
import logging

import pytest
from tests.cli.commands import call
from tests.hf.models import build

from pagedkv.models import shipped_model_path


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "transformers")


def test_the_shipped_model_is_served_in_the_fastest_way():
    found = json.loads(call("check-model", shipped_model_path(), "--json").stdout)
    assert found.pop("seconds") > 0
    assert found == {
        "model": "LlamaForCausalLM",
        "served": True,
        "mode": "compiled",
        "chunkable": True,
        "reuses_prefixes": True,
        "bytes_of_state": 0,
        "reasons": [],
    }


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("dynamic", 0, ["yes, in gather mode", "whole, never in chunks", "computed each time", "frequencies change"]),
        ("falcon_h1", 0, ["computed once, behind snapshots of states", "besides K and V"]),
        ("minimax", 1, ["no", "MiniMax uses cache of its own"]),
    ],
)
def test_the_table_says_why(tmp_path, name, code, words):
    build(name).save_pretrained(tmp_path)  # without a tokenizer: none is needed
    result = call("check-model", tmp_path)
    assert result.exit_code == code
    for word in words:
        assert word in result.stdout


def test_what_is_no_model_is_said_in_one_line(tmp_path):
    result = call("check-model", tmp_path / "none")
    assert result.exit_code == 2
    assert f"PATH: there is no folder {tmp_path / 'none'}" in result.stderr
