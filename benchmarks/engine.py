"""The engine against transformers: one by one, a padded batch, and transformers' own continuous batching.

A random Llama of 33.6M parameters, 32 prompts of 16 to 512 tokens of which the longer ones begin with the same 128, 64
new tokens each, greedy. Each way has a process of its own, so that its peak memory is its own; they take turns, and the
engine goes again between all others. What counts is processor time: others may use the machine. Every way must give the
tokens of ``model.generate()`` one by one; where it does not, the table says how many texts are different.

    python benchmarks/engine.py [--rounds N] [--threads 1 2] [--scan] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_PROMPTS, SHORTEST, LONGEST, SHARED, NEW_TOKENS = 32, 16, 512, 128, 64
VOCAB = 8192
BEST = {"page_size": 16, "num_blocks": 900, "max_batch_tokens": 256}
"""The setting of transformers' continuous batching that took the least time here; --scan tries others."""
SCANNED = (
    *({"page_size": 16, "num_blocks": 900, "max_batch_tokens": tokens} for tokens in (64, 128, 256, 512)),
    *({"page_size": 256, "num_blocks": 60, "max_batch_tokens": tokens} for tokens in (128, 256)),
    {"page_size": 16, "num_blocks": 900, "max_batch_tokens": 256, "allow_block_sharing": False},
)
BLOCKS = 800
ENGINE, PLAIN, ONE, PADDED = "pagedkv", "pagedkv, products by torch", "one by one", "padded batch"
OWN_BEST, OWN_DEFAULT = "continuous batching, best setting", "continuous batching, default"
TARGETS = {ONE: 4.0, OWN_BEST: 2.2}
BOOKKEEPING = 2.0

Row = dict[str, Any]
Run = Callable[[], list[list[int]]]


# --- the work, in a process for each way ------------------------------------------------------------------------------


def made_model() -> Any:
    """Return the model, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers import logging as notices

    notices.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def made_prompts() -> list[list[int]]:
    """Return the prompts; those of at least ``SHARED`` tokens begin alike."""
    import numpy as np

    rng = np.random.default_rng(0)
    prefix = rng.integers(1, VOCAB, SHARED)
    lengths = rng.permutation(np.linspace(SHORTEST, LONGEST, NUM_PROMPTS).astype(int))
    texts = [rng.integers(1, VOCAB, length) for length in lengths]
    for text in texts:
        if len(text) >= SHARED:
            text[:SHARED] = prefix
    return [text.tolist() for text in texts]


def greedy(**more: Any) -> Any:
    """Return transformers' settings for the new tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, **more)


def one_by_one(model: Any, prompts: list[list[int]]) -> Run:
    """Return ``model.generate()`` of one prompt after the other."""
    import torch

    config = greedy()
    return lambda: [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]


def padded_batch(model: Any, prompts: list[list[int]]) -> Run:
    """Return ``model.generate()`` of all prompts at once, padded on the left."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    config = greedy()
    return lambda: model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()


def own_batching(model: Any, prompts: list[list[int]], **settings: Any) -> Run:
    """Return transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig

    config, batching = greedy(eos_token_id=-1), ContinuousBatchingConfig(**settings)

    def run() -> list[list[int]]:
        done = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return [output.generated_tokens for output in done.values()]

    return run


class Engine:
    """Our engine; it starts every run with an empty prefix cache."""

    def __init__(self, model: Any, prompts: list[list[int]], fast_products: bool = True) -> None:
        from pagedkv.engine import LLM, SamplingParams

        self.llm = LLM(model, num_blocks=BLOCKS)
        self.prompts, self.params = prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        if not fast_products:
            self.llm.core.runner._products._forwards.clear()

    def __call__(self) -> list[list[int]]:
        self.llm.core.clear_prefix_cache()
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(self.prompts, self.params)]

    def facts(self) -> dict[str, float]:
        """Return where the time of all steps went, and the size of the pool."""
        stats = self.llm.core.stats()
        cached = stats.prefix_hits / stats.prefix_queries
        shares = {
            name: 100 * getattr(stats, f"{name}_seconds") / stats.busy_seconds for name in ("bookkeeping", "sampling")
        }
        per_step = 1e3 * stats.bookkeeping_seconds / stats.steps
        return {**shares, "ms": per_step, "cached": cached, "pool": self.llm.core.runner.bytes_per_block * BLOCKS}


def peak_bytes() -> int:
    """Return the most memory that this process has had at a time."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def made_way(name: str, model: Any, settings: dict[str, Any]) -> Run:
    """Return one way over a model."""
    prompts = made_prompts()
    if name in (ENGINE, PLAIN):
        return Engine(model, prompts, fast_products=name == ENGINE)
    if name == ONE:
        return one_by_one(model, prompts)
    if name == PADDED:
        return padded_batch(model, prompts)
    return own_batching(model, prompts, **settings)


def work(name: str, threads: int, settings: dict[str, Any]) -> None:
    """Answer each line that comes in with one run."""
    import torch

    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    model = made_model()
    bare = peak_bytes()
    run = made_way(name, model, settings)
    if isinstance(run, Engine):
        run()  # the kernels are read from disk
    for _ in sys.stdin:
        waited, begun = time.perf_counter(), time.process_time()
        tokens = run()
        answer = {"seconds": time.process_time() - begun, "waited": time.perf_counter() - waited, "tokens": tokens}
        answer |= {"growth": peak_bytes() - bare, "facts": run.facts() if isinstance(run, Engine) else {}}
        print(json.dumps(answer), file=answers, flush=True)


# --- taking turns -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs one way whenever it is asked."""

    def __init__(self, name: str, threads: int, settings: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--work", name, "--threads", str(threads), "--settings"]
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
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
        for turn in range(rounds):
            for name in names:
                if turn and name == OWN_DEFAULT:
                    continue
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
    per_token = 8 * 2 * 4 * 64 * 4  # layers, K and V, heads, head size, float32
    tokens = {
        ONE: LONGEST + NEW_TOKENS,
        PADDED: NUM_PROMPTS * (LONGEST + NEW_TOKENS),
        OWN_BEST: BEST["page_size"] * BEST["num_blocks"],
    }.get(worker.name)
    return "" if tokens is None else f", of these K and V {tokens * per_token / 2**20:.0f} MiB"


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
    parser.add_argument("--rounds", type=int, default=1, help="turns of each way; the default setting goes once")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads")
    parser.add_argument("--scan", action="store_true", help="look for transformers' best setting instead")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.threads[0], options.settings)
    if options.scan:
        return scan(options.threads[0])
    rows = []
    for number, threads in enumerate(options.threads):
        # The slow ones, of which no target speaks, go with the first number of threads only.
        names = [PLAIN, ONE, OWN_BEST, PADDED, OWN_DEFAULT] if number == 0 else [ONE, OWN_BEST]
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
