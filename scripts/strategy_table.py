"""Write the tables of docs/strategies.md: every strategy over every capacity, as Markdown.

Run from the root of the repository, with traces at hand::

    python scripts/strategy_table.py conversation.jsonl.gz --blocks 1000,2000,5000,10000,20000
    python scripts/strategy_table.py conversation.jsonl.gz --blocks 5000,10000 --part 2/2 --strategies adaptive
    python scripts/strategy_table.py agents.jsonl.gz+synth:chat --blocks 88% --strategies adaptive
    python scripts/strategy_table.py agents.jsonl.gz --split 8 --blocks 8000 --strategies adaptive
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from pagedkv.sim.planner import default_strategies
from pagedkv.sim.reading import read_trace
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.sweeps import parse_capacities, sweep
from pagedkv.sim.synth import synthesize
from pagedkv.sim.trace import NO_PARENT, Trace

LRU, OPTIMAL = "lru", "optimal"


def mixed(first: Trace, second: Trace) -> Trace:
    """Return the requests of two traces in the order of their times, the second stretched to the span of the first."""
    times = np.concatenate([first.times, second.times * (first.times[-1] / second.times[-1])])
    order = np.argsort(times, kind="stable")
    requests = [(trace, base) for trace, base in ((first, 0), (second, first.num_distinct)) for _ in trace.times]
    chains = []
    for place in order.tolist():
        trace, base = requests[place]
        own = place - (first.num_requests if trace is second else 0)
        chains.append(trace.ids[trace.offsets[own] : trace.offsets[own + 1]] + np.int32(base))
    parents = np.where(second.parents == NO_PARENT, NO_PARENT, second.parents + np.int32(first.num_distinct))
    both = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])[order]
        for name in ("input_tokens", "output_tokens", "sessions")
    }
    merged = replace(
        first,
        name=f"{first.name} + {second.name}",
        times=times[order],
        offsets=np.concatenate([[0], np.cumsum([len(chain) for chain in chains])]),
        ids=np.concatenate(chains),
        parents=np.concatenate([first.parents, parents.astype(np.int32)]),
        **both,
    )
    return merged.slice(0, merged.num_requests)  # ids in the order of their first appearance


def split(trace: Trace, parts: int) -> Trace:
    """Return the trace with every block cut into so many smaller ones."""
    places = np.arange(parts)
    ids = (trace.ids[:, None].astype(np.int64) * parts + places).ravel()
    last_of_parent = np.where(trace.parents == NO_PARENT, NO_PARENT, (trace.parents.astype(np.int64) + 1) * parts - 1)
    before = np.arange(trace.num_distinct)[:, None] * parts + places - 1
    before[:, 0] = last_of_parent
    return replace(
        trace,
        name=f"{trace.name}, blocks cut into {parts}",
        block_tokens=trace.block_tokens // parts,
        offsets=trace.offsets * parts,
        ids=ids.astype(np.int32),
        parents=before.ravel().astype(np.int32),
    )


def trace_of(name: str, part: str, requests: int, seed: int) -> Trace:
    """Return a trace file, a part of it such as 1/2, a synthetic trace such as synth:chat, or two with a + between."""
    one, _, other = name.partition("+")
    kind = one.removeprefix("synth:")
    trace = synthesize(kind, requests=requests, seed=seed) if kind != one else read_trace(Path(one))
    if other:
        trace = mixed(trace, trace_of(other, "1/1", requests, seed))
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
    parser.add_argument("trace", help="a trace file, or synth:chat, synth:agents, synth:rag, synth:mixed; a+b")
    parser.add_argument("--blocks", default="1000,2000,5000,10000,20000", help="88%% is a share of the distinct blocks")
    parser.add_argument("--strategies", help="by default all that need no arguments")
    parser.add_argument("--part", default="1/1", help="1/2 is the first half")
    parser.add_argument("--requests", type=int, default=12_000, help="of a synthetic trace")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", type=int, default=1, help="cut every block into so many")
    options = parser.parse_args()

    trace = split(trace_of(options.trace, options.part, options.requests, options.seed), options.split)
    named = options.strategies.split(",") if options.strategies else [*default_strategies(), OPTIMAL]
    names = list(dict.fromkeys([LRU, *named, OPTIMAL]))
    blocks = parse_capacities(options.blocks, trace.num_distinct)
    found = {(result.strategy, result.blocks): result for result in sweep(trace, names, blocks)}
    print("| strategy | " + " | ".join(f"{number:,}" for number in blocks) + " |")
    print("|---" * (1 + len(blocks)) + "|")
    for name in [*(name for name in names if name != OPTIMAL), OPTIMAL]:
        row = [cell(found[name, number], found[LRU, number], found[OPTIMAL, number]) for number in blocks]
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
