"""What a first start costs: processor time of fresh processes on a cold cache of compiled code, and on a warm one.

Each measurement is a process of its own, over a copy of the package: code that lies beside the installed one would be
loaded. "Cold" is such a copy and an empty directory for compiled code, "warm" is the same when the steps run once more.
A step counts what comes on top of the steps before it in the same process; imports of torch and transformers, which are
not ours, are left out. Processor time, of all threads: a busy machine hardly changes it.

    python benchmarks/cold_start.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pagedkv

PACKAGE = Path(pagedkv.__file__).parent
Row = dict[str, Any]

BEGIN = """
import json, os, time
steps = {}
def step(name):
    now = sum(os.times()[:2])
    steps[name] = now - step.last
    step.last = sum(os.times()[:2])
step.last = 0.0
"""
END = "\nprint(json.dumps(steps))"

# README's first example, word for word but for what it prints.
BOOKS = """
from pagedkv import BlockManager
manager = BlockManager(num_blocks=1000, block_size=16)
prompt = list(range(100))
manager.allocate(1, prompt)
plan = manager.plan([1])
manager.commit(plan)
info = manager.allocate(2, prompt)
assert info.num_cached_tokens == 96
plan = manager.append_batch([1, 2], [7, 8])
manager.free(1)
step("books: README's first example, with the import")
"""

ALL_BOOKS = """
manager = BlockManager(num_blocks=8, block_size=4, on_full="evict")
manager.subscribe(lambda event: None)
manager.allocate(1, list(range(10)))
manager.commit(1)
manager.fork(1, 2)
manager.append(2, [5, 6])
manager.truncate(2, 9)
manager.pin(1)
manager.touch(2)
manager.match_prefix(list(range(10)))
manager.free(1)
manager.unpin(1)
manager.allocate(3, 30)
manager.evict()
manager.allocate(4, 30)
manager.apply_streaming_llm(4, 2, 9)
manager.clear_prefix_cache()
manager.check()
str(manager)
step("books: everything else that they do")
"""

ATTENTION = """
import torch
from pagedkv import PagedKvCache
cache = PagedKvCache(64, 16, 8, 64, dtype="bfloat16")
cache.allocate(1, 40)
q, k = torch.randn(1, 32, 64, dtype=torch.bfloat16), torch.randn(1, 8, 64, dtype=torch.bfloat16)
plan = cache.append_batch([1])
step("")
cache.write(0, k, k, plan)
cache.attend(0, q, plan)
step("decode attention, bfloat16")
"""

MODEL = """
import logging, torch, transformers
from transformers import AutoModelForCausalLM
from pagedkv.models import shipped_model_path
model = AutoModelForCausalLM.from_pretrained(shipped_model_path())
model(torch.tensor([[1, 2, 3]]))
"""
RUNNER = """
from pagedkv.hf import load_runner
model = model.bfloat16()
model(torch.tensor([[1, 2, 3]]))
step("")
load_runner(model, num_blocks=64, mode="compiled")
step(name)
"""

GENERATE = """
from pagedkv.engine import LLM, SamplingParams
step("")
llm = LLM(shipped_model_path(), num_blocks=256)
llm.generate(["def fibonacci(n):"], SamplingParams(max_tokens=8))
step("first LLM.generate")
llm.generate(["import os"], SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=1))
step("first sampled LLM.generate")
"""


def measured(code: str, directory: str) -> dict[str, float]:
    """Run code in a fresh process; return the processor seconds of each step."""
    kept = str(Path(directory, "kernels"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": kept, "PYTHONPATH": directory, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code + END], env=environment, capture_output=True, text=True, check=True
    )
    steps: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    steps.pop("", None)
    return steps


BESIDE, ALL = (
    "a model in bfloat16, compiled mode, beside attention",
    "a model in bfloat16, compiled mode, with attention",
)
TARGETS = {
    "books: README's first example, with the import": 15.0,
    "decode attention, bfloat16": 4.0,
    BESIDE: 10.0,
    "first LLM.generate": 6.0,
}
PARTS = {
    "the books": BOOKS + ALL_BOOKS,
    "attention": BOOKS + ATTENTION,
    "a model": BOOKS + ATTENTION + MODEL + f"name = {BESIDE!r}" + RUNNER,
    "a model alone": BOOKS + MODEL + f"name = {ALL!r}" + RUNNER,
    "the engine": BOOKS + ATTENTION + MODEL + GENERATE,
}
COUNTED = {
    "the books": (),
    "attention": ("decode",),
    "a model": ("a model",),
    "a model alone": ("a model",),
    "the engine": ("first",),
}


def row(name: str, seconds: float, target: float | None) -> Row:
    met = None if target is None else seconds <= target
    return {"name": name, "value": seconds, "unit": "s", "target": target, "met": met, "note": ""}


def rows() -> list[Row]:
    found: list[Row] = []
    for part, code in PARTS.items():
        with tempfile.TemporaryDirectory() as directory:
            shutil.copytree(PACKAGE, Path(directory, "pagedkv"), ignore=shutil.ignore_patterns("__pycache__"))
            cold, warm = (measured(code, directory) for _ in range(2))
        for name, seconds in cold.items():
            if COUNTED[part] and not name.startswith(COUNTED[part]):
                continue
            target = TARGETS.get(name)
            found.append(row(f"{name}: cold", seconds, target))
            found.append(row(f"{name}: warm", warm[name], None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    found = rows()
    for row in found:
        target = "" if row["target"] is None else f"  (target {row['target']:g}, {'met' if row['met'] else 'MISSED'})"
        print(f"{row['name']:58} {row['value']:8.2f} {row['unit']}{target}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
