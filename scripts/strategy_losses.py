"""Write what a strategy loses against LRU: the worst cells over many kinds of traffic and capacities.

Run from the root of the repository; traces are cut into halves and quarters, and follow each other and other traffic::

    python scripts/strategy_losses.py conversation.jsonl.gz agents.jsonl.gz
    python scripts/strategy_losses.py --strategy s3fifo --seeds 1,2 --worst 20
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.control.content_cache import ContentCache
from pagedkv.sim import synthesize
from pagedkv.sim.reading import read_trace
from pagedkv.sim.trace import Trace


class Requests(NamedTuple):
    """What `ContentCache.run` takes."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    outputs: npt.NDArray[np.int64]


SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.12, 0.2, 0.4, 0.7)  # of the different blocks
SMALLEST = 50


def part(trace: Trace, number: int, parts: int) -> Requests:
    """Return the requests of one of so many parts of a trace."""
    return of(trace.slice(trace.num_requests * number // parts, trace.num_requests * (number + 1) // parts))


def of(trace: Trace) -> Requests:
    """Return the requests of a trace."""
    return Requests(trace.ids, trace.offsets, trace.times, trace.output_tokens)


def made(chains: list[list[int]], times: npt.NDArray[np.float64], seed: int) -> Requests:
    """Return requests whose outputs tell nothing."""
    ids = np.array([block for chain in chains for block in chain], np.int32)
    outputs = np.random.default_rng(seed).geometric(1 / 300, len(chains))
    return Requests(ids, np.cumsum([0, *map(len, chains)]).astype(np.int64), times, outputs)


def one_after_the_other(*parts: Requests) -> Requests:
    """Return the requests of several traces which share nothing."""
    ids, offsets, times, first, start, now = [], [np.zeros(1, np.int64)], [], 0, 0, 0.0
    for one in parts:
        ids.append(one.ids + np.int32(first))
        offsets.append(one.offsets[1:] + start)
        times.append(one.times - one.times[0] + now)
        now = times[-1][-1]
        first += int(one.ids.max()) + 1
        start += len(one.ids)
    outputs = np.concatenate([one.outputs for one in parts])
    return Requests(np.concatenate(ids), np.concatenate(offsets), np.concatenate(times), outputs)


def prompts(chosen: npt.NDArray[np.int64], length: int) -> Requests:
    """Return a request for each chosen prompt; all prompts have this length."""
    chains = chosen[:, None] * length + np.arange(length)
    return made(chains.tolist(), np.arange(len(chosen)) / 2, length)


def sessions(seed: int, requests: int, live: int, spread: float, first: int, grown: int, end: float) -> Requests:
    """Return sessions that grow and end, each with a pace of its own; with a spread of 0 all have the same."""
    draw, chains, times, new, waiting = np.random.default_rng(seed), [], [], 0, []
    for _ in range(live):
        waiting.append((draw.exponential(), len(waiting), float(np.exp(spread * draw.normal())), []))
    heapq.heapify(waiting)
    while len(chains) < requests:
        time, number, pace, chain = heapq.heappop(waiting)
        if chain and draw.random() < end:
            pace, chain = float(np.exp(spread * draw.normal())), []
        more = int(draw.integers(0, 2 * grown + 1) if chain else draw.integers(1, 2 * first))
        chain = [*chain, *range(new, new + more)]
        new += more
        chains.append(chain)
        times.append(20.0 * time)
        heapq.heappush(waiting, (time + pace * float(np.exp(0.8 * draw.normal())), number, pace, chain))
    return made(chains, np.array(times), seed)


def made_up(seed: int) -> Iterator[tuple[str, Requests]]:
    """Name kinds of traffic of which no trace is at hand."""
    draw = np.random.default_rng(seed)
    for kind, count in (("chat", 8_000), ("agents", 4_000), ("rag", 8_000), ("mixed", 8_000)):
        trace = synthesize(kind, requests=count, seed=seed)
        yield f"synth:{kind}", of(trace)
    for rate in (0.05, 5.0):
        trace = synthesize("agents", requests=4_000, seed=seed, rate=rate)
        yield f"synth:agents, {rate} requests a second", of(trace)
    trace = synthesize("agents", requests=4_000, seed=seed, think_spread=2.0, idle_share=0.15)
    yield "synth:agents with long pauses", of(trace)
    for kind, tokens in (("chat", 64), ("agents", 128)):
        trace = synthesize(kind, requests=2_000, seed=seed, block_tokens=tokens)
        yield f"synth:{kind}, blocks of {tokens} tokens", of(trace)
    yield "equally likely prompts", prompts(draw.integers(0, 400, 6_000), 10)
    chances = 1 / np.arange(1, 1_501) ** 0.9
    yield "popular prompts", prompts(draw.choice(1_500, 10_000, p=chances / chances.sum()), 6)
    yield "prompts whose popularity moves", prompts(np.arange(8_000) // 20 + draw.geometric(0.02, 8_000), 8)
    yield "a loop", prompts(np.arange(4_000) % 100, 12)
    yield "sessions of one pace", sessions(seed, 5_000, 30, 0.0, 60, 2, 0.02)
    yield "sessions of many paces", sessions(seed, 5_000, 30, 1.0, 60, 2, 0.02)
    yield "short sessions", sessions(seed, 8_000, 60, 1.5, 30, 1, 0.1)


def cut(traces: list[Trace]) -> Iterator[tuple[str, Requests]]:
    """Name traces, their parts, and parts that follow each other and other traffic."""
    for trace in traces:
        for parts in (1, 2, 4):
            for number in range(parts):
                yield f"{trace.name} {number + 1}/{parts}", part(trace, number, parts)
        first, second, other = part(trace, 0, 2), part(trace, 1, 2), prompts(np.arange(3_000) % 40, 40)
        yield f"{trace.name} 1/2, a loop, 2/2", one_after_the_other(first, other, second)
        yield (
            f"sessions of one pace, {trace.name} 1/2",
            one_after_the_other(sessions(1, 5_000, 30, 0.0, 60, 2, 0.02), first),
        )
    for one in traces:
        for two in traces:
            if one is not two:
                pieces = part(one, 0, 2), part(two, 0, 2), part(one, 1, 2)
                yield f"{one.name} 1/2, {two.name} 1/2, {one.name} 2/2", one_after_the_other(*pieces)


def main() -> None:
    """Print the worst cells, and how many there were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", help="trace files")
    parser.add_argument("--strategy", default="adaptive")
    parser.add_argument("--seeds", default="1,2,3", help="of the synthetic traffic")
    parser.add_argument("--worst", type=int, default=8, help="print so many cells")
    parser.add_argument("--untimed", action="store_true", help="do not tell the time")
    parser.add_argument("--without-outputs", action="store_true", help="do not tell how many tokens requests write")
    options = parser.parse_args()

    traffic = list(cut([read_trace(Path(name)) for name in options.traces]))
    for seed in map(int, options.seeds.split(",")):
        traffic += [(f"{name}, seed {seed}", requests) for name, requests in made_up(seed)]
    cells = []
    for name, requests in traffic:
        accesses, distinct = len(requests.ids), int(requests.ids.max()) + 1
        told = (
            requests.times if not options.untimed else None,
            requests.outputs if not options.without_outputs else None,
        )
        for blocks in sorted({max(SMALLEST, int(share * distinct)) for share in SHARES}):
            found, recent = (
                int(ContentCache(blocks, strategy).run(requests.ids, requests.offsets, *told).sum())
                for strategy in (options.strategy, "lru")
            )
            cells.append(((found - recent) / accesses, recent / max(1, accesses - distinct), f"{name}: {blocks:,}"))
    cells.sort()
    print("| traffic and blocks | LRU finds, of the attainable | against LRU |\n|---|---|---|")
    for gain, share, name in cells[: options.worst]:
        print(f"| {name} | {share:.0%} | {gain:+.4f} |")
    gains = [gain for gain, _, _ in cells]
    print(
        f"\n{len(cells)} cells, {sum(gain < -0.001 for gain in gains)} of them below -0.001; mean {np.mean(gains):+.4f}"
    )


if __name__ == "__main__":
    main()
