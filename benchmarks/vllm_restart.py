"""vLLM with the connector: time to the first token of a prompt after a restart, against computing it.

Two engines run at once and take turns: vLLM alone, and vLLM with a disk tier that another process has filled before,
whose files are out of the system's cache. Prompts have nothing in common but their length. What is asked for is one
token, so that a time is that of the first one.

    python benchmarks/vllm_restart.py MODEL [--tokens 2000] [--prompts 6] [--dtype float32] [--block-size 32]
        [--json FILE]

MODEL is a folder; `scripts/fetch_chat_model.py` prints one. `make test-vllm` makes the interpreter, or
PAGEDKV_VLLM_PYTHON names one that has vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.vllm_engine.process import VllmProcess  # noqa: E402

TARGET = 5.0
Row = dict[str, Any]


def prompts(count: int, tokens: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, 40_000) for _ in range(tokens)] for _ in range(count)]


def drop_from_memory(folder: Path) -> None:
    """Let the system forget what it holds of the files, so that they are read from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    kept = {"disk": str(folder / "kept"), "disk_size": arguments.disk_size}
    options = {"dtype": arguments.dtype, "block_size": arguments.block_size}

    def started(name: str, connector: dict[str, Any] | None) -> VllmProcess:
        engine = VllmProcess(arguments.model, folder / f"{name}.log", connector, **options)
        engine.ask(*prompts(1, 100, 99), max_tokens=2)
        return engine

    old = prompts(arguments.prompts, arguments.tokens, 0)
    with_tiers = started("before", kept)
    expected = [with_tiers.ask(prompt, max_tokens=1)["tokens"] for prompt in old]
    with_tiers.empty_pool(3.0)
    with_tiers.kill()
    drop_from_memory(folder / "kept")

    alone, with_tiers = started("alone", None), started("after", kept)
    times: dict[str, list[float]] = {"alone": [], "computed": [], "loaded": [], "pool": []}
    fresh = prompts(arguments.prompts, arguments.tokens, 1)
    for new, prompt, tokens in zip(fresh, old, expected, strict=True):
        first = alone.ask(new, max_tokens=1)
        times["alone"].append(first["seconds"])
        loaded = with_tiers.ask(prompt, max_tokens=1)
        if loaded["tokens"] != tokens or not loaded["cached"][0]:
            raise RuntimeError(f"expected {tokens} and a hit, got {loaded}")
        times["loaded"].append(loaded["seconds"])
        times["pool"].append(with_tiers.ask(prompt, max_tokens=1)["seconds"])
        second = with_tiers.ask(new, max_tokens=1)
        if second["tokens"] != first["tokens"]:
            raise RuntimeError("vLLM alone and vLLM with the connector write other tokens")
        times["computed"].append(second["seconds"])
        with_tiers.empty_pool(2.0)
    alone.kill()
    with_tiers.kill()
    middle = {name: statistics.median(each) for name, each in times.items()}
    ratios = [one / other for one, other in zip(times["alone"], times["loaded"], strict=True)]
    costs = [one / other for one, other in zip(times["computed"], times["alone"], strict=True)]
    spread = {name: f"{1e3 * min(each):.0f} – {1e3 * max(each):.0f} ms" for name, each in times.items()}
    gain = statistics.median(ratios)
    return [
        row("first token, vLLM alone, computed", 1e3 * middle["alone"], "ms", spread["alone"]),
        row("first token after a restart, from the disk", 1e3 * middle["loaded"], "ms", spread["loaded"]),
        row("the same again, from vLLM's own pool", 1e3 * middle["pool"], "ms", spread["pool"]),
        row("first token, computed and stored", 1e3 * middle["computed"], "ms", spread["computed"]),
        row("sooner after a restart", gain, "times", f"{min(ratios):.1f} – {max(ratios):.1f}", TARGET, gain >= TARGET),
        row("computing with the connector, beside alone", statistics.median(costs), "times", "stores included"),
    ]


def row(
    name: str, value: float, unit: str, note: str = "", target: float | None = None, met: bool | None = None
) -> Row:
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--disk-size", default="2GiB")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(arguments, Path(folder))
    for each in found:
        print(f"{each['name']:46} {each['value']:9.4g} {each['unit']:8} {each['note']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
