"""The engine against transformers: one by one, a padded batch, and transformers' own continuous batching.

A random Llama of 33.6M parameters, 32 prompts of 16 to 512 tokens of which the longer ones begin with the same 128, 64
new tokens each, greedy. Each way has a process of its own, so that its peak memory is its own; they take turns, and the
engine goes again between all others. What counts is processor time: others may use the machine. Every way must give the
tokens of ``model.generate()`` one by one; where it does not, the table says how many texts are different.

    python benchmarks/engine.py [--rounds N] [--threads 1 2] [--default] [--scan] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine_ways import BYTES_PER_TOKEN, ENGINE, LONGEST, NEW_TOKENS, NUM_PROMPTS, ONE, PADDED, PLAIN, SHARED

WAYS = Path(__file__).with_name("engine_ways.py")
BEST = {"page_size": 16, "num_blocks": 600, "max_batch_tokens": 256}
"""The setting of transformers' continuous batching that took the least time here; --scan tries others."""
SCANNED = (
    *({"page_size": 16, "num_blocks": 900, "max_batch_tokens": tokens} for tokens in (64, 128, 256, 512)),
    *({"page_size": 256, "num_blocks": 60, "max_batch_tokens": tokens} for tokens in (128, 256)),
    {"page_size": 16, "num_blocks": 900, "max_batch_tokens": 256, "allow_block_sharing": False},
)
OWN_BEST, OWN_DEFAULT = "continuous batching, best setting", "continuous batching, default"
TARGETS = {ONE: 4.0, OWN_BEST: 2.2}
BOOKKEEPING = 2.0

Row = dict[str, Any]


# --- taking turns -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs one way whenever it is asked."""

    def __init__(self, name: str, threads: int, settings: dict[str, Any]) -> None:
        command = [sys.executable, str(WAYS), name, str(threads), json.dumps(settings)]
        # Threads that wait should sleep: on a busy machine they would be charged for waiting.
        quiet = os.environ | {"OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)
        self.name = name
        self.runs: list[dict[str, Any]] = []

    def run(self) -> None:
        """Let it run once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended with code {self._process.wait()}")
        self.runs.append(json.loads(line))
        print(f"{self.name}: {self.runs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    @property
    def seconds(self) -> float:
        """Median of the processor time."""
        return statistics.median(run["seconds"] for run in self.runs)

    @property
    def waited(self) -> float:
        """Median of the time by the clock."""
        return statistics.median(run["waited"] for run in self.runs)


def take_turns(names: list[str], threads: int, rounds: int) -> tuple[dict[str, Worker], dict[str, float]]:
    """Run all ways; returns them and how many times the engine's time each took, by its runs right before and after."""
    settings = {OWN_BEST: BEST}
    workers = {name: Worker(name, threads, settings.get(name, {})) for name in (ENGINE, *names)}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    engine = workers[ENGINE]
    try:
        engine.run()
        for _ in range(rounds):
            for name in names:
                workers[name].run()
                engine.run()
                beside = (engine.runs[-2]["seconds"] + engine.runs[-1]["seconds"]) / 2
                ratios[name].append(workers[name].runs[-1]["seconds"] / beside)
    finally:
        for worker in workers.values():
            worker.close()
    return workers, {name: statistics.median(values) for name, values in ratios.items()}


# --- the table --------------------------------------------------------------------------------------------------------


def row(name: str, value: float, unit: str, note: str, target: float | None = None, at_most: bool = False) -> Row:
    """Return one line of the table."""
    met = None if target is None else (value <= target if at_most else value >= target)
    note += "; MISSED in this run" if met is False else ""
    return {"name": name, "value": round(value, 3), "unit": unit, "target": target, "met": met, "note": note}


def kv_note(worker: Worker) -> str:
    """Say how much memory a way takes for K and V."""
    if worker.name in (ENGINE, PLAIN):
        return f", its pool {worker.runs[-1]['facts']['pool'] / 2**20:.0f} MiB"
    tokens = {
        ONE: LONGEST + NEW_TOKENS,
        PADDED: NUM_PROMPTS * (LONGEST + NEW_TOKENS),
        OWN_BEST: BEST["page_size"] * BEST["num_blocks"],
    }.get(worker.name)
    return "" if tokens is None else f", of these K and V {tokens * BYTES_PER_TOKEN / 2**20:.0f} MiB"


def rows_of(threads: int, workers: dict[str, Worker], ratios: dict[str, float]) -> list[Row]:
    """Compare all ways at one number of threads."""
    here = f"{threads} thread" + ("s" if threads > 1 else "")
    expected = workers[ONE].runs[0]["tokens"]
    rows = []
    for name, worker in workers.items():
        different = sum(a != b for a, b in zip(expected, worker.runs[-1]["tokens"], strict=True))
        verdict = "the same tokens" if not different else f"{different} of {NUM_PROMPTS} texts DIFFERENT"
        memory = f"{max(run['growth'] for run in worker.runs) / 2**20:,.0f} MiB above the loaded model at its peak"
        note = f"{worker.waited:.1f} s by the clock, {verdict}, {memory}{kv_note(worker)}"
        rows.append(row(f"{here}: {name}", worker.seconds, "s CPU", note))
    for name, ratio in ratios.items():
        rows.append(row(f"{here}: {name} / pagedkv", ratio, "×", "CPU time", TARGETS.get(name)))
    facts = workers[ENGINE].runs[-1]["facts"]
    note = f"{facts['ms']:.2f} ms a step by the clock; choosing tokens takes another {facts['sampling']:.1f}%"
    rows.append(row(f"{here}: bookkeeping in a step", facts["bookkeeping"], "%", note, BOOKKEEPING, at_most=True))
    if threads == 1:
        rows.append(row("prompt tokens found in the cache", 100 * facts["cached"], "%", f"prefix of {SHARED} tokens"))
    return rows


def scan(threads: int) -> None:
    """Time other settings of transformers' continuous batching."""
    for settings in SCANNED:
        worker = Worker(OWN_BEST, threads, settings)
        worker.run()
        worker.close()
        print(f"{settings}: {worker.seconds:.1f} s CPU")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="turns of each way")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads")
    parser.add_argument("--scan", action="store_true", help="look for transformers' best setting instead")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--default", action="store_true", help="transformers' default setting, too: much memory")
    options = parser.parse_args()
    if options.scan:
        return scan(options.threads[0])
    rows = []
    for number, threads in enumerate(options.threads):
        # The slow ones, of which no target speaks, go with the first number of threads only.
        names = [ONE, OWN_BEST] if number else [PLAIN, ONE, OWN_BEST, PADDED, *[OWN_DEFAULT] * options.default]
        rows += rows_of(threads, *take_turns(names, threads, options.rounds))
    print("| what | measured | target | met | note |\n| --- | ---: | ---: | --- | --- |")
    for line in rows:
        target = "" if line["target"] is None else f"{line['target']:g} {line['unit']}"
        met = {None: "", True: "yes", False: "**no**"}[line["met"]]
        print(f"| {line['name']} | {line['value']:.3g} {line['unit']} | {target} | {met} | {line['note']} |")
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    main()
