"""``pagedkv demo``: a dozen texts behind one beginning and four samples of one, all at once, and what they shared."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from textwrap import dedent, wrap
from typing import TYPE_CHECKING, Any

import msgspec
import typer
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagedkv.cli.block_map import BlockMap
from pagedkv.cli.loading import LoadedModel, load_model
from pagedkv.cli.model_source import ModelArgument, find_model
from pagedkv.cli.terminal import (
    DebugOption,
    JsonOption,
    facts_table,
    failures_in_one_line,
    library_notices,
    notes,
    output,
    print_json,
    threads_for,
)
from pagedkv.cli.warmup import Clock
from pagedkv.cli.writing import PoolWatch, warm_up
from pagedkv.format import duration, format_bytes, percent

if TYPE_CHECKING:
    from pagedkv.engine import LLM, Request

EXAMPLES = """Write a dozen texts that begin alike, all at once, and show what the cache shared.

[bold]Examples[/bold]

  pagedkv demo

  pagedkv demo ./my-chat-model

The model of the package writes Python: its texts are methods of one class. A model with a chat template answers a
dozen questions under one system prompt. The last text is written four times, each sample a fork of the others.
"""

NEW_TOKENS = 40
"""Most tokens of a text; a method or an answer may end before."""
SAMPLES = 4
BLOCK_SIZE = 16
TEMPERATURE = 0.6
_MOST_LINES = 5
"""Last lines of a text that its cell shows, where there is room for them."""

MODULE = '''\
"""A small inventory of a shop: items, their prices, and orders."""

import json
import os


class Inventory:
    """Keeps the items of a shop by their names."""

    def __init__(self, path):
        self.path = path
        self.items = {}
        self.orders = []

    def load(self):
        """Read all items from the file."""
        with open(self.path) as f:
            self.items = json.load(f)

    def save(self):
        """Write all items to the file."""
        with open(self.path, "w") as f:
            json.dump(self.items, f)

    def __len__(self):
        return len(self.items)

    def __contains__(self, name):
        return name in self.items

'''
METHODS = (
    "def add_item(self, name, price):",
    "def remove_item(self, name):",
    "def get_price(self, name):",
    "def set_price(self, name, price):",
    "def has_orders(self):",
    "def names(self):",
    "def total(self):",
    "def clear(self):",
    "def update(self, other):",
    "def __iter__(self):",
    "def __repr__(self):",
    "def find(self, prefix):",
)
METHOD_ENDS = ("\n    def ", "\nclass ", "\ndef ", "\n    @")

SYSTEM = (
    "You are the helper of a small shop that sells tea and teapots by mail. You answer in one or two short "
    "sentences, in plain English, and you never make up prices. The shop sells green tea, black tea, white tea, "
    "oolong, rooibos and herbal infusions, in bags of 100 grams. Green tea is brewed at 70 to 80 degrees for two "
    "minutes, black tea at 95 to 100 degrees for three to five minutes, white tea at 75 degrees for four minutes, "
    "oolong at 90 degrees for three minutes. Orders are sent within two working days, and may be returned within "
    "thirty days if the bag was not opened. Teapots are made of glass, of cast iron or of clay; those of cast "
    "iron must not go into a dishwasher. The shop is closed on Sundays."
)
QUESTIONS = (
    "How hot should the water for green tea be?",
    "How long does black tea take?",
    "May I return a bag that I have opened?",
    "When will my order be sent?",
    "Can the iron pot go into the dishwasher?",
    "Do you sell coffee?",
    "Which pot lets me watch the leaves?",
    "Are you open on Sunday?",
    "How much tea is in a bag?",
    "Which tea has no caffeine?",
    "How do I brew oolong?",
    "Suggest a tea for the evening.",
)


@dataclass(frozen=True)
class Script:
    """What is written: texts with one beginning; `shown` is what a reader sees of each of them."""

    beginning: str
    what: str
    shown: tuple[str, ...]
    token_ids: tuple[list[int], ...]
    stops: tuple[str, ...]


def script_for(loaded: LoadedModel) -> Script:
    """Return a dozen chats for a model with a chat template, and a dozen methods of a class for others."""
    if loaded.has_chat_template:
        ids = tuple(loaded.encode_chat(question, SYSTEM) for question in QUESTIONS)
        return Script(SYSTEM, "chats under one system prompt", QUESTIONS, ids, ())
    ids = tuple(loaded.encode(f"{MODULE}    {method}") for method in METHODS)
    return Script(MODULE, "methods of one class, behind its beginning", METHODS, ids, METHOD_ENDS)


class DemoReport(msgspec.Struct):
    """What ``pagedkv demo --json`` prints; bytes are of keys and values."""

    model: str
    texts: list[list[str]]  # of each request
    prompt_tokens: int  # of all requests; samples have theirs in common
    cached_tokens: int  # of these, found in the cache instead of computed
    new_tokens: int
    block_size: int
    blocks_peak: int  # most that were in use at a time
    blocks_shared: int  # of these, held by two or more texts
    blocks_apart: int  # that the texts would have held then without sharing
    blocks_copied: int  # because a shared one was written to
    paged_bytes: int  # the blocks at the peak
    apart_bytes: int  # one cache for each text, of its own length
    preallocated_bytes: int  # one for each text, of the model's longest length
    seconds: float  # of reading and writing; drawing and compiling left out
    compile_seconds: float
    tokens_per_second: float


def demo(
    context: typer.Context,
    model: ModelArgument = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write and report; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug, context):
        source, console = find_model(model, "MODEL"), notes()
        with library_notices(console), console.status("loading the model, warming up"):
            loaded = load_model(source, "cpu")
            llm, script = engine_for(loaded), script_for(loaded)
            warm_up(llm)
        with threads_for(loaded.model.num_parameters()):
            report, pool = perform(llm, script, None if json else Stage(script), model=source.name)
        if json:
            print_json(report)
            return
        screen = output()
        screen.print()
        screen.print(facts_table(facts_of(report)))
        screen.print()
        screen.print(BlockMap(pool.fullest))


def engine_for(loaded: LoadedModel) -> LLM:
    """Return an engine over a pool in which all texts have room."""
    from pagedkv.engine import LLM
    from pagedkv.hf import load_runner

    longest = max(map(len, script_for(loaded).token_ids)) + NEW_TOKENS
    texts = len(METHODS) - 1 + SAMPLES
    shared = longest // BLOCK_SIZE + texts * (2 * NEW_TOKENS // BLOCK_SIZE + 2)
    runner = load_runner(loaded.model, num_blocks=-(-shared // 32) * 32, block_size=BLOCK_SIZE, num_states=2 * texts)
    return LLM(PoolWatch(runner), loaded.tokenizer)


def requests_of(llm: LLM, script: Script) -> list[Request]:
    """Return a request for each text; the last one asks for samples."""
    from pagedkv.engine import SamplingParams

    one = SamplingParams(max_tokens=NEW_TOKENS, stop=script.stops, temperature=TEMPERATURE, seed=1)
    *first, last = script.token_ids
    return [*(llm.request(ids, one) for ids in first), llm.request(last, replace(one, n=SAMPLES))]


def perform(llm: LLM, script: Script, stage: Stage | None, *, model: str) -> tuple[DemoReport, PoolWatch]:
    """Write all texts at once; returns the figures, and the pool as it was when it was fullest."""
    from pagedkv.jit import watch_compiles

    pool: Any = llm.core.runner
    pool.forget()  # what warming up held
    requests = requests_of(llm, script)
    copied = llm.cache_stats().blocks_copied
    done: dict[str, Any] = {}
    clock, drawing = Clock(), 0.0
    with watch_compiles(clock.see), stage.live if stage is not None else nullcontext():
        for request in requests:
            llm.core.add(request)
        while llm.core.has_work:
            for written in llm.core.step():
                done[written.request_id] = written
            if stage is not None:
                before = time.perf_counter()
                stage.show([_texts(done.get(request.request_id)) for request in requests])
                drawing += time.perf_counter() - before
        seconds, compile_seconds = clock.read()
    seconds -= drawing
    outputs = [done[request.request_id] for request in requests]
    fullest, cache = pool.fullest, pool.cache
    lengths = [len(each.prompt_token_ids) + len(text.token_ids) for each in outputs for text in each.outputs]
    new_tokens = sum(len(text.token_ids) for each in outputs for text in each.outputs)
    token_bytes = cache.block_memory_bytes // cache.block_size
    limit = llm.core.runner.max_positions or max(lengths)
    used = int((fullest.ref_count > 0).sum())
    report = DemoReport(
        model=model,
        texts=[_texts(each) for each in outputs],
        prompt_tokens=sum(len(each.prompt_token_ids) for each in outputs),
        cached_tokens=sum(each.num_cached_tokens for each in outputs),
        new_tokens=new_tokens,
        block_size=cache.block_size,
        blocks_peak=used,
        blocks_shared=int((fullest.ref_count > 1).sum()),
        blocks_apart=int(fullest.ref_count.sum()),
        blocks_copied=llm.cache_stats().blocks_copied - copied,
        paged_bytes=used * cache.block_memory_bytes,
        apart_bytes=sum(lengths) * token_bytes,
        preallocated_bytes=len(lengths) * limit * token_bytes,
        seconds=seconds,
        compile_seconds=compile_seconds,
        tokens_per_second=new_tokens / seconds if seconds else 0.0,
    )
    return report, pool


def _texts(written: Any) -> list[str]:
    return [] if written is None else [text.text for text in written.outputs]


def facts_of(report: DemoReport) -> Iterator[tuple[str, str]]:
    """Yield the figures as they are shown."""
    texts = sum(map(len, report.texts))
    paged = report.paged_bytes
    yield "texts", f"{texts} at once: {len(report.texts)} requests, the last one with {len(report.texts[-1])} samples"
    skipped = report.cached_tokens / report.prompt_tokens
    found = f"{report.cached_tokens:,} of them ({percent(skipped)}) found in the cache"
    yield "prompts", f"{report.prompt_tokens:,} tokens, {found} and not computed"
    yield (
        "blocks",
        f"{report.blocks_peak:,} of {report.block_size} tokens, {report.blocks_shared:,} of them shared; apart the "
        f"texts would have held {report.blocks_apart:,}",
    )
    yield (
        "memory",
        f"{format_bytes(paged)}; a cache for each text: {format_bytes(report.apart_bytes)} "
        f"({report.apart_bytes / paged:.1f}×); preallocated for the longest: "
        f"{format_bytes(report.preallocated_bytes)} ({report.preallocated_bytes / paged:,.0f}×)",
    )
    yield "new tokens", f"{report.new_tokens:,} in {duration(report.seconds)}: {report.tokens_per_second:,.0f}/s"
    if report.compile_seconds >= 0.05:
        yield "compiling", f"{duration(report.compile_seconds)} beside that, once on this machine"


class Stage:
    """The texts side by side while they are written: on a terminal live, elsewhere once they are done."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._console = output()
        self._drawn = 0.0
        self.live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self.show([[] for _ in script.shown])

    def show(self, texts: Sequence[Sequence[str]]) -> None:
        """Draw what is written of each request so far; on a terminal as often as an eye can follow."""
        now = time.perf_counter()
        is_last = all(texts)
        if self._console.is_terminal and now - self._drawn < 1 / 30 and not is_last:
            return
        self._drawn = now
        self.live.update(self.picture(texts), refresh=self._console.is_terminal)

    def picture(self, texts: Sequence[Sequence[str]]) -> Group:
        """Return the beginning that all have in common, and a cell for each text."""
        script = self._script
        first = [line for line in script.beginning.splitlines() if line][:3]
        head = Text("\n".join(first), style="dim", overflow="ellipsis", no_wrap=True)
        title = f"{len(script.shown)} {script.what} of {_shared_tokens(script.token_ids):,} tokens"
        columns = max(1, min(3, self._console.width // 38))
        rows = -(-(len(texts) - 1 + SAMPLES) // columns)
        lines = max(1, min(_MOST_LINES, (self._console.height - 20) // rows - 2)) if self._console.is_terminal else 3
        width, cells = self._console.width // columns - 4, []
        for asked, written in zip(script.shown, texts, strict=True):
            for number, text in enumerate(written or [""]):
                name = f"{number + 1}: {asked}" if len(written) > 1 else asked
                title_of = Text(name, style="bold")
                cells.append(Panel(_tail(text, lines, width), title=title_of, title_align="left", height=lines + 2))
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return Group(Panel(head, title=title, title_align="left", border_style="magenta"), grid)


def _tail(text: str, count: int, width: int) -> Text:
    lines = dedent(text.replace("\x1b", "␛")).strip("\n").rstrip().splitlines()
    rows = [row for line in lines for row in wrap(line, width, replace_whitespace=False, drop_whitespace=False)]
    return Text("\n".join(rows[-count:]), no_wrap=True, overflow="ellipsis")


def _shared_tokens(texts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all texts begin with."""
    return next(
        (place for place, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1), min(map(len, texts))
    )
