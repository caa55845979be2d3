"""pagedkv's engine against the engines that a CPU user would pick: one model, a process for each engine, by turns.

transformers always takes part, in float32, and vLLM, OpenVINO GenAI and llama.cpp where ``--peers`` names a file that
says where they are; docs/performance.md says how to install them and how the file looks. All get the same token ids and
the same number of threads, and write greedily. Processor time and memory are those of the whole process tree. What is
compared is the best round of each, by the clock. A turn waits until the machine is idle, but not for long: some engines
spin on after an answer. On a machine that does other work ``--busy`` compares processor time and has threads that wait
sleep. The read bandwidth is measured right before and after pagedkv's turns of work a: within minutes a host's memory
may be twice as fast.

Works: a one stream, b the first token of a long prompt, c many requests with a common system prompt, w the same with
the system prompt cached, d chats in turns. Exact sizes: cpu_engine_works.py.

    python benchmarks/cpu_engines.py [--model FOLDER] [--dtype float32 bfloat16 int8] [--work a b c w d] [--rounds N]
        [--threads N] [--peers FILE] [--only NAME …] [--serve] [--short] [--busy] [--wait SECONDS] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from attention import BANDWIDTH_BYTES, reader
from cpu_engine_process import EngineFailed, EngineProcess, Spec, machine_seconds, wait_until_idle
from cpu_engine_servers import server_rows
from cpu_engine_works import FULL, SHORT, TITLES, WORKS, Outcome, Sizes, Source
from tiers import SHAPE

OURS, REFERENCE = "pagedkv", "transformers float32"
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}
NUM_BLOCKS = 800
SEEN = {"c": 4, "w": 4, "d": 1}
"""How many texts transformers writes of a work that it is not timed in."""
REFERENCE_WORKS = {"float32": "ab", "bfloat16": "a", "int8": "a"}
BEST_PEER = {"a": 1.1, "b": 1.0, "c": 1.1, "w": 1.1, "d": 1.0}
PLAIN = {"float32": 2.7, "bfloat16": 5.0}
LIMIT = {"float32": 1.25, "bfloat16": 1.25, "int8": 1.6}
SPARE = 150.0  # MiB

Row = dict[str, Any]


# --- the model --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def model_folders(named: Path | None) -> Iterator[dict[str, Path]]:
    """Yield a folder for each dtype; the model is a random one of the shape of SmolLM2-135M if none is named.

    Weights of 8 bits are made of those in bfloat16 by whoever loads them.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        folders = {"float32": Path(folder, "float32"), "bfloat16": Path(folder, "bfloat16")}
        if named is None:
            torch.manual_seed(0)
            config = LlamaConfig(initializer_range=0.08, bos_token_id=None, eos_token_id=None, **SHAPE)
            model: Any = LlamaForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
        for dtype, path in folders.items():
            model.to(getattr(torch, dtype)).save_pretrained(path)
        del model
        yield folders | {"int8": folders["bfloat16"]}


def parameters(folder: Path) -> tuple[int, int]:
    """Return how many numbers a model has, and how many of them a step reads: all but an embedding that is no head."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        sizes |= {name: torch.Size(entry["shape"]).numel() for name, entry in header.items() if "shape" in entry}
    everything = sum(sizes.values())
    table = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    return everything, everything if not any("lm_head" in name for name in sizes) else everything - table


# --- taking turns -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that was measured of the engines of one dtype."""

    dtype: str
    busy: bool = False
    wait: float = 0.0
    engines: dict[str, EngineProcess] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)
    expected: dict[str, list[list[list[int]]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    reads: list[float] = field(default_factory=list)

    def best(self, work: str, name: str) -> Outcome:
        return min(self.outcomes[work, name], key=self.time)

    def time(self, outcome: Outcome) -> float:
        """Return what is compared."""
        return outcome.processor if self.busy else outcome.seconds


def own_specs(dtype: str, folders: dict[str, Path], short: bool) -> list[Spec]:
    """Return the engines that need nothing installed."""
    options: dict[str, Any] = {"num_blocks": NUM_BLOCKS} | ({"weights": "int8"} if dtype == "int8" else {})
    specs = [
        Spec(OURS, "pagedkv", str(folders[dtype]), dtype, sys.executable, options=options),
        Spec(REFERENCE, "transformers", str(folders["float32"]), "float32", sys.executable, REFERENCE_WORKS[dtype]),
    ]
    if dtype == "bfloat16" and not short:
        specs.append(Spec("transformers bfloat16", "transformers", str(folders[dtype]), dtype, sys.executable, "ab"))
    return specs


def peer_specs(file: Path | None, dtype: str, only: list[str] | None) -> list[Spec]:
    """Return the engines of a file that are of one dtype."""
    entries = json.loads(file.read_text()) if file else {}
    known = Spec.__dataclass_fields__
    return [
        Spec(name, **{key: value for key, value in entry.items() if key in known})
        for name, entry in entries.items()
        if entry["dtype"] == dtype and (not only or name in only)
    ]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start(run: Run, specs: list[Spec], source: Source, threads: int, short: bool) -> None:
    """Load all engines and let each compile and allocate what it wants."""
    for spec in specs:
        try:
            engine = EngineProcess(spec, threads, {"OMP_WAIT_POLICY": "passive"} if run.busy else {})
            run.engines[spec.name] = engine
            rng, wide = random.Random(1), spec.engine != "transformers"
            engine.ask([source.cut(rng, 300 if wide and not short else 40)], 4)
            if wide:
                engine.ask([source.cut(rng, 40) for _ in range(8 if short else 32)], 4)
        except EngineFailed as error:
            fail(run, spec.name, error)
        else:
            say(f"{run.dtype}: {spec.name} loaded in {engine.seconds_to_load:.1f} s")


def fail(run: Run, name: str, error: EngineFailed) -> None:
    """Leave an engine out from here on."""
    run.failures[name] = str(error)
    say(f"{run.dtype}: {error}")
    if name in run.engines:
        run.engines.pop(name).close()


def take_turns(run: Run, works: Iterable[str], rounds: int, source: Source, sizes: Sizes) -> None:
    """Let all engines do all works; whoever goes first changes from round to round."""
    read = reader()
    for work in works:
        if run.dtype == "float32":
            run.expected[work] = []
        for number in range(rounds):
            names = list(run.engines)
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                is_held = work == "a" and name == OURS
                before = seconds_to_read(read, run.busy) if is_held else 0.0
                one_turn(run, work, name, number, source, sizes)
                if is_held and name in run.engines:
                    run.reads.append(min(before, seconds_to_read(read, run.busy)))


def one_turn(run: Run, work: str, name: str, number: int, source: Source, sizes: Sizes) -> None:
    """Let one engine do a work once; transformers writes some texts of what it is not timed in, for comparison."""
    engine = run.engines[name]
    rng = random.Random(f"{work} {number}")
    is_timed = work in engine.spec.works
    if not is_timed and (number or name != REFERENCE or run.dtype != "float32"):
        return
    wait_until_idle(run.wait)
    begun, all_begun, own_begun = time.perf_counter(), machine_seconds(), engine.processor_seconds()
    try:
        outcome = WORKS[work](engine.ask, source, rng, sizes, None if is_timed else SEEN[work])
    except EngineFailed as error:
        return fail(run, name, error)
    others = machine_seconds() - all_begun - (engine.processor_seconds() - own_begun)
    cores = (os.cpu_count() or 1) * (time.perf_counter() - begun)
    outcome = replace(outcome, others=max(0.0, others / cores))
    if is_timed:
        run.outcomes.setdefault((work, name), []).append(outcome)
        say(f"{run.dtype} {work} {number} {name}: {shown(work, outcome)}")
    if name == REFERENCE and run.dtype == "float32":
        run.expected[work].append(outcome.texts)


def seconds_to_read(read: Any, busy: bool) -> float:
    """Return how long one read takes in the mean of half a second: what is held against it is a mean as well."""
    clock = time.process_time if busy else time.perf_counter
    count, begun = 0, clock()
    while clock() - begun < 0.5:
        read()
        count += 1
    return (clock() - begun) / count


# --- the table --------------------------------------------------------------------------------------------------------


def row(
    name: str, value: float | None, unit: str, note: str, target: float | None = None, at_most: bool = False
) -> Row:
    """Return one line of the table."""
    value = None if value is None else round(value, 3)
    met = None if target is None or value is None else (value <= target if at_most else value >= target)
    note = "; ".join(filter(None, (note, "MISSED in this run" if met is False else "")))
    return {"name": name, "value": value, "unit": unit, "target": target, "met": met, "note": note}


def shown(work: str, outcome: Outcome) -> str:
    """Say how long a work took."""
    if work == "a":
        text = f"{1 / outcome.seconds:.1f} tokens/s, {1e3 * outcome.seconds:.1f} ms a token"
        text += f", {1e3 * outcome.processor:.1f} ms CPU"
    else:
        text = f"{outcome.seconds:.2f} s, {outcome.processor:.1f} s CPU"
    others = f"other processes had {100 * outcome.others:.0f}% of the cores" if outcome.others > 0.05 else ""
    return "; ".join(filter(None, (text, outcome.note, others)))


def equal_texts(run: Run, work: str, name: str) -> str:
    """Count the texts that are those of transformers, in float32."""
    if name == REFERENCE or not run.expected.get(work):
        return ""
    rounds = zip(run.outcomes[work, name], run.expected[work], strict=False)
    pairs = [pair for outcome, texts in rounds for pair in zip(outcome.texts, texts, strict=False)]
    return f"; {sum(a == b for a, b in pairs)} of {len(pairs)} texts as transformers"


def work_rows(run: Run, work: str) -> list[Row]:
    """Say how all engines did a work, and how ours compares."""
    names = [name for name in run.engines if (work, name) in run.outcomes]
    title, rows = f"{run.dtype} {work}, {TITLES[work]}", []
    for name in names:
        best = run.best(work, name)
        value, unit = run.time(best), "s"
        if work == "a":
            value, unit = 1 / max(1e-9, value), "tokens/s"
        rows.append(row(f"{title}: {name}", value, unit, shown(work, best) + equal_texts(run, work, name)))
    if OURS not in names:
        return rows
    ours = max(1e-9, run.time(run.best(work, OURS)))
    times = {name: run.time(run.best(work, name)) / ours for name in names if name != OURS}
    peers = {name: ratio for name, ratio in times.items() if run.engines[name].spec.engine != "transformers"}
    if peers:
        best_peer = min(peers, key=peers.__getitem__)
        rows.append(row(f"{title}: time of the best peer / ours", peers[best_peer], "×", best_peer, BEST_PEER[work]))
    if REFERENCE in times:
        target = PLAIN.get(run.dtype) if work == "a" else None
        rows.append(row(f"{title}: time of {REFERENCE} / ours", times[REFERENCE], "×", "", target))
    return rows


def limit_row(run: Run, read_numbers: int, threads: int) -> Row:
    """Hold a step of one stream against reading the weights once, at the bandwidth right before or after that turn."""
    size = read_numbers * BYTES[run.dtype]
    limits = [size * seconds / BANDWIDTH_BYTES for seconds in run.reads]
    turns = list(zip(map(run.time, run.outcomes["a", OURS]), limits, strict=True))
    step, limit = min(turns)
    median = statistics.median(step / limit for step, limit in turns)
    note = f"{1e3 * step:.1f} ms a token, {1e3 * limit:.1f} ms to read {read_numbers / 1e6:.1f}M weights once at "
    note += f"{size / limit / 1e9:.1f} GB/s, read by {threads} threads right before or after"
    note += f"; {median:.2f} × in the median of {len(turns)} turns"
    return row(f"{run.dtype} a: step / bandwidth limit", step / limit, "×", note, LIMIT[run.dtype], at_most=True)


def memory_rows(run: Run, all_numbers: int) -> list[Row]:
    """Say how much memory every engine took."""
    rows = []
    for name, engine in run.engines.items():
        libraries = engine.libraries()
        peak, loaded = engine.peak() - libraries, engine.peak_while_loading - libraries
        note = f"libraries {libraries / 2**20:,.0f} MiB more; when loaded {loaded / 2**20:,.0f}"
        rows.append(row(f"{run.dtype}: peak memory of {name}", peak / 2**20, "MiB", note))
        if name == OURS:
            weights = all_numbers * BYTES[run.dtype]
            note = f"weights {weights / 2**20:,.0f} MiB, pool {engine.pool / 2**20:,.0f} MiB"
            beyond = (peak - weights - engine.pool) / 2**20
            rows.append(row(f"{run.dtype}: ours beyond weights and pool", beyond, "MiB", note, SPARE, at_most=True))
    return rows


def rows_of(run: Run, works: list[str], numbers: tuple[int, int], threads: int) -> list[Row]:
    """Return all lines of a dtype."""
    rows = [row(f"{run.dtype}: {name}", None, "", why) for name, why in run.failures.items()]
    for work in works:
        rows += work_rows(run, work)
        if work == "a" and ("a", OURS) in run.outcomes and OURS in run.engines:
            rows.append(limit_row(run, numbers[1], threads))
    return rows + memory_rows(run, numbers[0])


def measure(options: argparse.Namespace, folders: dict[str, Path]) -> Iterator[list[Row]]:
    """Measure one dtype after the other; yields the lines of each."""
    source, numbers = Source(options.model), parameters(folders["float32"])
    weights = "random weights in the shape of SmolLM2-135M" if options.model is None else f"{options.model.name}"
    sizes = SHORT if options.short else FULL
    what = f"{sizes.long_prompt} tokens in b; {sizes.requests} requests, {sizes.system} tokens shared, {sizes.new} new"
    compared = "processor time is compared" if options.busy else "time by the clock is compared"
    note = f"{weights}, {options.threads} threads; {what} in c and w; {compared}"
    yield [row("model", numbers[0] / 1e6, "M weights", note)]
    for dtype in options.dtype:
        run = Run(dtype, options.busy, options.wait)
        try:
            specs = own_specs(dtype, folders, options.short) + peer_specs(options.peers, dtype, options.only)
            start(run, specs, source, options.threads, options.short)
            take_turns(run, options.work, options.rounds, source, sizes)
            yield rows_of(run, options.work, numbers, options.threads)
        finally:
            for engine in run.engines.values():
                engine.close()
        if options.serve and options.model is not None:
            yield server_rows(options.model, dtype, options.peers, options.rounds)


def printed(line: Row) -> str:
    """Return a line of the table."""
    value = "" if line["value"] is None else f"{line['value']:.4g} {line['unit']}"
    target = "" if line["target"] is None else f"{line['target']:g}"
    met = {None: "", True: "yes", False: "**no**"}[line["met"]]
    return f"| {line['name']} | {value} | {target} | {met} | {line['note']} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; without one the weights are random")
    parser.add_argument("--dtype", nargs="+", choices=list(BYTES), default=list(BYTES), help="of the weights")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), help="which (default: all; with --short all but d)")
    parser.add_argument("--rounds", type=int, help="turns of each engine (default: 3; with --short 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--peers", type=Path, help="a JSON file that names the other engines")
    parser.add_argument("--only", nargs="+", help="these peers alone")
    parser.add_argument("--serve", action="store_true", help="the servers, too")
    parser.add_argument("--short", action="store_true", help="less of everything")
    parser.add_argument("--busy", action="store_true", help="the machine does other work, too")
    parser.add_argument("--wait", type=float, default=2.0, help="seconds at most that a turn waits for an idle machine")
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    options = parser.parse_args()
    options.work = options.work or list("abcw" if options.short else "abcwd")
    options.rounds = options.rounds or (1 if options.short else 3)
    torch.set_num_threads(options.threads)
    print("| what | measured | target | met | note |\n| --- | ---: | ---: | --- | --- |")
    rows: list[Row] = []
    with model_folders(options.model) as folders:
        for lines in measure(options, folders):
            rows += lines
            for line in lines:
                print(printed(line), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, ensure_ascii=False))


if __name__ == "__main__":
    main()
