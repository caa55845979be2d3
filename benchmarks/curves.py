"""What a whole LRU curve, a sample of it and the optimum cost: seconds, error and memory.

A curve has the hits of every capacity. Beside it stand what one would write in Python: the textbook's pass with a tree
over all accesses, and an OrderedDict that replays one single capacity. The two sides take turns within one run.

    python benchmarks/curves.py [--traces FOLDER] [--accesses MILLIONS] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from pagedkv.sim.curves import HitCurve, lru_curve, shards_curve
from pagedkv.sim.optimum import optimal, optimal_curve
from pagedkv.sim.reading import read_trace
from pagedkv.sim.trace import Trace

TRACES = Path(__file__).parents[2] / "shared" / "traces"
ROUNDS = 3
BLOCKS = 10_000
SEEDS = 20
TARGET_SECONDS = 1.0
TARGET_BYTES = 128

Row = dict[str, Any]


# --- the plain Python side -------------------------------------------------------------------------------------------


def python_curve(trace: Trace) -> list[int]:
    """Hits at every capacity from 1, by Mattson's pass: a Fenwick tree marks the last use of every block."""
    size = trace.num_accesses
    tree = [0] * (size + 1)
    last: dict[int, int] = {}
    gains = [0] * (trace.num_distinct + 1)
    ids, offsets = trace.ids.tolist(), trace.offsets.tolist()
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        for i in range(start, stop):
            if ids[i] in last:
                above, place = len(last), last[ids[i]] - 1
                while place > 0:
                    above -= tree[place]
                    place &= place - 1
                gains[above] += 1
        for i in range(start, stop):
            time_of_use = start + stop - i  # the head of a request is its most recent block
            for place, change in ((last.get(ids[i], size + 1), -1), (time_of_use, 1)):
                while place <= size:
                    tree[place] += change
                    place += place & -place
            last[ids[i]] = time_of_use
    return np.cumsum(gains).tolist()


def python_replay(trace: Trace, blocks: int) -> int:
    """Hits at one capacity."""
    cache: OrderedDict[int, None] = OrderedDict()
    ids, offsets = trace.ids.tolist(), trace.offsets.tolist()
    hits = 0
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        request = ids[start:stop]
        for block in request:
            if block not in cache:
                break
            hits += 1
        for block in reversed(request):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks:
            cache.popitem(last=False)
    return hits


# --- traces ----------------------------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _chats(accesses: int, seed: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Draw chats that take turns: each request repeats what its chat holds and adds some blocks."""
    np.random.seed(seed)
    open_chats, longest = 20_000, 64
    chats = np.zeros((open_chats, longest), np.int32)
    lengths = np.zeros(open_chats, np.int64)
    ids = np.empty(accesses + longest, np.int32)
    offsets = np.empty(accesses + 1, np.int64)  # pages that stay untouched take no memory
    offsets[0] = 0
    parents = np.empty(accesses + longest, np.int32)
    requests, filled, fresh = 0, 0, 0
    while filled < accesses:
        chat = int(open_chats * np.random.random() ** 2)
        grown = np.random.randint(1, 9)
        if lengths[chat] + grown > longest:
            lengths[chat] = 0
        for _ in range(grown):
            length = lengths[chat]
            parents[fresh] = chats[chat, length - 1] if length > 0 else -1
            chats[chat, length] = fresh
            fresh += 1
            lengths[chat] += 1
        for depth in range(lengths[chat]):
            ids[filled] = chats[chat, depth]
            filled += 1
        requests += 1
        offsets[requests] = filled
    return ids[:filled], offsets[: requests + 1], parents[:fresh]


def synthetic(accesses: int) -> Trace:
    ids, offsets, parents = _chats(accesses, 0)
    count = len(offsets) - 1
    sessions = np.zeros(count, np.int64)
    tokens = np.diff(offsets) * 16
    return Trace("chats", "synthetic", 16, np.arange(count) * 1.0, tokens, sessions, sessions, offsets, ids, parents)


# --- measuring -------------------------------------------------------------------------------------------------------


def seconds_of(*sides: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """The least seconds of each side, which take turns."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        for place, side in enumerate(sides):
            begin = time.perf_counter()
            side()
            best[place] = min(best[place], time.perf_counter() - begin)
    return best


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The memory that this process has now."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else peak_bytes()


def row(name: str, value: float, unit: str, note: str, target: float | None = None) -> Row:
    met = None if target is None else value <= target
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def measure_curve(trace: Trace) -> list[Row]:
    curve = lru_curve(trace)
    hits = np.array(python_curve(trace))
    if not np.array_equal(hits[curve.blocks], curve.hit_blocks):
        raise RuntimeError(f"{trace.name}: the two curves differ")
    ours, textbook, replayed = seconds_of(
        lambda: lru_curve(trace), lambda: python_curve(trace), lambda: python_replay(trace, BLOCKS)
    )
    note = (
        f"{trace.num_accesses:,} accesses; the same curve in plain Python {textbook:.2f} s ({textbook / ours:,.0f}x), "
        f"one capacity by OrderedDict {replayed:.2f} s ({replayed / ours:,.0f}x)"
    )
    return [row(f"{trace.name}: exact LRU curve, every capacity", ours, "s", note, TARGET_SECONDS)]


def mean_errors(trace: Trace, exact: HitCurve, **sample: Any) -> npt.NDArray[np.float64]:
    capacities = np.unique(np.geomspace(1, exact.blocks[-1], 200).astype(np.int64))
    truth = exact.at(capacities)
    samples = [shards_curve(trace, seed=seed, **sample) for seed in range(SEEDS)]
    return np.array([np.abs(each.at(capacities) - truth).mean() for each in samples])


def measure_samples(trace: Trace) -> list[Row]:
    exact = lru_curve(trace)
    rows = []
    for name, sample in (("10% of the blocks", {"rate": 0.1}), ("8,192 blocks", {"max_blocks": 8192})):
        errors = mean_errors(trace, exact, **sample)
        note = f"of the hit ratio over 200 log-spaced capacities, mean of {SEEDS} samples; worst {errors.max():.4f}"
        rows.append(row(f"{trace.name}: SHARDS, {name}", float(errors.mean()), "mean absolute error", note))
    return rows


def measure_optimum(trace: Trace) -> list[Row]:
    capacities = np.geomspace(100, trace.num_distinct, 100).astype(np.int64).tolist()
    one, many = seconds_of(lambda: optimal(trace, BLOCKS), lambda: optimal_curve(trace, capacities))
    best, lru = optimal(trace, BLOCKS).hit_ratio, lru_curve(trace).at(BLOCKS)
    note = f"hit ratio {best:.4f}, LRU {lru:.4f}; a curve of 100 capacities {many:.3f} s"
    return [row(f"{trace.name}: optimum at {BLOCKS:,} blocks", one, "s", note)]


def measure_large(millions: float) -> list[Row]:
    trace = synthetic(int(millions * 1e6))
    name = f"synthetic chats, {trace.num_accesses:,} accesses"
    before = resident_bytes()
    (exact,) = seconds_of(lambda: lru_curve(trace), rounds=1)
    each = (peak_bytes() - before) / trace.num_distinct
    (sampled,) = seconds_of(lambda: shards_curve(trace, 0.001), rounds=1)
    note = f"{trace.num_requests:,} requests, {trace.num_distinct:,} distinct blocks; SHARDS of 0.1% {sampled:.2f} s"
    memory = (
        f"beside the trace, which takes {before / 2**20:,.0f} MiB with all else; peak {peak_bytes() / 2**20:,.0f} MiB"
    )
    return [
        row(f"{name}: exact LRU curve", exact, "s", note),
        row(f"{name}: memory of the curve", each, "bytes per distinct block", memory, TARGET_BYTES),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="LRU curves, samples of them and the optimum")
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of *.jsonl.gz")
    parser.add_argument("--accesses", type=float, default=20, help="of the synthetic trace, in millions")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    lru_curve(synthetic(1000))  # compiles
    rows = measure_large(options.accesses)
    for path in sorted(options.traces.glob("*.jsonl.gz")):
        trace = read_trace(path)
        rows += measure_curve(trace) + measure_samples(trace) + measure_optimum(trace)
    for each in rows:
        print(f"{each['name']}: {each['value']:.4g} {each['unit']} ({each['note']})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
