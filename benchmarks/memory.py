"""How many slots lie idle: paged blocks against preallocation to the longest sequence, over real lengths.

A sequence of n tokens takes ceil(n / block_size) blocks; what is left over in its last block is wasted. A cache that
reserves the longest length for everyone wastes the rest of every reservation. Sharing of prefixes is left out here: it
only makes the paged side better.

    python benchmarks/memory.py [--traces FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv import KvCacheSpec

BLOCK_SIZES = (8, 16, 32, 64, 128)
TRACES = Path(__file__).parents[2] / "shared" / "traces"
# A model of 8 billion parameters: 32 layers, 8 KV heads of 128, float16.
MODEL = KvCacheSpec(0, 16, 8, 128, num_layers=32)
# Where no trace is at hand: the lognormal fitted to an hour of real chat, longest 128k.
MU, SIGMA, LONGEST, REQUESTS = 8.82, 1.12, 131_072, 12_000

Lengths = npt.NDArray[np.int64]
Row = dict[str, Any]


def read_lengths(path: Path) -> Lengths:
    """Tokens of each request at its end: what came in and what was generated."""
    with gzip.open(path, "rt") as lines:
        requests = [json.loads(line) for line in lines]
    return np.array([request["input_length"] + request["output_length"] for request in requests], np.int64)


def drawn_lengths() -> Lengths:
    lengths: npt.NDArray[np.float64] = np.random.default_rng(0).lognormal(MU, SIGMA, REQUESTS)
    return np.clip(lengths, 1, LONGEST).astype(np.int64)


def all_lengths(folder: Path) -> dict[str, Lengths]:
    paths = sorted(folder.glob("*.jsonl.gz"))
    if paths:
        return {path.name.removesuffix(".jsonl.gz"): read_lengths(path) for path in paths}
    return {f"lognormal(mu={MU}, sigma={SIGMA}), drawn": drawn_lengths()}


def wasted_share(used: Lengths, reserved: Lengths) -> float:
    """Part of the reserved slots that no token ever fills, over all sequences."""
    return 1.0 - float(used.sum()) / float(reserved.sum())


def row(name: str, used: Lengths, reserved: Lengths, longest: int) -> Row:
    idle = float((reserved - used).mean())
    return {
        "name": name,
        "value": round(100 * wasted_share(used, reserved), 3),
        "unit": "% of reserved slots idle",
        "target": None,
        "met": None,
        "note": f"{idle:,.1f} idle slots ({idle * MODEL.bytes_per_token / 2**20:,.1f} MiB) a sequence, "
        f"{longest / reserved.mean():.2f}x the sequences of preallocation in the same memory",
    }


def measure(trace: str, lengths: Lengths) -> list[Row]:
    longest = int(lengths.max())
    paged = [row(f"{trace}: blocks of {size}", lengths, -(-lengths // size) * size, longest) for size in BLOCK_SIZES]
    return [
        *paged,
        row(f"{trace}: preallocated, {longest:,} slots each", lengths, np.full_like(lengths, longest), longest),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Wasted slots, paged and preallocated")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of *.jsonl.gz")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows = []
    for trace, lengths in all_lengths(options.traces).items():
        print(f"\n{trace}: {len(lengths):,} sequences, mean {lengths.mean():,.0f}, longest {lengths.max():,} tokens\n")
        print("| | idle | |\n| --- | ---: | --- |")
        measured = measure(trace, lengths)
        for each in measured:
            print(f"| {each['name']} | {each['value']}% | {each['note']} |")
        rows += measured
    print(f"\nMiB for a model of {MODEL.bytes_per_token // 1024} KiB a token (32 layers, 8 KV heads of 128, float16).")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
