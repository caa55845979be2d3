"""The control plane: what a step of bookkeeping costs, beside a dict and a deque, and over the size of the pool."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from baseline import DictAndDeque
from rich.progress import track

from pagedkv import BlockManager

BATCH, CONTEXT, BLOCK_SIZE, PROMPT = 256, 512, 16, 32768
VLLM_STEP = "vLLM 0.33 takes 1.4–2.8 ms for the same batch (5.4–10.9 µs per sequence)"


def microseconds(call: Callable[..., object], *arguments: object) -> float:
    """Time one call, in µs."""
    start = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - start) * 1e6


def filled(num_blocks: int) -> BlockManager:
    """Make a manager with a running batch."""
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    for seq_id in range(BATCH):
        manager.allocate(seq_id, CONTEXT)
    return manager


def step_times(rounds: int) -> dict[str, list[float]]:
    """Time steps of ours and of the baseline in turn; every 16th step of each crosses block edges."""
    ours, theirs = filled(100_000), DictAndDeque(100_000, BLOCK_SIZE)
    ids, id_list = np.arange(BATCH), list(range(BATCH))
    for seq_id in id_list:
        theirs.allocate(seq_id, CONTEXT)
    times: dict[str, list[float]] = {"inside": [], "edge": [], "theirs": [], "theirs edge": [], "one": []}
    for step in track(range(rounds), description="steps", transient=True):
        if step % 512 == 0:  # back to where it began, so that tables do not grow without end
            for seq_id in id_list:
                ours.truncate(seq_id, CONTEXT)
                del theirs.tables[seq_id][CONTEXT // BLOCK_SIZE :]
                theirs.num_tokens[seq_id] = CONTEXT
        kind = "edge" if step % BLOCK_SIZE == 0 else "inside"
        times[kind].append(microseconds(ours.append_batch, ids))
        times["theirs edge" if kind == "edge" else "theirs"].append(microseconds(theirs.append_batch, id_list))
    ours.allocate(BATCH, CONTEXT)
    for _ in range(rounds):
        times["one"].append(microseconds(ours.append_batch, [BATCH]))
    return times


def prompt_times(num_blocks: int, rounds: int) -> dict[str, list[float]]:
    """Time a 32,768-token prompt: cold and fully cached allocation, commit and free."""
    times: dict[str, list[float]] = {"cold": [], "cached": [], "commit": [], "free": []}
    rng = np.random.default_rng(0)
    manager = BlockManager(num_blocks, BLOCK_SIZE)
    for i in range(rounds):
        prompt = rng.integers(0, 50_000, PROMPT)
        times["cold"].append(microseconds(manager.allocate, 2 * i, prompt))
        times["commit"].append(microseconds(manager.commit, 2 * i))
        times["free"].append(microseconds(manager.free, 2 * i))
        times["cached"].append(microseconds(manager.allocate, 2 * i + 1, prompt))
        if manager.get_sequence(2 * i + 1).num_cached_tokens != PROMPT - 1:
            raise SystemExit("the prompt was not found cached")
        manager.free(2 * i + 1)
    return {name: values[2:] for name, values in times.items()}


def low(values: list[float]) -> float:
    """Return the lower decile: what the call takes when the machine lets it."""
    return statistics.quantiles(values, n=10)[0]


def row(name: str, value: float, unit: str, target: float | None = None, at_most: bool = True, note: str = "") -> dict:
    """Return one line of the table."""
    met = None if target is None else (value <= target if at_most else value >= target)
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def measure(rounds: int) -> list[dict]:
    """Run everything; returns the lines of the table."""
    steps = step_times(rounds)
    both = steps["inside"] + steps["edge"]
    ratio = statistics.median(steps["theirs"]) / statistics.median(steps["inside"])
    edge_ratio = statistics.median(steps["theirs edge"]) / statistics.median(steps["edge"])
    rows = [
        row("append_batch, 256 sequences, plan included: median", statistics.median(both), "µs", 10, note=VLLM_STEP),
        row("the same: lower decile", low(both), "µs"),
        row("the same, every sequence crosses a block edge: median", statistics.median(steps["edge"]), "µs"),
        row("append_batch, 1 sequence: median", statistics.median(steps["one"]), "µs"),
        row("dict and deque, time over ours", ratio, "×", 8, at_most=False),
        row("dict and deque, time over ours, at block edges", edge_ratio, "×"),
    ]
    for num_blocks in (10_000, 100_000, 1_000_000, 10_000_000):
        manager, ids = filled(max(num_blocks, 20_000)), np.arange(BATCH)
        step = statistics.median(microseconds(manager.append_batch, ids) for _ in range(64))
        prompts = prompt_times(num_blocks, max(8, rounds // 64))
        size = f"pool of {num_blocks:,} blocks"
        rows.append(row(f"{size}: append_batch, 256 sequences", step, "µs"))
        rows.append(row(f"{size}: 32,768-token prompt, cold", statistics.median(prompts["cold"]) / 1e3, "ms"))
        cached = statistics.median(prompts["cached"]) / 1e3
        rows.append(row(f"{size}: 32,768-token prompt, cached", cached, "ms", 1))
        rows.append(row(f"{size}: its commit", statistics.median(prompts["commit"]) / 1e3, "ms"))
        rows.append(row(f"{size}: its free", statistics.median(prompts["free"]) / 1e3, "ms"))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--rounds", type=int, default=1024, help="steps to time")
    options = parser.parse_args()
    rows = measure(options.rounds)
    print("| what | value | target | met |\n| --- | ---: | ---: | --- |")
    for line in rows:
        target = "" if line["target"] is None else f"{line['target']:g} {line['unit']}"
        met = {None: "", True: "yes", False: "**no**"}[line["met"]]
        print(f"| {line['name']} | {line['value']:.3g} {line['unit']} | {target} | {met} |")
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
