"""``pagedkv generate``: text written by the engine, and the block map of exactly that run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer
from rich.text import Text

from pagedkv.cli.block_map import BlockMap
from pagedkv.cli.loading import LoadedModel, load_model, require_dtype, require_kv_dtype, require_weights
from pagedkv.cli.model_source import MODEL_HELP, find_model
from pagedkv.cli.terminal import (
    DebugOption,
    Failure,
    facts_table,
    failures_in_one_line,
    from_options,
    library_notices,
    notes,
    options_from,
    print_json,
    threads_for,
)
from pagedkv.cli.warmup import Clock
from pagedkv.cli.writing import PoolWatch, Screen, of_folder, written_by
from pagedkv.errors import RequestRefused
from pagedkv.format import duration, format_bytes
from pagedkv.machine import physical_memory
from pagedkv.server.config import setting
from pagedkv.typing import Dtype, Weights

if TYPE_CHECKING:
    from pagedkv.engine import LLM, Request, RequestOutput, SamplingParams

CHUNK = 512  # prompt tokens of a forward pass

_MAX_COUNT = 2**31 - 2


EXAMPLES = """Write text with a language model whose keys and values live in paged blocks.

[bold]Examples[/bold]

  pagedkv generate "def fibonacci(n):"

  pagedkv generate "class Stack:" -n 3 --show-blocks

  pagedkv generate "import os" --beams 4 --json

  cat prompt.txt | pagedkv generate - --model ./my-model --temperature 0

  pagedkv generate "What is a KV cache?" --model ./my-chat-model --system "Answer in one sentence."

  pagedkv generate "def main():" --stream --window-tokens 508

The text goes to stdout, everything else to stderr. Nothing is downloaded but a model that is named as at the hub
(OWNER/NAME) and is not in the local Hugging Face cache.

To a model with a chat template the prompt is a user's message, and only the answer is printed; not so with --raw.
"""

_SAMPLING, _POOL, _STREAM, _OUTPUT = "What to write", "The pool", "Without end", "What to show"


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """The options of ``pagedkv generate``, checked before anything heavy is loaded; None was not given."""

    prompt: str
    model: str | None = setting(
        None,
        MODEL_HELP,
        flag="--model,-m",
        shown="the shipped model",
        group=_SAMPLING,
    )
    system: str | None = setting(
        None, "A system message, for a model with a chat template.", shown=False, group=_SAMPLING
    )
    raw: bool = setting(
        False,
        "Go on from the prompt itself, even if the model has a chat template.",
        flag="--raw,--no-chat-template",
        group=_SAMPLING,
    )
    samples: int = setting(
        1, "Samples written in parallel; they share the prompt's blocks.", flag="-n", group=_SAMPLING
    )
    beams: int = setting(1, "Beam search with so many beams.", group=_SAMPLING)
    max_new_tokens: int | None = setting(
        None, "Stop after so many tokens.", shown="128; none with --stream", group=_SAMPLING
    )
    temperature: float | None = setting(
        None, "0 takes the likeliest token.", shown="0.7; 0 with --beams", group=_SAMPLING
    )
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this total probability.", group=_SAMPLING)
    seed: int = setting(0, "The same seed writes the same text.", group=_SAMPLING)
    device: str = setting("cpu", "A torch device: cpu, cuda, cuda:1.", group=_SAMPLING)
    dtype: str = setting("auto", "auto (as stored), float32, bfloat16, float16.", group=_SAMPLING)
    weights: str | None = setting(
        None, "Weights in 8 bits: int8, on the CPU, in compiled mode.", shown="as stored", group=_SAMPLING
    )
    block_size: int = setting(16, "Tokens per block.", group=_POOL)
    num_blocks: int | None = setting(None, "Blocks of the pool.", shown="what the call can need", group=_POOL)
    kv_dtype: str | None = setting(
        None,
        "Of keys and values: float32, bfloat16, float16; int8 or fp8 halve the memory of the last two.",
        shown="as the model",
        group=_POOL,
    )
    strategy: str = setting("lru", "What is evicted first: lru, lfu, fifo, longest_first, …", group=_POOL)
    stream: bool = setting(False, "Write without end in a fixed pool (StreamingLLM); Ctrl-C stops.", group=_STREAM)
    sink_tokens: int | None = setting(None, "First tokens that are kept.", shown="4", group=_STREAM)
    window_tokens: int | None = setting(None, "Last tokens that are kept.", shown="508", group=_STREAM)
    echo: bool = setting(True, "Print the prompt before the text; an answer of a chat stands alone.", group=_OUTPUT)
    show_blocks: bool = setting(False, "Draw the pool, a cell a block.", group=_OUTPUT)
    json: bool = setting(False, "Print one JSON object, at the end.", group=_OUTPUT)

    def __post_init__(self) -> None:
        from pagedkv import parse_strategy

        require_dtype(self.dtype)
        require_kv_dtype(self.kv_dtype)
        require_weights(self.weights)
        for flag, value, low, high in (
            ("-n", self.samples, 1, _MAX_COUNT),
            ("--beams", self.beams, 1, _MAX_COUNT),
            ("--max-new-tokens", self.max_new_tokens, 1, _MAX_COUNT),
            ("--seed", self.seed, 0, 2**63 - 1),
            ("--block-size", self.block_size, 1, _MAX_COUNT),
            ("--num-blocks", self.num_blocks, 1, _MAX_COUNT),
            ("--sink-tokens", self.sink_tokens, 0, _MAX_COUNT),
            ("--window-tokens", self.window_tokens, 1, _MAX_COUNT),
        ):
            if value is not None and not low <= value <= high:
                raise Failure(f"{flag}: expected an integer in {low} … {high}, got {value}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise Failure(f"--temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise Failure(f"--top-p: expected a number above 0 and at most 1, got {self.top_p}")
        parse_strategy(self.strategy)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.system is not None and self.raw:
            raise Failure("--system and --raw do not go together: a system message needs the chat template")
        if self.beams > 1 and self.samples > 1:
            raise Failure("-n and --beams do not go together: samples are drawn at random, beams are not")
        if self.beams > 1 and self.temperature:
            raise Failure("--temperature and --beams do not go together: beam search does not sample")
        if self.samples > 1 and self.temperature == 0:
            raise Failure("-n needs a --temperature above 0: at 0 all samples are the same")
        if self.stream and (self.samples > 1 or self.beams > 1):
            raise Failure(f"--stream writes one text: it does not go with {'-n' if self.samples > 1 else '--beams'}")
        for name, value in (("--sink-tokens", self.sink_tokens), ("--window-tokens", self.window_tokens)):
            if value is not None and not self.stream:
                raise Failure(f"{name} goes with --stream only")

    @property
    def rows(self) -> int:
        """Texts that are written side by side."""
        return max(self.samples, self.beams)

    @property
    def token_limit(self) -> int | None:
        """New tokens of a text; None without end."""
        return 128 if self.max_new_tokens is None and not self.stream else self.max_new_tokens

    @property
    def sinks(self) -> int:
        """First tokens that ``--stream`` keeps."""
        return 4 if self.sink_tokens is None else self.sink_tokens

    @property
    def window(self) -> int:
        """Last tokens that ``--stream`` keeps."""
        return 508 if self.window_tokens is None else self.window_tokens

    def read_prompt(self) -> str:
        """Return the prompt, from stdin if it is ``-``; `Failure` where it is empty, or no UTF-8."""
        try:
            text = sys.stdin.read() if self.prompt == "-" else self.prompt
            text.encode()
        except UnicodeError:
            raise Failure("the prompt is not valid UTF-8") from None
        if not text:
            raise Failure("the prompt is empty" + (": nothing came from stdin" if self.prompt == "-" else ""))
        return text

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks a text of so many tokens takes."""
        return -(-num_tokens // self.block_size)

    def longest_blocks(self, prompt_tokens: int) -> int:
        """Return how many blocks the call takes at most, where it has an end."""
        return self.rows * self.blocks_for(prompt_tokens + (self.token_limit or 0))

    def pool_size(self, prompt_tokens: int) -> int:
        """Return ``--num-blocks``, or what this call can need at most.

        `Failure` where the pool does not even hold the prompt, or sinks and window.
        """
        if self.stream:
            from pagedkv.hf.streaming import blocks_for_streaming

            needed = blocks_for_streaming(self.sinks, self.window, self.block_size)
            if self.num_blocks is not None and self.num_blocks < needed:
                raise Failure(
                    f"{self.sinks} sink and {self.window} window tokens take {needed} blocks of {self.block_size} "
                    f"tokens, the pool has {self.num_blocks}: raise --num-blocks or lower --window-tokens"
                )
            return self.num_blocks or needed
        needed = self.blocks_for(prompt_tokens)
        if self.num_blocks is not None and self.num_blocks < needed:
            raise Failure(
                f"the prompt of {prompt_tokens} tokens takes {needed} blocks of {self.block_size} tokens, the pool has "
                f"{self.num_blocks}: raise --num-blocks to {needed + 1} or more"
            )
        return self.num_blocks or -(-self.longest_blocks(prompt_tokens) // 16) * 16


@options_from(GenerateRequest)
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; [bold]-[/bold] reads it from stdin.")],
    *,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Gather the options and write; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug, context):
        run(from_options(GenerateRequest, {**options, "prompt": prompt}))


def run(options: GenerateRequest) -> None:
    """Do what was asked for: text to stdout as it comes, then the figures."""
    source = find_model(options.model)
    prompt = options.read_prompt()
    console = notes()
    with library_notices(console):
        with console.status("loading the model"):
            loaded = load_model(source, options.device, options.dtype)
        is_chat = loaded.has_chat_template and not options.raw
        if options.system is not None and not is_chat:
            raise Failure(f"--system: expected a model with a chat template, {source.path} has none")
        ids = loaded.encode_chat(prompt, options.system) if is_chat else loaded.encode(prompt)
        _check_length(options, loaded, len(ids))
        blocks = options.pool_size(len(ids))
        if is_chat and not options.json:
            told = f"the prompt is a message to {source.name}, by its chat template (--raw goes on from the text)"
            console.print(Text(told, style="dim"), soft_wrap=True)
        doing = f"searching with {options.beams} beams" if options.beams > 1 else "reading the prompt"
        echoed = prompt if options.echo and not is_chat else ""
        screen = Screen(echoed, options.samples, console.status(doing), silent=options.json)
        with threads_for(loaded.model.num_parameters()), screen:
            output, pool, took = write(options, loaded, ids, blocks, screen.show)
            screen.finish([text.text for text in output.outputs])
    report = report_of(options, prompt, output, pool, took, model=str(source.path), chat_template=is_chat)
    if options.json:
        print_json(report)
    else:
        console.print()
        console.print(facts_table(facts_of(report)))
    if options.show_blocks:
        console.print()
        console.print(BlockMap(pool.fullest))


def _check_length(options: GenerateRequest, loaded: LoadedModel, prompt_tokens: int) -> None:
    from pagedkv.hf.compat import longest_text

    limit = longest_text(loaded.model.config)
    if limit is None:
        return
    if options.stream:
        if options.sinks + options.window >= limit:
            raise Failure(
                f"--sink-tokens and --window-tokens expect less than the model's {limit} positions together, "
                f"got {options.sinks + options.window}"
            )
    elif prompt_tokens + (options.token_limit or 0) > limit:
        raise Failure(
            f"the prompt of {prompt_tokens} tokens and {options.token_limit} new ones exceed the model's {limit} "
            f"positions: lower --max-new-tokens, or use --stream"
        )


def _checked_pool(options: GenerateRequest, blocks: int, bytes_per_block: int, on_cpu: bool) -> int:
    """Refuse a pool beyond all memory: the system would grant it, and end the process when it is used."""
    needed, available = blocks * bytes_per_block, physical_memory()
    if on_cpu and available is not None and needed > available:
        raise Failure(
            f"a pool of {blocks} blocks of {options.block_size} tokens takes {needed / 1e9:,.1f} GB, this machine has "
            f"{available / 1e9:,.1f}: lower --num-blocks, -n or --max-new-tokens"
        )
    return blocks


# Writing: one request to an engine of its own.


def write(
    options: GenerateRequest, loaded: LoadedModel, ids: list[int], blocks: int, show: Callable[[str], None]
) -> tuple[RequestOutput, PoolWatch, tuple[float, float]]:
    """Write the text, the samples or the best of the beams; `show` gets the first text piece by piece.

    Returns the output, the pool and the seconds of writing and of compiling; `Failure` where the pool is too small, or
    the model gives no numbers.
    """
    from pagedkv.control.strategies import parse_strategy
    from pagedkv.engine import LLM
    from pagedkv.hf import load_runner
    from pagedkv.jit import watch_compiles

    runner = load_runner(
        loaded.model,
        num_blocks=lambda size: _checked_pool(options, blocks, size, loaded.model.device.type == "cpu"),
        block_size=options.block_size,
        strategy=parse_strategy(options.strategy),
        kv_dtype=cast("Dtype | None", options.kv_dtype),
        weights=cast("Weights | None", options.weights),
        keep_model=False,
        num_states=2 * options.rows,
    )
    pool = PoolWatch(runner)
    # In gather mode a prompt is computed at once, as the model's own generate() does.
    chunk = CHUNK if runner.mode != "gather" else max(CHUNK, len(ids))
    llm = LLM(pool, loaded.tokenizer, max_batch_tokens=chunk, max_num_seqs=options.rows)
    clock = Clock()
    with watch_compiles(clock.see):
        request = _added(llm, ids, _params(options, loaded.model.generation_config), options)
        output = written_by(llm, request, show, until_interrupted=options.stream)
    seconds = clock.read()
    if any(text.finish_reason == "abort" for text in output.outputs) and not options.stream:
        raise Failure("the model gave logits that are no numbers")
    limit = options.token_limit
    if limit and any(text.finish_reason == "length" and len(text.token_ids) < limit for text in output.outputs):
        raise _pool_is_full(options, len(ids))
    return output, pool, seconds


def _added(llm: LLM, ids: list[int], params: SamplingParams, options: GenerateRequest) -> Request:
    """Hand the request to the engine; where the pool does not hold all of the text, as much as it does."""
    from dataclasses import replace

    request = llm.request(ids, params)
    try:
        llm.core.add(request)
    except RequestRefused:
        if options.stream:
            raise
        if options.beams > 1:
            raise _pool_is_full(options, len(ids)) from None
        request = llm.request(ids, replace(params, max_tokens=None))
        llm.core.add(request)
    return request


def _params(options: GenerateRequest, folder: Any) -> SamplingParams:
    """Return the sampling parameters; what is no option is as the model's ``generation_config.json`` has it."""
    from pagedkv.engine import SamplingParams

    chosen: dict[str, Any] = {"max_tokens": options.token_limit, "skip_special_tokens": False}
    if options.beams > 1:
        chosen["beam_width"] = options.beams
    else:
        chosen |= {"n": options.samples, "top_p": options.top_p, "seed": options.seed}
        chosen["temperature"] = 0.7 if options.temperature is None else options.temperature
    if options.stream:  # no token that would end the text is ever drawn
        chosen |= {"streaming": (options.sinks, options.window), "min_tokens": options.token_limit or _MAX_COUNT}
    names = ("length_penalty",) if options.beams > 1 else ("top_k", "min_p", "repetition_penalty")
    return SamplingParams(**chosen, **of_folder(folder, *names))


def _pool_is_full(options: GenerateRequest, prompt_tokens: int) -> Failure:
    return Failure(
        f"the pool of {options.pool_size(prompt_tokens)} blocks of {options.block_size} tokens is full: the whole call "
        f"takes up to {options.longest_blocks(prompt_tokens)} blocks, so raise --num-blocks or lower --max-new-tokens"
    )


# The report: the JSON object and the table.


class BlockUse(msgspec.Struct):
    """The pool in the step that held most blocks."""

    used: int  # that texts hold
    shared: int  # that two or more texts hold
    copied: int  # because a shared one was written to, over the whole run
    cached: int  # findable ones that no text holds
    peak: int  # most used at a time, between two steps as well
    total: int
    block_size: int


class MemoryUse(msgspec.Struct):
    """K and V in bytes."""

    paged: int  # the blocks at the peak
    contiguous: int  # one contiguous cache per text, with room for prompt and longest continuation


class GenerateReport(msgspec.Struct):
    """What ``pagedkv generate --json`` prints."""

    model: str  # the folder or file
    prompt: str
    chat_template: bool  # whether the prompt was written as a message, by the model's template
    seed: int
    texts: list[str]  # the continuations, without the prompt
    token_ids: list[list[int]]  # their new tokens, the end-of-text token included
    prompt_tokens: int
    cached_tokens: int  # of the prompt, whose K and V were found in the cache
    new_tokens: int  # of all texts
    dropped_tokens: int  # of the text, which sinks and window of --stream no longer hold
    blocks: BlockUse
    memory: MemoryUse
    seconds: float  # of writing, reading the prompt included, loading the model and compiling left out
    compile_seconds: float  # of kernels that were not on the disk yet
    tokens_per_second: float


def report_of(
    options: GenerateRequest,
    prompt: str,
    output: RequestOutput,
    pool: PoolWatch,
    took: tuple[float, float],
    *,
    model: str,
    chat_template: bool,
) -> GenerateReport:
    """Return the figures of a run that took some seconds of writing, and some of compiling."""
    seconds, compile_seconds = took
    texts, fullest, cache = output.outputs, pool.fullest, pool.cache
    prompt_tokens, new_tokens = len(output.prompt_token_ids), sum(len(text.token_ids) for text in texts)
    longest = prompt_tokens + (options.token_limit or new_tokens)
    kept = options.sinks + options.window if options.stream else longest
    return GenerateReport(
        model=model,
        prompt=prompt,
        chat_template=chat_template,
        seed=options.seed,
        texts=[text.text for text in texts],
        token_ids=[list(text.token_ids) for text in texts],
        prompt_tokens=prompt_tokens,
        cached_tokens=output.num_cached_tokens,
        new_tokens=new_tokens,
        dropped_tokens=max(0, prompt_tokens + new_tokens - kept) if options.stream else 0,
        blocks=BlockUse(
            used=int((fullest.ref_count > 0).sum()),
            shared=int((fullest.ref_count > 1).sum()),
            copied=cache.stats.blocks_copied,
            cached=int(fullest.cached.sum()),
            peak=cache.stats.peak_blocks_used,
            total=cache.total_blocks,
            block_size=cache.block_size,
        ),
        memory=MemoryUse(
            paged=cache.stats.peak_blocks_used * cache.block_memory_bytes,
            contiguous=options.rows * longest * cache.block_memory_bytes // cache.block_size,
        ),
        seconds=seconds,
        compile_seconds=compile_seconds,
        tokens_per_second=new_tokens / seconds if seconds else 0.0,
    )


def facts_of(report: GenerateReport) -> Iterator[tuple[str, str]]:
    """Yield the figures of a run as they are shown."""
    blocks, memory = report.blocks, report.memory
    # Blocks are whole: for a single text they take a little more than its tokens.
    times = memory.contiguous / memory.paged if memory.paged else 0.0
    ratio = f" ({times:.1f}×)" if times >= 1.05 else ""
    yield "prompt tokens", f"{report.prompt_tokens:,}"
    yield "cached tokens", f"{report.cached_tokens:,}"
    yield "new tokens", f"{report.new_tokens:,}"
    if report.dropped_tokens:
        yield "dropped tokens", f"{report.dropped_tokens:,}"
    sizes = f"{blocks.used:,} of {blocks.total:,} ({blocks.block_size} tokens each)"
    yield "blocks used", f"{sizes}, {blocks.peak:,} at peak"
    yield "blocks shared", f"{blocks.shared:,}"
    yield "blocks copied", f"{blocks.copied:,}"
    yield "memory", f"{format_bytes(memory.paged)}; a contiguous cache: {format_bytes(memory.contiguous)}{ratio}"
    yield "tokens/s", f"{report.tokens_per_second:,.1f}"
    if report.compile_seconds >= 0.05:
        yield "compiling", f"{duration(report.compile_seconds)} before that, once on this machine"
