"""``pagedkv bench``: speed of bookkeeping, attention over blocks and replay on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Table

from pagedkv.cli.info import Info, gather_info
from pagedkv.cli.loading import torch_device
from pagedkv.cli.terminal import (
    DebugOption,
    Failure,
    JsonOption,
    failures_in_one_line,
    from_options,
    library_notices,
    notes,
    options_from,
    output,
    print_json,
)
from pagedkv.format import digits
from pagedkv.server.config import setting
from pagedkv.spec import KvCacheSpec, dtype_name
from pagedkv.typing import StrategyName
from pagedkv.validate import require_choice, require_int, require_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pagedkv.cache import PagedKvCache


_FEWEST = 5
"""Calls of which a median is taken at least, however long they take."""
_REPLAYED = 1_000_000
"""Block accesses."""
_REPLAYED_BY: tuple[StrategyName, ...] = ("lru", "adaptive")


_BOOKS, _ATTENTION, _HOW = "The books", "Attention", "How"


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The options of ``pagedkv bench``."""

    sequences: int = setting(256, "Running sequences, of --context tokens each, in a step.", group=_BOOKS)
    prompt: int = setting(32768, "Tokens of a prompt that is found cached.", group=_BOOKS)
    batch: int = setting(16, "Sequences that decode together.", group=_ATTENTION)
    q_heads: int = setting(32, "Query heads.", group=_ATTENTION)
    kv_heads: int = setting(8, "Heads of keys and values.", group=_ATTENTION)
    head_dim: int = setting(128, "Elements of a head.", group=_ATTENTION)
    dtypes: str = setting(
        "float32,bfloat16,float16,int8", "Of keys and values: float32, bfloat16, float16, int8, fp8.", group=_ATTENTION
    )
    device: str = setting("cpu", "A torch device: cpu, cuda, cuda:1.", group=_ATTENTION)
    context: int = setting(1024, "Tokens of every sequence.", group=_HOW)
    block_size: int = setting(16, "Tokens per block.", group=_HOW)
    seconds: float = setting(1.0, "Time for every figure.", group=_HOW)

    @property
    def kv_dtypes(self) -> list[str]:
        """The dtypes one by one."""
        return [name.strip() for name in self.dtypes.split(",") if name.strip()]


class Figure(msgspec.Struct, frozen=True):
    """One line of the table."""

    part: str
    name: str
    value: float
    unit: str
    note: str


class BenchResult(msgspec.Struct, frozen=True):
    """What ``pagedkv bench --json`` prints: the machine, and the figures."""

    info: Info
    figures: list[Figure]


def run(parts: list[str], request: BenchRequest, as_json: bool) -> None:
    """Measure, and print each part as soon as it is known."""
    console = notes()
    figures: list[Figure] = []
    for part in parts:
        with library_notices(console), console.status(f"measuring: {part}"):
            found = list(_MEASURES[part](request))
        figures += found
        if not as_json:
            output().print(_table(part, found))
    if as_json:
        print_json(BenchResult(gather_info(), figures), indent=2)


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

    size, context, steps = request.block_size, request.context, 512
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
        manager.append_batch(ids)
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
    from pagedkv.sim.replayer import replay
    from pagedkv.sim.synth import synthesize

    trace = synthesize("chat", accesses=_REPLAYED)
    blocks = max(1, trace.num_distinct // 4)
    times = median_seconds([partial(replay, trace, blocks, name) for name in _REPLAYED_BY], request.seconds)
    for strategy, seconds in zip(_REPLAYED_BY, times, strict=True):
        ratio = replay(trace, blocks, strategy).hit_ratio
        note = f"block accesses/s; made-up chat, {trace.num_requests:,} requests, {blocks:,} blocks, {ratio:.1%} hits"
        yield Figure("replay", strategy, trace.num_accesses / seconds / 1e6, "M/s", note)


def _parts(asked: list[str], request: BenchRequest) -> list[str]:
    """Return what is to be measured, after everything that could be wrong was looked at."""
    for name in asked:
        require_choice("parts", name, _MEASURES)
    for name, given in asdict(request).items():
        if type(given) is int:
            require_int(name, given, 1)
    require_number("seconds", request.seconds, 0, above=True)
    if request.q_heads % request.kv_heads:
        raise Failure(f"--q-heads: expected a multiple of --kv-heads {request.kv_heads}, got {request.q_heads}")
    if not request.kv_dtypes:
        raise Failure("--dtypes: expected names such as bfloat16,int8, got none")
    for dtype in request.kv_dtypes:
        KvCacheSpec(1, request.block_size, request.kv_heads, request.head_dim, dtype=dtype_name(dtype))
    return list(dict.fromkeys(asked)) or [part for part in _MEASURES if part != "attention" or find_spec("torch")]


def _table(part: str, figures: list[Figure]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, title=part, title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for figure in figures:
        table.add_row(figure.name, digits(figure.value), figure.unit, figure.note)
    return table


# Attention: decoding and prefill over blocks, beside torch's fused attention.

_COPIED_BYTES = 1 << 28


def _attention(request: BenchRequest) -> Iterator[Figure]:
    """Measure every dtype; memory is read from the pool, which is larger than most caches of a processor."""
    import torch

    device = torch_device(request.device)
    with torch.no_grad():
        yield _copy(device, request.seconds)
        for dtype in request.kv_dtypes:
            yield from _decode(request, dtype, device)
        for dtype in request.kv_dtypes:
            yield _prefill(request, dtype, device)


def _copy(device: torch.device, seconds: float) -> Figure:
    import torch

    source = torch.ones(_COPIED_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    (time,) = median_seconds([_awaited(lambda: target.copy_(source), device)], seconds)
    note = f"read and written, {_where(device)}"
    return Figure("attention", "memory copied", 2 * _COPIED_BYTES / time / 1e9, "GB/s", note)


def _decode(request: BenchRequest, dtype: str, device: torch.device) -> Iterator[Figure]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    count, context = request.batch, request.context
    cache, plan, queries = _filled(request, dtype, device, count, 1)
    shape = count, request.kv_heads, context, request.head_dim
    keys, values = (torch.randn(shape, device=device).to(queries.dtype) for _ in range(2))

    def dense() -> Tensor:
        return scaled_dot_product_attention(queries[:, :, None], keys, values, enable_gqa=True)

    ways = [lambda: cache.attend(0, queries, plan), dense]
    ours, theirs = median_seconds([_awaited(way, device) for way in ways], request.seconds)
    read = cache.spec.bytes_per_token * count * context
    note = f"{count} × {context:,} tokens; reads {read / ours / 1e9:.1f} GB/s of K and V"
    yield Figure("attention", f"decode, {dtype}", ours * 1e3, "ms", note)
    working = str(queries.dtype).removeprefix("torch.")
    note = f"so much longer takes torch's attention over {working} K and V in one piece"
    yield Figure("attention", "", theirs / ours, "×", note)


def _prefill(request: BenchRequest, dtype: str, device: torch.device) -> Figure:
    cache, plan, queries = _filled(request, dtype, device, 1, request.context)
    (time,) = median_seconds([_awaited(lambda: cache.attend(0, queries, plan), device)], request.seconds)
    note = f"{request.context:,} tokens; {request.context / time:,.0f} tokens/s"
    return Figure("attention", f"prefill, {dtype}", time * 1e3, "ms", note)


def _filled(
    request: BenchRequest, dtype: str, device: torch.device, count: int, new: int
) -> tuple[PagedKvCache, Any, Tensor]:
    """Return a cache with sequences whose blocks lie scattered, the plan of their last tokens, and its queries."""
    import numpy as np
    import torch

    from pagedkv.cache import PagedKvCache

    size = request.block_size
    blocks = -(-request.context // size)
    cache = PagedKvCache(
        count * blocks, size, request.kv_heads, request.head_dim, dtype=dtype_name(dtype), device=str(device)
    )
    order = np.random.default_rng(0).permutation(count)
    for seq_id in order.tolist():
        cache.allocate(seq_id, min(size, request.context))
    while (left := request.context - cache.get_sequence(0).num_tokens) > 0:
        cache.append_batch(order, counts=min(size, left))
    plan = cache.plan(order, request.context)
    generator = torch.Generator(device).manual_seed(0)
    working = torch.bfloat16 if cache.spec.is_quantised else cache.storage.dtype

    def drawn(tokens: int, heads: int) -> Tensor:
        shape = tokens, heads, request.head_dim
        return torch.randn(shape, generator=generator, device=device).to(working)

    total = count * request.context
    cache.write(0, drawn(total, request.kv_heads), drawn(total, request.kv_heads), plan)
    cache.commit(plan)
    return cache, cache.plan(order, new), drawn(count * new, request.q_heads)


def _awaited(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a call that waits until the device has done the work."""
    import torch

    if device.type != "cuda":
        return call

    def both() -> None:
        call()
        torch.cuda.synchronize(device)

    return both


def _where(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_MEASURES: dict[str, Callable[[BenchRequest], Iterator[Figure]]] = {
    "books": _books,
    "attention": _attention,
    "replay": _replay,
}


EXAMPLES = """Measure pagedkv on this machine: the books, attention over blocks, and the replay of a trace.

[bold]Examples[/bold]

  pagedkv bench

  pagedkv bench attention --dtypes bfloat16,int8 --batch 32 --context 4096

  pagedkv bench attention --device cuda

  pagedkv bench books --sequences 64 --json

Every figure is the median of as many calls as fit into --seconds; compare them within one run only.
"""


@options_from(BenchRequest)
def bench(
    called: typer.Context,
    parts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PART]…", help="books, attention, replay; without any, all that can run here."),
    ] = None,
    *,
    json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Check the options and run; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug, called):
        request = from_options(BenchRequest, options)
        run(_parts(parts or [], request), request, as_json=json)
