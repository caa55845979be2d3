"""The Triton kernels on a CUDA device: first checked against the reference, then timed beside others.

Bandwidths and rates are told as fractions of a device-to-device copy and of a matrix product measured in the same run.
Every way turns through inputs that are together larger than the L2 cache; times are medians of CUDA events, taken while
the device still sleeps when the host is done: what the host takes for a call stands beside them.

    python benchmarks/gpu.py [--quick] [--json FILE]

Without a CUDA device it says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_batch import DTYPE, GROUP, HEAD_DIM, KV_HEADS, Batch, Way, ways_of

from pagedkv import KvCacheSpec, KvStorage, paged_attention

DECODE = [(1, 4096), (1, 65536), (8, 4096), (32, 1024), (32, 4096), (32, 16384), (128, 4096), (256, 1024)]
PREFILL = [(1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048), (4, 512, 8192), (1, 8192, 32768)]
QUICK_DECODE, QUICK_PREFILL = [(32, 4096)], [(1, 8192, 8192)]
REPEATS, WARM = 20, 3
SLEEP_CYCLES = 4_000_000
"""About 2 ms: longer than the host takes for any call here."""
TURNED_BYTES = 1 << 29
CHECKED = [(5, 1, 3000), (3, 3, 700), (2, 300, 1500), (2, 600, 600)]
STORED_AS = {torch.float32: "int8", torch.bfloat16: "bfloat16", torch.float16: "fp8"}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Row = dict[str, Any]


# --- checking ----------------------------------------------------------------------------------------------------


def check() -> int:
    """Compare every kernel with the reference; return how many comparisons were made.

    Most of the time is the compiler's, so processes share the work.
    """
    cases = [(dtype, layout, shape) for shape in CHECKED for dtype in TOLERANCE for layout in ("NHD", "HND")]
    with ProcessPoolExecutor(min(len(cases), os.cpu_count() or 1), get_context("spawn")) as pool:
        return sum(pool.map(check_case, cases))


def check_case(case: tuple[torch.dtype, str, tuple[int, int, int]], device: str = "cuda") -> int:
    """Compare attention of one dtype, layout and shape with the reference, and at the first shape the storage."""
    dtype, layout, shape = case
    variants: list[Row] = [{}, {"window": 33}, {"softcap": 20.0}, {"sinks": True}, {"causal": False}]
    batch = Batch(*shape, device, dtype, layout)
    for variant in variants:
        options = {**batch.options, **variant}
        if "sinks" in variant:
            options["sinks"] = torch.randn(KV_HEADS * GROUP, device=device)
        inputs = batch.queries, batch.keys, batch.values
        compare(inputs, options, "triton", TOLERANCE[dtype], f"{dtype} {layout} {shape} {variant}")
    if shape != CHECKED[0]:
        return len(variants)
    check_storage(device, "triton", STORED_AS[dtype], layout)
    return len(variants) + 1


def compare(inputs: Any, options: Row, backend: str, tolerance: float, what: str) -> None:
    result = paged_attention(*inputs, **options, backend=backend)
    exact = (x.float() if x.is_floating_point() else x for x in inputs)
    expected = paged_attention(*exact, **options, backend="reference")
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def check_storage(device: str, backend: str, kv_dtype: str, layout: str) -> None:
    """Write, copy and read back: the same as torch's own operations."""
    spec = KvCacheSpec(9, 16, KV_HEADS, HEAD_DIM, dtype=kv_dtype, layout=layout)
    ours, theirs = (KvStorage(spec, device, backend=kind) for kind in (backend, "torch"))
    keys, values = (torch.randn(100, KV_HEADS, HEAD_DIM, device=device) for _ in range(2))
    slots = np.random.default_rng(0).permutation(144)[:100]
    for storage in (ours, theirs):
        storage.write(
            0, torch.zeros(144, KV_HEADS, HEAD_DIM, device=device), keys.new_zeros(144, 8, 128), np.arange(144)
        )
        storage.write(0, keys, values, slots)
        storage.copy_blocks(np.array([[0, 1], [1, 2], [4, 7]]))
    for mine, other in zip(ours.gather(0, np.arange(144)), theirs.gather(0, np.arange(144)), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


# --- timing ------------------------------------------------------------------------------------------------------


def seconds(ways: list[Way]) -> tuple[float, float]:
    """Return the median times of a call, the device's and the host's; calls take turns, each over inputs of its own."""
    for _ in range(WARM):
        for way in ways:
            way()
    device, host = [], []
    for i in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        called = time.perf_counter()
        ways[i % len(ways)]()
        host.append(time.perf_counter() - called)
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end) / 1e3)
    return statistics.median(device), statistics.median(host)


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)])[0]


def matmul_rate() -> float:
    """Return operations per second of a large product in DTYPE."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / seconds([lambda: one @ other])[0]


def measure(kind: str, shapes: list[tuple[int, int, int]], unit: float) -> list[Row]:
    rows = []
    for count, q_len, length in shapes:
        first = Batch(count, q_len, length, "cuda")
        copies = max(1, min(8, -(-TURNED_BYTES // first.key_bytes)))
        batches = [first, *(Batch(count, q_len, length, "cuda") for _ in range(copies - 1))]
        work = first.key_bytes if kind == "decode" else first.flops
        expected = first.ours("triton")
        for name in ways_of(first):
            row: Row = {"kind": kind, "batch": count, "queries": q_len, "context": length, "way": name}
            try:
                ways = [ways_of(batch)[name]() for batch in batches]
                torch.testing.assert_close(ways[0](), expected, rtol=3e-2, atol=3e-2)
                row["seconds"], row["host_seconds"] = seconds(ways)
                row["fraction"] = work / row["seconds"] / unit
            except Exception as error:  # another project's failure must not end the table
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            ways = []
            rows.append(row)
            print(line_of(row), flush=True)
        del batches, first
        torch.cuda.empty_cache()
    return rows


def line_of(row: Row) -> str:
    where = f"{row['kind']:8}{row['batch']:5}{row['queries']:7}{row['context']:8}  {row['way']:28}"
    if "error" in row:
        return f"{where}{row['error']}"
    return f"{where}{row['seconds'] * 1e6:12.1f} µs {row['fraction']:8.1%} {row['host_seconds'] * 1e6:9.0f} µs"


# --- the engine --------------------------------------------------------------------------------------------------


def engine_rate(cuda_graphs: bool, device: str = "cuda", prompts: int = 64, new_tokens: int = 128) -> Row:
    """Return new tokens per second of the engine with the shipped model, over prompts of 64 tokens.

    All of it is done three times and timed the last: kernels are compiled and graphs are recorded by then.
    """
    from transformers import AutoModelForCausalLM

    from pagedkv.engine import LLM, SamplingParams
    from pagedkv.models import shipped_model_path

    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.bfloat16).to(device).eval()
    llm = LLM(model, str(shipped_model_path()), cuda_graphs=cuda_graphs)
    texts = [np.random.default_rng(i).integers(10, 200, 64).tolist() for i in range(prompts)]
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for _ in range(3):
        llm.core.clear_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(texts, params)  # whose last tokens the host has seen
        seconds_taken = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"graphs": llm.core.runner.num_recordings, "tokens_per_second": tokens / seconds_taken}


def line_of_engine(row: Row) -> str:
    graphs = f"with {row['graphs']} CUDA graphs" if row["graphs"] else "without CUDA graphs"
    return f"engine, shipped model, {graphs}: {row['tokens_per_second']:.0f} tokens/s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each kind")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: torch finds no CUDA device here; nothing was checked and nothing was measured")
        return 0
    import triton

    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}")
    print(f"{check()} comparisons with the reference: all equal within tolerance")
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    print(f"copy {bandwidth / 1e9:.0f} GB/s, {DTYPE} product {rate / 1e12:.0f} TFLOP/s")
    print("kind    batch queries context  way                                 time  of copy or product, host")
    decode = [(count, 1, length) for count, length in (QUICK_DECODE if options.quick else DECODE)]
    rows = measure("decode", decode, bandwidth)
    rows += measure("prefill", QUICK_PREFILL if options.quick else PREFILL, rate)
    engine = []
    for cuda_graphs in (False, True):
        engine.append(engine_rate(cuda_graphs))
        print(line_of_engine(engine[-1]), flush=True)
    if not engine[1]["graphs"]:
        print("the model could not be recorded: the last line is no figure of CUDA graphs")
    if options.json:
        facts = {"device": name, "copy_bytes_per_second": bandwidth, "matmul_flops": rate, "engine": engine}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
