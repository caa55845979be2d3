"""paged_attention on the CPU against torch's fused attention and against the memory itself.

All ways take turns, round by round, and what is reported is the median over the rounds of the ratio inside a round: on
a machine that others use as well, nothing else says anything. The pool is larger than the caches.

    python benchmarks/attention.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pagedkv import paged_attention
from pagedkv.data.huge_pages import huge_pages
from pagedkv.data.quantised import dequantised, quantised
from pagedkv.data.simd import LANES, add, fetch_add, load, store, zeros
from pagedkv.data.team import num_threads, run_in_threads
from pagedkv.jit import compiled

BLOCK_SIZE, KV_HEADS, GROUP, HEAD_DIM = 16, 8, 4, 128
BATCH, CONTEXT = 16, 1024
PROMPT, LONG = 2048, 32_768
SHARING, PREFIX = 32, 512
BANDWIDTH_BYTES = 1 << 28
CHUNK = 1 << 18
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WAYS = {
    "by head": "SDPA",
    "by group": "SDPA, the heads of a group passed as queries",
    "gather": "gather + SDPA",
}
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SDPA_TARGETS = {"bfloat16": 6.0, "float16": 8.0, "float32": 1.8}

Row = dict[str, Any]
Way = Callable[[], Any]


class Batch:
    """Sequences of one length whose blocks are scattered over a pool, and the same keys and values in one piece."""

    def __init__(self, num_sequences: int, length: int, q_len: int, dtype: torch.dtype) -> None:
        num_blocks = num_sequences * length // BLOCK_SIZE
        rng = np.random.default_rng(0)
        self.pool = torch.empty(2, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype).normal_()
        self.keys, self.values = self.pool
        self.tables = rng.permutation(num_blocks).astype(np.int32).reshape(num_sequences, -1)
        self.queries = torch.empty(num_sequences * q_len, KV_HEADS * GROUP, HEAD_DIM, dtype=dtype).normal_()
        self.shape = (num_sequences, length, KV_HEADS, HEAD_DIM)
        self.arguments = {
            "block_tables": self.tables,
            "seq_lens": np.full(num_sequences, length, np.int32),
            "cu_seqlens_q": np.arange(num_sequences + 1, dtype=np.int32) * np.int32(q_len),
            "scale": HEAD_DIM**-0.5,
        }
        self.contiguous = [side.contiguous() for side in self.gather()]

    @property
    def num_bytes(self) -> int:
        return self.pool.numel() * self.pool.element_size()

    def gather(self) -> list[torch.Tensor]:
        """Return keys and values ``[n, heads, length, head_dim]``, copied out of the pool."""
        blocks = torch.from_numpy(self.tables).flatten()
        return [side.index_select(0, blocks).view(self.shape).transpose(1, 2) for side in self.pool]

    def paged(self) -> torch.Tensor:
        return paged_attention(self.queries, self.keys, self.values, **self.arguments)

    def decode_by_group(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One query a sequence, its heads of a group disguised as queries: torch reads a key once for all of them."""
        queries = self.queries.view(self.shape[0], KV_HEADS, GROUP, HEAD_DIM)
        return scaled_dot_product_attention(queries, keys, values).view_as(self.queries)

    def decode_by_head(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One query a sequence, as a model calls it."""
        return scaled_dot_product_attention(self.queries[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    def prefill(self) -> torch.Tensor:
        queries = self.queries.transpose(0, 1)[None]
        result = scaled_dot_product_attention(queries, *self.contiguous, is_causal=True, enable_gqa=True)
        return result[0].transpose(0, 1)


@compiled
def _sum_chunks(counter: Any, numbers: Any, sums: Any) -> None:
    """Sum chunks until none is left; four sums of sixteen lanes keep up with the memory."""
    while True:
        chunk = fetch_add(counter, 0, 1)
        if chunk >= len(numbers) // CHUNK:
            return
        a, b, c, d = zeros(), zeros(), zeros(), zeros()
        for i in range(chunk * CHUNK, (chunk + 1) * CHUNK, 4 * LANES):
            a, b = add(a, load(numbers, i)), add(b, load(numbers, i + LANES))
            c, d = add(c, load(numbers, i + 2 * LANES)), add(d, load(numbers, i + 3 * LANES))
        total = np.empty(LANES, np.float32)
        store(total, 0, add(add(a, b), add(c, d)))
        sums[chunk] = total.sum()


def reader() -> Way:
    """Return a function that reads memory that was written before, in the threads that the kernels use."""
    # Drawn at random: pages that are all alike may be one and the same page, and lie in a cache.
    numbers = huge_pages(BANDWIDTH_BYTES).view(np.float32)
    numbers[:] = torch.rand(len(numbers)).numpy()
    sums = np.zeros(len(numbers) // CHUNK, np.float32)

    def read() -> None:
        run_in_threads(_sum_chunks, (np.zeros(1, np.int64), numbers, sums), num_threads())

    read()
    if not np.isclose(sums.sum(dtype=np.float64), numbers.sum(dtype=np.float64), rtol=1e-4):
        raise SystemExit("the sum that measures the bandwidth is wrong")
    return read


def take_turns(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def row(name: str, value: float, target: float | None, note: str, unit: str = "×") -> Row:
    met = None if target is None else value >= target
    if met is False:
        note += "; MISSED in this run"
    return {"name": name, "value": round(value, 2), "unit": unit, "target": target, "met": met, "note": note}


def decode_rows(read: Way, rounds: int) -> list[Row]:
    rows = []
    for name, dtype in DTYPES.items():
        batch = Batch(BATCH, CONTEXT, 1, dtype)
        ways = {
            "paged": batch.paged,
            "by head": lambda batch=batch: batch.decode_by_head(*batch.contiguous),
            "by group": lambda batch=batch: batch.decode_by_group(*batch.contiguous),
            "gather": lambda batch=batch: batch.decode_by_head(*batch.gather()),
            "read": read,
        }
        require_equal(batch.paged(), batch.decode_by_group(*batch.contiguous))
        seconds = take_turns(ways, rounds)
        here = f"{BATCH} × {CONTEXT} tokens, {KV_HEADS * GROUP}/{KV_HEADS} heads of {HEAD_DIM}"
        times = ", ".join(f"{way} {statistics.median(seconds[way]) * 1e3:.1f} ms" for way in ways if way != "read")
        targets = {"by head": SDPA_TARGETS[name], "gather": 12.0 if name == "bfloat16" else None}
        for way, words in WAYS.items():
            gain = ratio(seconds[way], seconds["paged"])
            rows.append(row(f"decode {name} / {words}", gain, targets.get(way), f"{here}: {times}"))
        speed = batch.num_bytes / BANDWIDTH_BYTES * ratio(seconds["read"], seconds["paged"]) * 100
        gigabytes = BANDWIDTH_BYTES / statistics.median(seconds["read"]) / 1e9
        note = f"of {gigabytes:.0f} GB/s, a sum over 256 MB in the same threads"
        rows.append(row(f"decode {name}, read bandwidth", speed, 75.0, note, "%"))
    return rows


class QuantisedBatch:
    """The keys and values of a batch in int8 or fp8, with their scales."""

    def __init__(self, batch: Batch, dtype: torch.dtype) -> None:
        self._batch = batch
        self.sides = [quantised("pool", side.flatten(0, 1), dtype) for side in batch.pool]
        self.num_bytes = sum(part.nbytes for side in self.sides for part in side)
        self._pool = [numbers.view(side.shape) for (numbers, _), side in zip(self.sides, batch.pool, strict=True)]
        self._scales = dict(
            zip(
                ("key_scales", "value_scales"),
                (scales.view(batch.pool.shape[1:4]) for _, scales in self.sides),
                strict=True,
            )
        )

    def paged(self) -> torch.Tensor:
        return paged_attention(self._batch.queries, *self._pool, **self._scales, **self._batch.arguments)

    def dequantised(self) -> torch.Tensor:
        """Return what attention over the same numbers in float32 gives."""
        pool = [dequantised(*side).view(self._batch.keys.shape) for side in self.sides]
        return paged_attention(self._batch.queries, *pool, **self._batch.arguments)


def quantised_rows(read: Way, rounds: int) -> list[Row]:
    """All dtypes take turns over the same shape; queries are bfloat16 for the quantised ones."""
    batches: dict[str, Any] = {name: Batch(BATCH, CONTEXT, 1, dtype) for name, dtype in DTYPES.items()}
    for name, dtype in QUANTISED.items():
        batches[name] = QuantisedBatch(batches["bfloat16"], dtype)
        require_equal(batches[name].paged(), batches[name].dequantised())
    seconds = take_turns({"read": read} | {name: batch.paged for name, batch in batches.items()}, rounds)
    rows = []
    for name in QUANTISED:
        size = batches[name].num_bytes
        time_of = f"{statistics.median(seconds[name]) * 1e3:.1f} ms"
        for other in DTYPES:
            note = f"{time_of}; {size / batches[other].num_bytes:.0%} of its bytes, scales included"
            rows.append(row(f"decode {name} / {other}", ratio(seconds[other], seconds[name]), None, note))
        speed = size / BANDWIDTH_BYTES * ratio(seconds["read"], seconds[name]) * 100
        gigabytes = size / statistics.median(seconds[name]) / 1e9
        rows.append(row(f"decode {name}, read bandwidth", speed, None, f"{gigabytes:.1f} GB/s", "%"))
    return rows


def prefill_rows(rounds: int) -> list[Row]:
    rows = []
    flops = 2 * KV_HEADS * GROUP * HEAD_DIM * PROMPT**2  # of a causal prompt: half of all products
    for name, dtype in DTYPES.items():
        batch = Batch(1, PROMPT, PROMPT, dtype)
        require_equal(batch.paged(), batch.prefill())
        seconds = take_turns({"paged": batch.paged, "sdpa": batch.prefill}, rounds)
        time_of = statistics.median(seconds["paged"])
        note = f"{PROMPT} tokens; {time_of * 1e3:.0f} ms"
        rows.append(row(f"prefill {name} / SDPA", ratio(seconds["sdpa"], seconds["paged"]), 0.95, note))
        speed = flops / time_of / 1e9
        rows.append(row(f"prefill {name}", speed, None, f"{num_threads()} threads", "GFLOP/s"))
    return rows


def shared_rows(rounds: int) -> list[Row]:
    """Texts that begin with the same blocks, against the same texts in blocks of their own."""
    rng, blocks = np.random.default_rng(0), PREFIX // BLOCK_SIZE
    own = rng.integers(48, 113, SHARING)
    width = blocks + -(-int(own.max()) // BLOCK_SIZE)
    order = rng.permutation(blocks + SHARING * width).astype(np.int32)
    shared, apart = order[:blocks], order[blocks:].reshape(SHARING, width)
    lengths = {
        "seq_lens": (PREFIX + own).astype(np.int32),
        "cu_seqlens_q": np.arange(SHARING + 1, dtype=np.int32),
    }
    tables = apart.copy()
    tables[:, :blocks] = shared
    rows = []
    for name, dtype in DTYPES.items():
        pool = torch.empty(2, len(order), BLOCK_SIZE, KV_HEADS, HEAD_DIM).normal_().to(dtype)
        pool[:, apart[:, :blocks].astype(np.int64)] = pool[:, None, shared.astype(np.int64)]
        queries = torch.empty(SHARING, KV_HEADS * GROUP, HEAD_DIM).normal_().to(dtype)

        def attend(tables: Any, pool: torch.Tensor = pool, queries: torch.Tensor = queries) -> torch.Tensor:
            return paged_attention(queries, *pool, block_tables=tables, **lengths, scale=HEAD_DIM**-0.5)

        if not attend(tables).equal(attend(apart)):
            raise SystemExit("a prefix that is read once changes the results")
        seconds = take_turns({"shared": lambda: attend(tables), "apart": lambda: attend(apart)}, rounds)
        note = (
            f"{SHARING} texts behind {PREFIX} tokens; {statistics.median(seconds['shared']) * 1e3:.1f} ms, bits equal"
        )
        rows.append(row(f"decode {name}, common prefix", ratio(seconds["apart"], seconds["shared"]), None, note))
    return rows


def long_row(rounds: int) -> Row:
    batch = Batch(1, LONG, 1, torch.bfloat16)
    threads = num_threads()

    def alone() -> None:
        torch.set_num_threads(1)
        try:
            batch.paged()
        finally:
            torch.set_num_threads(threads)

    seconds = take_turns({"one": alone, "all": batch.paged}, rounds)
    value = ratio(seconds["one"], seconds["all"])
    note = f"one sequence of {LONG} tokens, bfloat16, {threads} threads over 1"
    return row("long decode, threads", value, 1.7 if threads > 1 else None, note)


def require_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if not torch.allclose(ours.float(), theirs.float(), atol=2e-2):
        raise SystemExit("the results differ: nothing to compare")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each decode comparison")
    parser.add_argument("--quantised", action="store_true", help="measure int8 and fp8 alone")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    read = reader()
    rows = quantised_rows(read, options.rounds)
    if not options.quantised:
        rows = [
            *decode_rows(read, options.rounds),
            *rows,
            long_row(2 * options.rounds),
            *prefill_rows(max(3, options.rounds // 2)),
            *shared_rows(options.rounds),
        ]
    print("| what | value | target | met | note |\n| --- | --- | --- | --- | --- |")
    for line in rows:
        met = {None: "", True: "yes", False: "no"}[line["met"]]
        target = "" if line["target"] is None else f"{line['target']} {line['unit']}"
        print(f"| {line['name']} | {line['value']} {line['unit']} | {target} | {met} | {line['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
