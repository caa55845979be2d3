"""Write the tables of docs/strategies.md: every strategy over every capacity, as Markdown.

Run from the root of the repository, with traces at hand::

    python scripts/strategy_table.py conversation.jsonl.gz --blocks 1000,2000,5000,10000,20000
    python scripts/strategy_table.py conversation.jsonl.gz --blocks 5000,10000 --part 2/2 --strategies adaptive
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pagedkv.sim.planner import default_strategies
from pagedkv.sim.reading import read_trace
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.sweeps import sweep
from pagedkv.sim.synth import synthesize
from pagedkv.sim.trace import Trace

LRU, OPTIMAL = "lru", "optimal"


def trace_of(name: str, part: str, requests: int, seed: int) -> Trace:
    """Return a trace file, a part of it such as 1/2, or a synthetic trace of a kind such as synth:chat."""
    kind = name.removeprefix("synth:")
    trace = synthesize(kind, requests=requests, seed=seed) if kind != name else read_trace(Path(name))
    number, parts = map(int, part.split("/"))
    length = trace.num_requests // parts
    return trace.slice((number - 1) * length, number * length if number < parts else trace.num_requests)


def cell(result: ReplayResult, lru: ReplayResult, optimum: ReplayResult) -> str:
    """Return the hit ratio, and which share of the gap between LRU and the optimum is closed."""
    gap = optimum.hit_blocks - lru.hit_blocks
    shown = f"{result.hit_ratio:.4f}"
    if gap > 0 and result.strategy not in (LRU, OPTIMAL):
        shown += f" ({(result.hit_blocks - lru.hit_blocks) / gap:+.1%})"
    return shown


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="a trace file, or synth:chat, synth:agents, synth:rag, synth:mixed")
    parser.add_argument("--blocks", default="1000,2000,5000,10000,20000")
    parser.add_argument("--strategies", help="by default all that need no arguments")
    parser.add_argument("--part", default="1/1", help="1/2 is the first half")
    parser.add_argument("--requests", type=int, default=12_000, help="of a synthetic trace")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    trace = trace_of(options.trace, options.part, options.requests, options.seed)
    named = options.strategies.split(",") if options.strategies else [*default_strategies(), OPTIMAL]
    names = list(dict.fromkeys([LRU, *named, OPTIMAL]))
    blocks = [int(number) for number in options.blocks.split(",")]
    found = {(result.strategy, result.blocks): result for result in sweep(trace, names, blocks)}
    print("| strategy | " + " | ".join(f"{number:,}" for number in blocks) + " |")
    print("|---" * (1 + len(blocks)) + "|")
    for name in [*(name for name in names if name != OPTIMAL), OPTIMAL]:
        row = [cell(found[name, number], found[LRU, number], found[OPTIMAL, number]) for number in blocks]
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
