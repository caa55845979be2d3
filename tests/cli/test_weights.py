"""``--weights``: what it refuses, and that a text is written with weights in 8 bits."""

from __future__ import annotations

import json

import pytest
import transformers
from tests.cli.commands import call

from pagedkv.cli.engine_options import EngineOptions, TierOptions, make_engine
from pagedkv.cli.loading import load_model
from pagedkv.cli.model_source import find_model


@pytest.mark.parametrize("command", [("generate", "x"), ("serve",)], ids=str)
def test_unknown_weights_are_refused(command):
    result = call(*command, "--weights", "int4")
    assert result.exit_code == 2
    assert "--weights: expected int8, got int4" in result.stderr


@pytest.mark.parametrize("name, given, plain", [("dtype", "bfloat16", "auto"), ("device", "cuda", "cpu")])
def test_weights_go_with_the_folder_as_it_is_on_the_cpu(name, given, plain):
    result = call("serve", "--weights", "int8", f"--{name}", given)
    assert result.exit_code == 2
    assert f"--{name}: expected {plain} beside --weights, got {given}" in result.stderr


def test_a_text_is_written_with_weights_in_8_bits():
    result = call("generate", "import os", "--max-new-tokens", 8, "--temperature", 0, "--weights", "int8", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 8


def test_a_served_model_is_read_once_and_keeps_no_other_weights(monkeypatch):
    shipped = find_model(None)
    options = EngineOptions(weights="int8", num_blocks=16)
    loads: list[object] = []
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **more: loads.append(args) or load(*args, **more),
    )
    engine = make_engine(options, load_model(shipped, "cpu"), TierOptions())
    with engine.llm:
        model = engine.llm.core.runner.model
        assert all(not parameter.numel() for parameter in model.parameters())
    assert len(loads) == 1  # its weights were read once
