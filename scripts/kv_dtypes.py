"""What the dtype of keys and values costs the shipped model: bits per byte of text that it has never seen.

Every window is read through paged blocks of that dtype: all keys and values that a token sees, its own too, are those
that its blocks give back.

    python scripts/kv_dtypes.py [--files N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import select
from held_out import WINDOW, load

from pagedkv.hf import load_runner
from pagedkv.models import shipped_model_path

DTYPES = ("float32", "float16", "bfloat16", "int8", "fp8")
BLOCK_SIZE = 16


def logits_of(runner: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits of every token of a window, float32 [tokens, vocab_size]."""
    runner.cache.allocate(0, len(ids))
    logits: torch.Tensor = runner.forward(runner.cache.plan([0]), np.array(ids), np.arange(len(ids)))
    runner.cache.free(0)
    runner.release(0)
    return logits


def measure(windows: list[list[int]], size: int) -> list[dict[str, Any]]:
    """Return a row for each dtype; all of them read the same windows, side by side."""
    tokenizer, model = load(shipped_model_path())
    blocks = -(-WINDOW // BLOCK_SIZE) + 1
    options = {"num_blocks": blocks, "block_size": BLOCK_SIZE, "prefix_caching": False, "batch_invariant": False}
    runners = {dtype: load_runner(model, kv_dtype=dtype, **options) for dtype in DTYPES}
    rows = {
        dtype: {
            "dtype": dtype,
            "nats": 0.0,
            "error": 0.0,
            "same": 0,
            "bytes_per_token": runner.cache.spec.bytes_per_token,
        }
        for dtype, runner in runners.items()
    }
    tokens = 0
    for window in windows:
        inputs, targets = [tokenizer.bos_token_id, *window[:-1]], torch.tensor(window)
        tokens += len(window)
        exact: torch.Tensor | None = None
        for dtype, runner in runners.items():
            logits = logits_of(runner, inputs)
            exact = logits if exact is None else exact
            row = rows[dtype]
            row["nats"] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            row["error"] += float((logits - exact).norm() / exact.norm()) * len(window)
            row["same"] += int((logits.argmax(1) == exact.argmax(1)).sum())
    for row in rows.values():
        row["bits_per_byte"] = row["nats"] / size / math.log(2.0)
        row["perplexity"] = math.exp(row.pop("nats") / tokens)
        row["error"] /= tokens
        row["same"] /= tokens
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, help="held-out files to read; all of them by default")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    texts = select(held_out=True, tests=False)[: options.files]
    tokenizer, _ = load(shipped_model_path())
    windows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        windows += [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    size = sum(len(text.encode()) for text in texts)
    count = sum(map(len, windows))
    print(f"{len(texts)} files, {size:,} bytes, {count:,} tokens, windows of {WINDOW}\n")
    rows = measure(windows, size)
    print("| K and V in | bytes/token | bits/byte | perplexity | logits off by | same likeliest token |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        figures = f"{row['bits_per_byte']:.4f} | {row['perplexity']:.3f} | {row['error']:.2%} | {row['same']:.2%}"
        print(f"| {row['dtype']} | {row['bytes_per_token']:,} | {figures} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
