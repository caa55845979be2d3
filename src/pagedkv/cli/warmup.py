"""``pagedkv warmup``: compile the kernels ahead of the first call, and say where they are kept."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Annotated

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pagedkv.cli.loading import KV_DTYPES
from pagedkv.cli.terminal import DebugOption, Failure, JsonOption, failures_in_one_line, notes, output, print_json
from pagedkv.errors import MissingExtra
from pagedkv.format import duration

EXAMPLES = """Compile the kernels ahead, so that the first call does not.

[bold]Examples[/bold]

  pagedkv warmup

  pagedkv warmup --strategy adaptive --dtype bfloat16

  pagedkv warmup --no-engine --json

  NUMBA_CACHE_DIR=/opt/kernels pagedkv warmup     (in an image; set it there for whoever runs, too)

What is there already is not compiled again. The code is for this processor and this version of pagedkv.
"""


OF_MODELS = ("float32", "bfloat16", "float16")
"""The dtypes that a model may have."""


class Clock:
    """The time of a run, and the part of it in which kernels were compiled: once on a machine, not once a text."""

    def __init__(self) -> None:
        self._compiles: list[tuple[float, float]] = []  # begin and end, none within another
        self._started = time.perf_counter()

    def see(self, function: str, seconds: float) -> None:
        """Note a compile that ends now; it may hold others, which ended before."""
        end = time.perf_counter()
        while self._compiles and self._compiles[-1][0] >= end - seconds:
            self._compiles.pop()
        self._compiles.append((end - seconds, end))

    def read(self) -> tuple[float, float]:
        """Return the seconds since the start without compiling, and those of compiling."""
        compiling = sum(end - begin for begin, end in self._compiles)
        return time.perf_counter() - self._started - compiling, compiling


class Part(msgspec.Struct):
    """What was compiled for one use: no functions where all were on the disk."""

    name: str
    functions: int
    seconds: float


class Report(msgspec.Struct):
    """What ``pagedkv warmup --json`` prints; there is no directory where nothing can be kept."""

    directory: str | None
    parts: list[Part]


def warmup(
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", "-s", help="Books of this strategy; again for more.", show_default="lru"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            help="Attention over keys and values of this dtype; again for more: float32, bfloat16, float16, int8, fp8.",
            show_default="float32, bfloat16",
        ),
    ] = None,
    engine: Annotated[bool, typer.Option("--engine/--no-engine", help="Scheduling, sampling and the server.")] = True,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug):
        wanted = list(dtype or (("float32", "bfloat16") if find_spec("torch") else ()))
        for name in wanted:
            if name not in KV_DTYPES:
                raise Failure(f"--dtype: expected {', '.join(KV_DTYPES)}, got {name}")
        if wanted and find_spec("torch") is None:
            raise MissingExtra("torch", "torch")
        strategies = strategy or ["lru"]
        work: dict[str, Callable[[], None]] = {f"books, {each}": partial(use_books, each) for each in strategies}
        if find_spec("fcntl"):
            work["tiers"] = partial(use_tiers, strategies)
        work |= {f"attention, {each}": partial(use_attention, each) for each in wanted}
        if engine and find_spec("torch") and find_spec("transformers"):
            work |= {f"forward pass, {each}": partial(use_runner, each) for each in wanted if each in OF_MODELS}
            work["engine"] = use_engine
        report = compile_all(work)
        if json:
            print_json(report)
        else:
            _print(report)


def compile_all(work: dict[str, Callable[[], None]]) -> Report:
    """Run some work part by part, with a progress bar, and count what is compiled for it."""
    from pagedkv.jit import cache_directory, watch_compiles

    parts: list[Part] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _quiet(), Progress(*columns, TextColumn("{task.fields[now]}"), console=notes(), transient=True) as bar:
        task = bar.add_task("", total=len(work), now="")
        for name, use in work.items():
            part, started = Part(name, 0, 0.0), time.perf_counter()
            bar.update(task, description=name, now="")

            def see(function: str, seconds: float, part: Part = part) -> None:
                part.functions += 1
                bar.update(task, now=f"{part.functions} functions, {function.rpartition('.')[2]}")

            with watch_compiles(see):
                use()
            part.seconds = round(time.perf_counter() - started, 3)
            parts.append(part)
            bar.advance(task)
    directory = cache_directory()
    return Report(None if directory is None else str(directory), parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own line about compiling away from the bar."""
    logger = logging.getLogger("pagedkv")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _print(report: Report) -> None:
    for part in report.parts:
        count = f"{part.functions} functions compiled" if part.functions else "compiled before"
        output().print(f"{part.name:<24} {count}, {duration(part.seconds)}", soft_wrap=True)
    kept = report.directory or "nowhere: no directory can be written to, see NUMBA_CACHE_DIR"
    output().print(f"kept in {kept}", soft_wrap=True)


def use_books(strategy: str) -> None:
    """Call everything that a BlockManager of this strategy compiles."""
    from pagedkv import BlockManager, parse_strategy

    tokens = list(range(10))
    manager = BlockManager(8, 4, strategy=parse_strategy(strategy), on_full="evict")
    manager.subscribe(lambda event: None)
    manager.allocate(1, tokens)
    manager.commit(manager.plan([1]))
    manager.fork(1, 2)
    manager.append(2, [5, 6])
    manager.commit(manager.append_batch([1, 2], [7, 8]))
    manager.append_batch([1, 2], counts=1)
    manager.truncate(2, 9)
    manager.pin(1)
    manager.touch(2)
    manager.match_prefix(tokens)
    manager.free(1)
    manager.unpin(1)
    manager.allocate(3, tokens)
    manager.allocate(4, 20)
    manager.evict()
    manager.allocate(5, 30)
    manager.apply_streaming_llm(5, 2, 9)
    manager.hottest_prefixes()
    manager.clear_prefix_cache()
    manager.check()


def use_tiers(strategies: list[str]) -> None:
    """Store and load a block of a disk tier, before and after a restart."""
    import numpy as np

    from pagedkv import parse_strategy
    from pagedkv.tiers import BlockFormat, DiskTier

    for strategy in strategies:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                tier = DiskTier(folder, 2**16, strategy=parse_strategy(strategy))
                with tier.open(BlockFormat("warmup", 4, 8)):
                    tier.store(range(9), np.zeros((2, 8), np.uint8)).result()
                    tier.load(range(9), np.zeros((2, 8), np.uint8)).result()


def use_attention(dtype: str) -> None:
    """Prefill and decode a sequence whose keys and values have this dtype."""
    import torch

    from pagedkv import PagedKvCache
    from pagedkv.spec import dtype_name

    of_pool = dtype_name(dtype)
    of_queries = torch.bfloat16 if dtype in ("int8", "fp8") else getattr(torch, dtype)
    cache = PagedKvCache(16, 16, num_kv_heads=2, head_dim=64, dtype=of_pool)
    cache.allocate(1, list(range(40)))
    for plan in (cache.plan([1]), cache.append_batch([1], [7])):
        count = len(plan.slot_mapping)
        keys, queries = (torch.zeros(count, heads, 64, dtype=of_queries) for heads in (2, 4))
        cache.write(0, keys, keys, plan)
        cache.attend(0, queries, plan)
        cache.commit(plan)


def use_runner(dtype: str) -> None:
    """Run the shipped model in this dtype over a pool: the forward pass is compiled once for all models."""
    import torch

    from pagedkv.cli.loading import load_model
    from pagedkv.cli.model_source import find_model
    from pagedkv.hf import load_runner

    model = load_model(find_model(None), "cpu").model.to(getattr(torch, dtype))
    load_runner(model, num_blocks=8)


def use_engine() -> None:
    """Write a few tokens with the shipped model, greedily and sampled."""
    from pagedkv.cli.loading import load_model
    from pagedkv.cli.model_source import find_model
    from pagedkv.engine import LLM, SamplingParams

    loaded = load_model(find_model(None), "cpu")
    llm = LLM(loaded.model, loaded.tokenizer, num_blocks=64)
    greedy = SamplingParams(max_tokens=8, temperature=0)
    sampled = SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, top_k=40, seed=1, repetition_penalty=1.1)
    llm.generate(["def fibonacci(n):", "import os"], [greedy, sampled])
