"""Replicas on Ray Serve: what each routing policy finds cached, beside what the simulator says of the same requests.

Each block of the trace becomes a few tokens, told apart by its id, and the engines have blocks of as many tokens;
prompts are sent one after the other in the order of the trace, and one token is written. With ``--demo`` a few chats of
several turns are played instead, with the texts that the model writes.

    python benchmarks/fleet.py --trace coding_agents.jsonl.gz [--start N] [--requests N] [--blocks N] [--json FILE]
    python benchmarks/fleet.py --demo
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pagedkv.cli.engine_options import EngineOptions, TierOptions
from pagedkv.cli.loading import load_tokenizer
from pagedkv.cli.model_source import find_model
from pagedkv.cli.serve_replicas import EngineRecipe
from pagedkv.engine import SamplingParams
from pagedkv.fleet import routing_names
from pagedkv.replicas.engine import FleetEngine
from pagedkv.replicas.ray_serve import RayOptions, start
from pagedkv.replicas.sending import routed_fleet
from pagedkv.server.config import ServerConfig
from pagedkv.sim import Fleet, read_trace, replay

Row = dict[str, Any]

TARGET = 1.5
"""Cached tokens that prefix routing finds, over those of round robin."""
SETTLES = 0.5  # seconds in which what was told by the last events is heard
DEMO_BLOCKS, DEMO_BLOCK_SIZE = 208, 16
CHATS, TURNS = 7, 6
TURN = """

# Turn {turn}, of chat {number}: a test of it

import unittest


class Test{number}(unittest.TestCase):
    def test_{turn}(self):
        first, second = list(range({turn})), dict.fromkeys("{number}{turn}")
        for number, value in enumerate(first):
            self.assertEqual(value, number)
            self.assertNotIn(value, second)

    def test_more_than_{turn}("""
SYSTEM = '"""Tools of a library."""\n\nimport os\n'


@dataclass
class Found:
    """What the requests of one policy found."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    computed: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Cached tokens, of all of the prompts."""
        return self.cached_tokens / self.prompt_tokens

    @property
    def spread(self) -> float:
        """What the busiest replica computed, over the mean."""
        return max(self.computed.values()) * len(self.computed) / max(1, sum(self.computed.values()))


def tokens_of(block: int, count: int, vocab: int) -> list[int]:
    """Return the tokens that stand for a block of the trace: the digits of its id, away from special tokens."""
    base = vocab - 64
    return [64 + block // base**place % base for place in range(count)]


def slice_of(path: Path, begin: int, count: int) -> list[Row]:
    """Return some requests of a trace, their blocks numbered in the order in which they come."""
    import gzip

    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as lines:
        rows = [json.loads(line) for number, line in enumerate(lines) if begin <= number < begin + count]
    numbers: dict[int, int] = {}
    return [{**row, "hash_ids": [numbers.setdefault(block, len(numbers)) for block in row["hash_ids"]]} for row in rows]


async def play_trace(engine: FleetEngine, rows: Sequence[Row], tokens: int, gap: float) -> Found:
    """Send the prompts of a trace, one after the other."""
    found, vocab = Found(), engine.sizes.vocab_size
    before = await computed_by(engine)
    for row in rows:
        sent = time.monotonic()
        prompt = [token for block in row["hash_ids"] for token in tokens_of(block, tokens, vocab)]
        await ask(engine, prompt, 1, found)
        await asyncio.sleep(max(0.0, gap - (time.monotonic() - sent)))
    found.computed = since(before, await computed_by(engine))
    return found


async def play_chats(engine: FleetEngine, encode: Callable[[str], list[int]], seed: int) -> Found:
    """Play chats of several turns; in each round every chat takes a turn, in another order."""
    found, drawn = Found(), random.Random(seed)
    before = await computed_by(engine)
    chats = {number: encode(f"{SYSTEM}\n\n# Part {number} of the library\n\ndef f{number}(") for number in range(CHATS)}
    for turn in range(TURNS):
        for number in drawn.sample(sorted(chats), CHATS):
            written = await ask(engine, chats[number], 24, found)
            chats[number] = [*chats[number], *written, *encode(TURN.format(turn=turn, number=number))]
            await asyncio.sleep(0.1)
    found.computed = since(before, await computed_by(engine))
    return found


async def ask(engine: FleetEngine, prompt: list[int], count: int, found: Found) -> tuple[int, ...]:
    """Send one request, and note what it found."""
    begun = time.monotonic()
    async for output in engine.generate(prompt, SamplingParams(max_tokens=count, ignore_eos=True)):
        last = output
    found.seconds += time.monotonic() - begun
    found.prompt_tokens += len(prompt)
    found.cached_tokens += last.num_cached_tokens
    return last.outputs[0].token_ids


async def computed_by(engine: FleetEngine) -> dict[str, int]:
    """Return how many prompt tokens each replica has computed so far."""
    await engine.refresh()
    return {name: each.prefix_queries - each.prefix_hits for name, each in engine.replica_stats().items()}


def since(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """Return what each replica has computed meanwhile."""
    return {name: count - before.get(name, 0) for name, count in now.items()}


async def measured(engine: FleetEngine, fleet: Any, policies: Sequence[str], play: Any) -> dict[str, Found]:
    """Play the same requests under each policy, from empty caches."""
    results = {}
    for policy in policies:
        fleet.route_by(policy)
        await engine.clear_prefix_cache()
        await asyncio.sleep(SETTLES)
        results[policy] = await play(engine)
    await engine.shutdown()
    return results


def simulated(rows: Sequence[Row], blocks: int, replicas: int, policies: Sequence[str]) -> dict[str, float]:
    """Return what the simulator finds of all blocks, for each policy."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        trace = read_trace(path)
    return {name: replay(trace, blocks=blocks, fleet=Fleet(replicas, name)).hit_ratio for name in policies}


def table_of(title: str, results: dict[str, Found], said: dict[str, float]) -> Table:
    """Return the results as a table."""
    table = Table(title=title, title_justify="left")
    simulator = ["simulator"] if said else []
    for column in ("routing", "cached", *simulator, "computed", "busiest", "seconds"):
        table.add_column(column, justify="left" if column == "routing" else "right", no_wrap=True)
    for name, found in results.items():
        computed = f"{found.prompt_tokens - found.cached_tokens:,}"
        figures = [f"{found.share:.1%}", *([f"{said[name]:.1%}"] if said else []), computed]
        table.add_row(name, *figures, f"{found.spread:.2f} x", f"{found.seconds:.1f}")
    return table


def rows_of(results: dict[str, Found], said: dict[str, float]) -> list[Row]:
    """Return the results as rows of the page of benchmarks."""
    rows = [
        {"name": f"tokens found cached, {name}", "value": round(found.share, 4), "unit": "of the prompts"}
        | {"target": None, "met": None, "note": f"simulator {said.get(name, 0):.4f}"}
        for name, found in results.items()
    ]
    if {"prefix", "round_robin"} <= results.keys():
        ratio = results["prefix"].cached_tokens / max(1, results["round_robin"].cached_tokens)
        rows.append(
            {"name": "prefix over round robin", "value": round(ratio, 3), "unit": "x", "target": TARGET}
            | {"met": ratio >= TARGET, "note": "cached tokens"}
        )
    return rows


def main() -> None:
    """Start the replicas, play, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--start", type=int, default=1000, help="first request of the trace")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=3000, help="of all replicas together")
    parser.add_argument("--tokens-per-block", type=int, default=2)
    parser.add_argument("--gap", type=float, default=0.08, help="seconds between two requests, at least")
    parser.add_argument("--policies", default=",".join(routing_names()))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.trace is None and not given.demo:
        parser.error("--trace or --demo is needed")
    policies, console = given.policies.split(","), Console()
    size = DEMO_BLOCK_SIZE if given.demo else given.tokens_per_block
    blocks = DEMO_BLOCKS if given.demo else given.blocks // given.replicas
    rows = [] if given.demo else slice_of(given.trace, given.start, given.requests)
    said = {} if given.demo else simulated(rows, given.blocks, given.replicas, policies)

    source = find_model(None)
    options = EngineOptions(num_blocks=blocks, block_size=size, dtype="float32")
    recipe = EngineRecipe(source, options, TierOptions(), ServerConfig(), 1, given.replicas)
    fleet = routed_fleet("prefix", size)
    with console.status(f"starting {given.replicas} replicas on Ray Serve"):
        link = start(recipe, RayOptions(replicas=given.replicas), fleet)
    tokenizer = load_tokenizer(source)

    async def run() -> dict[str, Found]:
        engine = await FleetEngine.of(link, tokenizer)

        async def play(engine: FleetEngine) -> Found:
            if given.demo:
                return await play_chats(engine, lambda text: tokenizer(text)["input_ids"], 1)
            return await play_trace(engine, rows, size, given.gap)

        return await measured(engine, fleet, policies, play)

    results = asyncio.run(run())
    what = f"{CHATS} chats of {TURNS} turns" if given.demo else f"{len(rows)} requests of {given.trace.name}"
    title = f"{what}, {given.replicas} replicas of {blocks:,} blocks of {size} tokens"
    console.print(table_of(title, results, said))
    told = rows_of(results, said)
    if told[-1]["name"] == "prefix over round robin":
        console.print(f"prefix finds {told[-1]['value']:.2f} times what round robin finds")
    if given.json is not None:
        given.json.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
