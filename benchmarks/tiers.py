"""Tiers: a chat after a restart, loads against the raw disk, what storing costs, a large directory, swap.

The model has the shape of SmolLM2-135M in bfloat16, with random weights unless ``--model`` names a folder. Files are
dropped from the page cache before what is called cold. Ratios are of things measured in turns in this run.

    python benchmarks/tiers.py [--model FOLDER] [--directory DIR] [--only NAME …] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine.offload import Offload
from pagedkv.hf import load_runner
from pagedkv.tiers import BlockFormat, DiskTier, HostTier

Row = dict[str, Any]

CHAT = 2000  # tokens
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SIZE = "1GB"
PIECE = 2 * 2**20  # bytes of a raw read
THREADS = 4
MILLION = 10**6


def row(name: str, value: float, unit: str, note: str, target: float | None = None, at_most: bool = False) -> Row:
    """Return one line of the table."""
    met = None if target is None else (value <= target if at_most else value >= target)
    return {"name": name, "value": round(value, 3), "unit": unit, "target": target, "met": met, "note": note}


def model_of(folder: str | None) -> Any:
    """Return the model of a folder, or a random one of the same shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.08, **SHAPE)).to(torch.bfloat16).eval()


def text_of(seed: int, length: int = CHAT) -> list[int]:
    """Return random token ids."""
    return np.random.default_rng(seed).integers(5, 40_000, length).tolist()


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def drop_from_page_cache(folder: Path) -> None:
    """Have the system read the files from the disk the next time."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def seconds(call: Any) -> tuple[float, Any]:
    """Return how long a call takes, and its result."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


# --- a chat after a restart -------------------------------------------------------------------------------------------


def restart(runner: Any, folder: Path, rounds: int) -> list[Row]:
    """Time to the first token of a chat that is computed, and of one that a new engine finds in a cold directory."""
    computed, restarted, opened, agree = [], [], [], True
    for turn in range(rounds):
        chat = text_of(turn)
        with LLM(runner, tiers=[DiskTier(folder, SIZE)], max_batch_tokens=512) as llm:
            llm.clear_prefix_cache()
            llm.generate(text_of(99, 100), greedy(2))
            took, (first,) = seconds(lambda chat=chat, llm=llm: llm.generate(chat, greedy(1)))
            computed.append(took)
            assert first.num_cached_tokens == 0
        runner.cache.clear_prefix_cache()
        drop_from_page_cache(folder)
        took, llm = seconds(lambda: LLM(runner, tiers=[DiskTier(folder, SIZE)], max_batch_tokens=512))
        opened.append(took)
        drop_from_page_cache(folder)
        with llm:
            took, (again,) = seconds(lambda chat=chat, llm=llm: llm.generate(chat, greedy(1)))
            restarted.append(took)
            assert again.num_cached_tokens == CHAT - 1
            agree &= first.outputs[0].token_ids == again.outputs[0].token_ids
        runner.cache.clear_prefix_cache()
    assert agree, "another token than without tiers"
    ratio = statistics.median(a / b for a, b in zip(computed, restarted, strict=True))
    note = (
        f"{CHAT} tokens, {CHAT // 16 * runner.cache.block_memory_bytes / 1e6:.0f} MB, cold page cache; computed "
        f"{statistics.median(computed):.2f} s, restarted {statistics.median(restarted) * 1e3:.0f} ms, opened and "
        f"fingerprinted in {statistics.median(opened) * 1e3:.0f} ms before"
    )
    return [row("a chat after a restart, sooner to its first token", ratio, "×", note, 15)]


# --- loads against the raw disk ---------------------------------------------------------------------------------------


def loads(folder: Path, rounds: int) -> list[Row]:
    """The rate of cold loads, verified, against that of plain reads of the same file by as many threads."""
    block = BlockFormat("loads", 16, 360 * 1024)
    chains = [np.random.default_rng(i).integers(0, 1000, 16 * 128) for i in range(8)]
    with DiskTier(folder, "800MB").open(block) as tier:
        rows = np.random.default_rng(0).integers(0, 256, (128, block.block_bytes), np.uint8)
        for chain in chains:
            assert tier.store(chain, rows).result() == 128
        into, total = np.zeros_like(rows), len(chains) * rows.nbytes
        ours, raw = [], []
        for _ in range(rounds):
            drop_from_page_cache(folder)
            took, counts = seconds(lambda: [tier.load(chain, into).result() for chain in chains])
            assert counts == [128] * len(chains)
            ours.append(total / took / 1e9)
            drop_from_page_cache(folder)
            raw.append(total / seconds(lambda: read_raw(folder / "slab", total))[0] / 1e9)
    ratio = statistics.median(a / b for a, b in zip(ours, raw, strict=True))
    note = f"{statistics.median(ours):.2f} of {statistics.median(raw):.2f} GB/s, {THREADS} threads, blocks of 360 KiB"
    return [row("cold loads, verified, of the raw disk", ratio, "×", note, 0.7)]


def read_raw(path: Path, total: int) -> None:
    """Read a file from its start, in pieces, by several threads."""
    file = os.open(path, os.O_RDONLY)
    buffers = [bytearray(PIECE) for _ in range(THREADS)]

    def read(thread: int) -> None:
        for start in range(thread * PIECE, total, THREADS * PIECE):
            os.preadv(file, [buffers[thread]], start)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(read, range(THREADS)))
    os.close(file)


# --- what storing costs -----------------------------------------------------------------------------------------------


def storing(runner: Any, folder: Path, rounds: int) -> list[Row]:
    """Eight streams that write 64 tokens behind 256, over and over: with a disk tier and without."""
    params, base = greedy(64), 1000
    tokens = {"with": [], "without": []}  # type: dict[str, list[float]]
    shares: list[float] = []
    for turn in range(rounds):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            tiers = [DiskTier(folder, SIZE)] if kind == "with" else []
            prompts = [text_of(base + 8 * turn + i, 256) for i in range(8)]
            runner.cache.clear_prefix_cache()
            with LLM(runner, tiers=tiers, max_batch_tokens=512) as llm:
                llm.clear_prefix_cache()
                with time_in_offload() as spent:
                    took, _ = seconds(lambda llm=llm, prompts=prompts: llm.generate(prompts, params))
                stats = llm.stats()
                if tiers:
                    shares.append(100 * spent[0] / stats.busy_seconds)
                    wait_for_stores(llm)
                    assert llm.stats().tiers[0].stores >= 8 * 19
            tokens[kind].append(8 * 64 / took)
    ratio = statistics.median(a / b for a, b in zip(tokens["with"], tokens["without"], strict=True))
    note = (
        "8 streams, prompts of 256 and 64 tokens written, each stored at its end; "
        f"{statistics.median(tokens['with']):.0f} against {statistics.median(tokens['without']):.0f} tokens/s"
    )
    return [
        row(
            "time of the steps spent on storing", statistics.median(shares), "%", "in the thread of the engine", 2, True
        ),
        row("tokens/s while storing, of those without", ratio, "×", note),
    ]


@contextlib.contextmanager
def time_in_offload() -> Iterator[list[float]]:
    """Add up how long the calls take that the engine makes to its tiers."""
    spent = [0.0]
    kept: dict[str, Any] = {}

    def timed(call: Any) -> Any:
        def run(*args: Any) -> Any:
            took, result = seconds(lambda: call(*args))
            spent[0] += took
            return result

        return run

    for name in ("look", "poll", "awaits", "bring", "keep", "forget"):
        kept[name] = getattr(Offload, name)
        setattr(Offload, name, timed(kept[name]))
    try:
        yield spent
    finally:
        for name, call in kept.items():
            setattr(Offload, name, call)


def wait_for_stores(llm: LLM) -> None:
    """Let all that was handed to the tiers be written."""
    offload = llm.core.scheduler.offload
    while offload is not None and offload.ladder.staged_bytes:
        time.sleep(0.001)


# --- a large directory ------------------------------------------------------------------------------------------------


def large_directory(folder: Path, rounds: int) -> list[Row]:
    """How long a directory of a million blocks takes to open, cold."""
    block = BlockFormat("million", 16, 1024)
    length = 2000
    with DiskTier(folder, 4224 * MILLION).open(block) as tier:
        rows = np.zeros((length, block.block_bytes), np.uint8)
        for i in range(MILLION // length):
            ids = np.random.default_rng(i).integers(0, 50_000, 16 * length)
            assert tier.store(ids, rows).result() == length
    took = []
    for _ in range(rounds):
        drop_from_page_cache(folder)
        spent, tier = seconds(lambda: DiskTier(folder, 4224 * MILLION).open(block))
        took.append(spent)
        assert tier.stats.restored == MILLION
        tier.close()
    note = f"{MILLION:,} blocks, cold page cache; best {min(took):.2f} s"
    return [row("a directory of a million blocks opens", statistics.median(took), "s", note, 2, True)]


# --- swap -------------------------------------------------------------------------------------------------------------


def swap(model: Any, rounds: int) -> list[Row]:
    """Chats that outgrow the pool: what is preempted is computed again, or comes back from the memory of the host."""
    runner = load_runner(model, num_blocks=8 * 18)
    prompts = [text_of(500 + i, 256) for i in range(8)]
    took: dict[str, list[float]] = {"swap": [], "recompute": []}
    loaded = preempted = 0
    for turn in range(rounds + 1):
        for kind in ("swap", "recompute") if turn % 2 else ("recompute", "swap"):
            runner.cache.clear_prefix_cache()
            with LLM(runner, tiers=[HostTier("500MB")] if kind == "swap" else []) as llm:
                spent, _ = seconds(lambda llm=llm: llm.generate(prompts, greedy(256)))
                if turn:
                    took[kind].append(spent)
                preempted = llm.stats().num_preemptions
                loaded = llm.stats().tiers[0].loads if kind == "swap" else loaded
    ratio = statistics.median(a / b for a, b in zip(took["recompute"], took["swap"], strict=True))
    note = (
        f"8 chats of 512 tokens in a pool for 4.5: {preempted} preemptions, {loaded} blocks came back; "
        f"{statistics.median(took['swap']):.1f} s against {statistics.median(took['recompute']):.1f} s"
    )
    return [row("swap against computing again, under pressure", ratio, "×", note)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in the Hugging Face format; random weights by default")
    parser.add_argument("--directory", type=Path, help="on the disk that is to be measured; a temporary one by default")
    parser.add_argument("--only", nargs="*", choices=["restart", "loads", "storing", "million", "swap"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.only or ["restart", "loads", "storing", "million", "swap"]
    rows: list[Row] = []
    folder = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        model = runner = None
        if {"restart", "storing", "swap"} & set(wanted):
            model = model_of(options.model)
            runner = load_runner(model, num_blocks=400)
        parts = {
            "restart": lambda: restart(runner, folder / "restart", options.rounds),
            "loads": lambda: loads(folder / "loads", options.rounds),
            "storing": lambda: storing(runner, folder / "storing", options.rounds),
            "million": lambda: large_directory(folder / "million", options.rounds),
            "swap": lambda: swap(model, options.rounds),
        }
        for name in wanted:
            for each in parts[name]():
                print(f"{each['name']:55} {each['value']:>9} {each['unit']}  {each['note']}", flush=True)
                rows.append(each)
            shutil.rmtree(folder / name, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
