"""``pagedkv warmup``: what it compiles is on the disk afterwards, and is all that the first calls need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.commands import call

import pagedkv
from pagedkv.jit import cache_directory

USE = """
from pagedkv.jit import watch_compiles
compiled = []
with watch_compiles(lambda name, seconds: compiled.append(name)):
    from pagedkv import BlockManager
    manager = BlockManager(num_blocks=1000, block_size=16)
    manager.allocate(1, list(range(100)))
    manager.commit(manager.plan([1]))
    manager.allocate(2, list(range(100)))
    manager.append_batch([1, 2], [7, 8])
    manager.free(1)
    import torch
    from pagedkv import PagedKvCache
    cache = PagedKvCache(64, 16, 8, 128, dtype="bfloat16")
    cache.allocate(1, 40)
    q, k = torch.randn(1, 32, 128, dtype=torch.bfloat16), torch.randn(1, 8, 128, dtype=torch.bfloat16)
    plan = cache.append_batch([1])
    cache.write(0, k, k, plan)
    cache.attend(0, q, plan)
    import sys, numpy
    from pagedkv.tiers import BlockFormat, DiskTier
    for _ in range(2):
        with DiskTier(sys.argv[1], "1MB").open(BlockFormat("model", 16, 5000)) as tier:
            tier.store(range(100), numpy.zeros((6, 5000), numpy.uint8)).result()
            tier.match(range(50)).result()
            tier.load(range(40), numpy.zeros((2, 5000), numpy.uint8)).result()
            tier.clear()
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
    from pagedkv.hf import load_runner
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    types = ["sliding_attention", "full_attention"]
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=2, layer_types=types))
    for model in (LlamaForCausalLM(LlamaConfig(**sizes)), gemma):
        load_runner(model.bfloat16(), num_blocks=20, mode="compiled")
print(compiled)
"""


def test_what_was_compiled_once_is_not_compiled_again():
    arguments = ("warmup", "--no-engine", "--dtype", "float32", "--json")
    assert call(*arguments).exit_code == 0
    told = json.loads(call(*arguments).stdout)
    assert [(part["name"], part["functions"]) for part in told["parts"]] == [
        ("books, lru", 0),
        ("tiers", 0),
        ("attention, float32", 0),
    ]
    assert told["directory"] == str(cache_directory())


def test_for_people_it_says_where_the_code_is():
    result = call("warmup", "--no-engine", "-s", "fifo", "--dtype", "float32")
    assert result.exit_code == 0
    assert "books, fifo" in result.stdout and f"kept in {cache_directory()}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--dtype", "int4"], "--dtype: expected float32"), (["-s", "lru2"], "strategy: expected")],
)
def test_wrong_options_are_named(arguments, text):
    result = call("warmup", "--no-engine", *arguments)
    assert result.exit_code == 2 and text in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_first_calls_compile_nothing_after_it(tmp_path):
    # A copy, as code that was compiled beside the package would be found there.
    copy, cache = tmp_path / "source", tmp_path / "cache"
    shutil.copytree(Path(pagedkv.__file__).parent, copy / "pagedkv", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(copy)}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    report = run("-c", "from pagedkv.cli import main; main()", "warmup", "--dtype", "bfloat16", "--json")
    told = json.loads(report)
    assert told["parts"][0]["functions"] > 0 and told["directory"].startswith(str(cache))
    assert run("-c", USE, str(tmp_path / "tier")) == "[]"
