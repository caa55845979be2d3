"""Weights in 8 bits: what they cost in quality, what they save in memory, and how fast they are, beside other dtypes.

Quality is bits a byte of text, over the source of Python's json package or over a file. Speed is that of a random model
whose weights no cache holds, or of the model that was named: decode steps of one text, and the reading of a prompt, by
CPU time on one thread, each the best of several that take turns.

    python benchmarks/weights.py [--model FOLDER] [--text FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pagedkv.hf import ModelRunner, load_runner
from pagedkv.models import shipped_model_path

WINDOW, WINDOWS = 512, 16
PROMPT, STEPS, TURNS = 256, 8, 5
KINDS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8, float32 activations": (torch.float32, "int8"),
    "int8, bfloat16 activations": (torch.bfloat16, "int8"),
}

Row = dict[str, Any]


def random_model() -> Any:
    """Return a model of 140 million weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 32_000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def runner_of(model: Any, kind: str) -> ModelRunner:
    dtype, weights = KINDS[kind]
    return load_runner(model.to(dtype), num_blocks=64, mode="compiled", weights=weights, keep_model=False)


def logits_of(runner: ModelRunner, ids: list[int]) -> Tensor:
    """Return the logits of all tokens of a text and leave it in the cache as sequence 0."""
    runner.cache.allocate(0, len(ids))
    plan = runner.cache.plan([0])
    logits = runner.forward(plan, ids, np.arange(len(ids)))
    runner.cache.commit(plan)
    return logits


def bits_per_byte(runner: ModelRunner, tokenizer: Any, text: str) -> float:
    every = tokenizer(text, add_special_tokens=False)["input_ids"][: WINDOW * WINDOWS]
    bits, num_bytes = 0.0, 0
    for first in range(0, len(every), WINDOW):
        ids = every[first : first + WINDOW]
        loss = torch.nn.functional.cross_entropy(logits_of(runner, ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
        runner.cache.free(0)
        bits += float(loss) / math.log(2)
        num_bytes += len(tokenizer.decode(ids[1:]).encode())
    return bits / num_bytes


def seconds_of(runner: ModelRunner) -> tuple[float, float]:
    """Return the CPU seconds of a decode step and of reading a prompt."""
    ids = np.arange(PROMPT) % runner.vocab_size
    runner.cache.allocate(0, PROMPT)
    plan = runner.cache.plan([0])
    begin = time.thread_time()
    runner.forward(plan, ids, [PROMPT - 1])
    prefill = time.thread_time() - begin
    runner.cache.commit(plan)
    decode = math.inf
    for step in range(STEPS):
        runner.cache.append(0, 1)
        plan = runner.cache.plan([0])
        begin = time.thread_time()
        runner.forward(plan, [step], [0])
        decode = min(decode, time.thread_time() - begin)
        runner.cache.commit(plan)
    runner.cache.free(0)
    return decode, prefill


def weight_bytes(model: Any, kind: str) -> int:
    """Return the bytes of all matrices, tied ones once, and of their scales."""
    dtype, weights = KINDS[kind]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    if weights is None:
        return sum(matrix.numel() for matrix in matrices) * dtype.itemsize
    return sum(matrix.numel() + 4 * len(matrix) for matrix in matrices)


def row(name: str, value: float, unit: str, note: str = "") -> Row:
    return {"name": name, "value": value, "unit": unit, "target": None, "met": None, "note": note}


def quality_rows(folder: Path, text: str) -> list[Row]:
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    exact = 0.0
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        bits = bits_per_byte(runner_of(model, kind), tokenizer, text)
        exact = exact or bits
        found.append(row(f"{kind}: quality", bits, "bits a byte", f"{100 * (bits / exact - 1):+.2f}% beside float32"))
    return found


def speed_rows(folder: Path | None) -> list[Row]:
    def model() -> Any:
        return random_model() if folder is None else AutoModelForCausalLM.from_pretrained(folder)

    runners, sizes = {}, {}
    for kind in KINDS:
        one = model()
        sizes[kind] = weight_bytes(one, kind)  # before the runner takes them
        runners[kind] = runner_of(one, kind)
    turns: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind, runner in runners.items():
            turns[kind].append(seconds_of(runner))
    found = []
    for kind, size in sizes.items():
        decode, prefill = (min(each) for each in zip(*turns[kind], strict=True))
        found.append(row(f"{kind}: weights", size / 1e6, "MB"))
        found.append(row(f"{kind}: decode step", 1e3 * decode, "ms", f"{size / decode / 1e9:.1f} GB/s of weights"))
        found.append(row(f"{kind}: prompt", PROMPT / prefill, "tokens/s", f"{PROMPT} tokens"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; else the shipped model, and speed of a random one")
    parser.add_argument("--text", type=Path, help="what quality is measured on")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = [arguments.text] if arguments.text else sorted(Path(json.__file__).parent.glob("*.py"))
    text = "".join(path.read_text() for path in paths)
    found = quality_rows(arguments.model or shipped_model_path(), text) + speed_rows(arguments.model)
    for each in found:
        print(f"{each['name']:44} {each['value']:10.4g} {each['unit']:12} {each['note']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
