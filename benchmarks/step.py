"""Where the time of a forward pass goes in compiled mode: each kind of operation in its turn, and all together.

A step's operations run phase by phase, one call a phase and in their order, so that each finds the caches as the one
before left them; what a call costs by itself is taken off. Each phase counts by its best of some rounds.

    python benchmarks/step.py [--model FOLDER] [--dtype bfloat16] [--weights int8] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pagedkv.data import forward_kernels as kernels
from pagedkv.hf import load_runner
from pagedkv.models import shipped_model_path

STEPS = ((1, 128, 1, 40), (32, 128, 1, 8), (1, 1488, 512, 4))
"""Sequences, tokens before, new tokens of each, rounds."""
NAMES = {
    kernels.EMBED: "embedding",
    kernels.NORM: "norms",
    kernels.LINEAR: "linear layers",
    kernels.HEADS: "rotary positions, writing K and V",
    kernels.ATTEND: "attention",
    kernels.ROUTE: "routing",
    kernels.EXPERTS: "experts",
    kernels.COMBINE: "experts",
    kernels.CAP: "soft-cap of logits",
    kernels.GATHER: "rows whose logits are wanted",
}

Row = dict[str, Any]


def best(call: Callable[[], object], rounds: int) -> float:
    """Return the least milliseconds of some calls."""
    least = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least * 1e3


def name_of(operation: Any) -> str:
    """Return what a phase that begins with an operation is called; the head is the product that gives logits."""
    is_head = operation["code"] == kernels.LINEAR and operation["target"] < 0
    return "head" if is_head else NAMES[int(operation["code"])]


def take_apart(runner: Any, sequences: int, context: int, new: int, rounds: int) -> Row:
    """Return the milliseconds of one step, by kind of operation."""
    cache, rng = runner.cache, np.random.default_rng(0)
    ids = list(range(sequences))
    for sequence in ids:
        prompt = rng.integers(10, runner.vocab_size, context)
        cache.allocate(sequence, prompt)
        plan = cache.plan([sequence])
        runner.forward(plan, prompt[-plan.total_tokens :], np.array([0]))
        cache.commit(plan)
    plan = cache.append_batch(ids, [[5] * new] * sequences)
    tokens, wanted = np.full(sequences * new, 5), np.arange(new - 1, sequences * new, new)
    program = runner._compiled._forward._program
    phases = program.phases

    def run(first: int, last: int, rounds: int) -> float:
        program.phases = phases[first : last + 2]  # the last phase is for another pass alone
        return best(lambda: runner.forward(plan, tokens, wanted), rounds)

    count = len(phases) - 2
    whole, call = run(0, count, rounds), run(0, 0, 20)
    least = [float("inf")] * count
    for _ in range(rounds):
        for phase in range(count):
            least[phase] = min(least[phase], run(phase, phase + 1, 1) - call)
    program.phases = phases
    parts: dict[str, float] = {}
    for phase, spent in enumerate(least):
        name = name_of(program.operations[phases[phase]])
        parts[name] = parts.get(name, 0.0) + spent
    for sequence in ids:
        cache.free(sequence)
    shape = {"sequences": sequences, "before": context, "new": new}
    return shape | {"ms": whole, "call_ms": call, "parts_ms": parts}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped_model_path())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", choices=("int8",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    limit = model.config.max_position_embeddings
    runner = load_runner(model, num_blocks=1200, mode="compiled", weights=options.weights, keep_model=False)
    rows = [take_apart(runner, *step) for step in STEPS if step[1] + step[2] <= limit]
    for row in rows:
        print(f"{row['sequences']} x {row['new']} tokens behind {row['before']}: {row['ms']:.2f} ms")
        for name, spent in row["parts_ms"].items():
            print(f"  {name:36}{spent:8.2f}")
        print(f"  {'planning, the call itself':36}{row['call_ms']:8.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
