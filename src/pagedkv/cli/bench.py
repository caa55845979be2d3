"""``pagedkv bench``: what the books, attention over blocks and the replay of a trace cost on this machine."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import msgspec
from rich.table import Table

from pagedkv.cli.console import library_notices, notes, output
from pagedkv.cli.info import Info, gather_info
from pagedkv.cli.terminal import Failure
from pagedkv.spec import KvCacheSpec

__all__ = ["BenchRequest", "BenchResult", "Figure", "median_seconds", "run"]

_FEWEST = 5
"""Calls of which a median is taken at least, however long they take."""
_REPLAYED = 1_000_000
"""Block accesses."""
_REPLAYED_BY = ("lru", "adaptive")


@dataclass(frozen=True)
class BenchRequest:
    """What was asked for; the options tell what each means."""

    parts: tuple[str, ...]
    sequences: int
    prompt: int
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtypes: tuple[str, ...]
    device: str
    context: int
    block_size: int
    seconds: float
    json: bool


class Figure(msgspec.Struct, frozen=True):
    """One line of the table.

    Attributes
    ----------
    part : str
    name : str
    value : float
    unit : str
    note : str
    """

    part: str
    name: str
    value: float
    unit: str
    note: str = ""


class BenchResult(msgspec.Struct, frozen=True):
    """What ``pagedkv bench --json`` prints: the machine, and the figures."""

    info: Info
    figures: list[Figure]


def run(request: BenchRequest) -> None:
    """Measure, and print each part as soon as it is known.

    Raises
    ------
    PagedKvError
        Whatever is wrong with the options, or a part needs what is not installed.
    """
    parts = _parts(request)
    console = notes()
    figures: list[Figure] = []
    for part in parts:
        with library_notices(console), console.status(f"measuring: {part}"):
            found = list(_MEASURES[part](request))
        figures += found
        if not request.json:
            output().print(_table(part, found))
    if request.json:
        result = msgspec.json.encode(BenchResult(gather_info(), figures))
        sys.stdout.write(msgspec.json.format(result, indent=2).decode() + "\n")


def median_seconds(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median time of each call; they take turns, as many as fit into some time, after one for nothing."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(times[0]) < _FEWEST or time.perf_counter() < end:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _books(request: BenchRequest) -> Iterator[Figure]:
    """A step of a running batch, and a prompt that is found."""
    import numpy as np

    from pagedkv.control.manager import BlockManager

    size, context = request.block_size, request.context
    steps = 512
    room = request.sequences * (-(-(context + steps) // size) + 1)
    manager = BlockManager(room, size)
    ids = np.arange(request.sequences)
    for seq_id in range(request.sequences):
        manager.allocate(seq_id, context)
    left = steps

    def step() -> None:
        nonlocal left
        if not left:
            for seq_id in range(request.sequences):
                manager.truncate(seq_id, context)
            left = steps
        manager.append_batch(ids, 1)
        left -= 1

    (time_of_step,) = median_seconds([step], request.seconds)
    note = f"{request.sequences:,} sequences of {context:,} tokens, plan included"
    yield Figure("books", "append_batch", time_of_step * 1e6, "µs", note)

    manager = BlockManager(2 * (-(-request.prompt // size)) + 2, size)
    prompt = np.random.default_rng(0).integers(0, 50_000, request.prompt)
    manager.allocate(0, prompt)
    manager.commit(0)
    manager.free(0)
    cached = manager.allocate(1, prompt).num_cached_tokens
    manager.free(1)

    def find() -> None:
        manager.allocate(1, prompt)
        manager.free(1)

    (time_of_find,) = median_seconds([find], request.seconds)
    note = f"prompt of {request.prompt:,} tokens, {cached:,} of them found cached"
    yield Figure("books", "match, allocate, free", time_of_find * 1e3, "ms", note)


def _replay(request: BenchRequest) -> Iterator[Figure]:
    """Synthetic chat traffic against a cache that holds a quarter of its blocks."""
    from pagedkv.sim.replaying import replay
    from pagedkv.sim.synth import synthesize

    trace = synthesize("chat", accesses=_REPLAYED)
    blocks = max(1, trace.num_distinct // 4)
    times = median_seconds([partial(replay, trace, blocks, name) for name in _REPLAYED_BY], request.seconds)
    for strategy, seconds in zip(_REPLAYED_BY, times, strict=True):
        ratio = replay(trace, blocks, strategy).hit_ratio
        note = f"block accesses/s; made-up chat, {trace.num_requests:,} requests, {blocks:,} blocks, {ratio:.1%} hits"
        yield Figure("replay", strategy, trace.num_accesses / seconds / 1e6, "M/s", note)


def _attention(request: BenchRequest) -> Iterator[Figure]:
    from pagedkv.cli.bench_attention import measure

    return measure(request)


_MEASURES: dict[str, Callable[[BenchRequest], Iterator[Figure]]] = {
    "books": _books,
    "attention": _attention,
    "replay": _replay,
}


def _parts(request: BenchRequest) -> list[str]:
    """Return what is to be measured, after everything that could be wrong was looked at."""
    for name in request.parts:
        if name not in _MEASURES:
            raise Failure(f"PART expects one of {', '.join(_MEASURES)}, got {name!r}")
    for field in dataclasses.fields(request):
        given = getattr(request, field.name)
        if type(given) is int and given < 1:
            raise Failure(f"--{field.name.replace('_', '-')} expects 1 or more, got {given}")
    if not 0 < request.seconds < float("inf"):
        raise Failure(f"--seconds expects a time above 0, got {request.seconds:g}")
    if request.q_heads % request.kv_heads:
        raise Failure(f"--q-heads expects a multiple of --kv-heads {request.kv_heads}, got {request.q_heads}")
    if not request.dtypes:
        raise Failure("--dtypes expects names such as bfloat16,int8, got none")
    for dtype in request.dtypes:
        KvCacheSpec(1, request.block_size, request.kv_heads, request.head_dim, dtype=dtype)
    if request.parts:
        return list(dict.fromkeys(request.parts))
    return [part for part in _MEASURES if part != "attention" or find_spec("torch")]


def _table(part: str, figures: list[Figure]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, title=part, title_justify="left", show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("note", style="dim", overflow="fold")
    for figure in figures:
        table.add_row(figure.name, _written(figure.value), figure.unit, figure.note)
    return table


def _written(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
