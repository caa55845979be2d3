"""``pagedkv generate``: a model writes text, and its keys and values live in blocks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

import pagedkv
from pagedkv.cli.block_map import BlockMap
from pagedkv.cli.loading import LoadedModel, check_folder, load_model
from pagedkv.cli.terminal import Failure, library_notices, notes, threads_for
from pagedkv.machine import physical_memory
from pagedkv.models import shipped_model_path

if TYPE_CHECKING:
    from torch import Tensor


# Turns the token ids that a model gives one by one into text that is printed as it comes.

_UNFINISHED = "\ufffd"


class TextPieces:
    """Decodes a growing list of token ids piece by piece, at a cost that does not grow with the text.

    A token may hold a part of a character, and what a token looks like may depend on the one before it. So the last
    few tokens are decoded twice, without and with the new one; the difference is the new text, held back while it ends
    in an unfinished character.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # tokens printed last
        self._waiting: list[int] = []  # tokens not printed yet

    def add(self, token: int) -> str:
        """Return the text that this token completes, "" while a character is unfinished."""
        self._waiting.append(token)
        before = self._decode(self._context)
        after = self._decode(self._context + self._waiting)
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._context, self._waiting = self._waiting, []
        return after[len(before) :]

    def flush(self) -> str:
        """Return what is still held back."""
        before = self._decode(self._context)
        after = self._decode(self._context + self._waiting)
        self._context, self._waiting = [], []
        return after[len(before) :]


class TokenStreamer:
    """A transformers streamer that hands on the text of the first sequence; the others are only counted.

    Parameters
    ----------
    pieces : TextPieces
    stop_tokens : collection of int
        Tokens that end a text and are not shown.
    show : callable
        Takes each piece of text.
    """

    def __init__(self, pieces: TextPieces, stop_tokens: Collection[int], show: Callable[[str], None]) -> None:
        self._pieces = pieces
        self._stop_tokens = frozenset(stop_tokens)
        self._show = show
        self._seen_prompt = False
        self._ended = False

    def put(self, value: Any) -> None:
        """Take the prompt first, then one token of each sequence at a time."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token in value[0].reshape(-1).tolist():
            self.take(token)

    def take(self, token: int) -> None:
        """Show one token of the first sequence."""
        if token in self._stop_tokens:
            self._ended = True
        if not self._ended:
            self._hand_on(self._pieces.add(token))

    def end(self) -> None:
        """Show what was held back."""
        self._hand_on(self._pieces.flush())

    def _hand_on(self, text: str) -> None:
        if text:
            self._show(text)


# Draws the next token of an endless text; what ``generate()`` does for the others is left to transformers.


def make_sampler(temperature: float, top_p: float, seed: int) -> Callable[[Tensor], int]:
    """Return a function from logits ``[vocab_size]`` to a token id.

    Parameters
    ----------
    temperature : float
        0 takes the likeliest token.
    top_p : float
        Draw from the smallest set of likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020).
    seed : int
        The same seed draws the same tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        chances, tokens = torch.softmax(logits.float().cpu() / temperature, -1).sort(descending=True, stable=True)
        # The likeliest token is always in: its own probability does not count against it.
        chances[chances.cumsum(0) - chances >= top_p] = 0
        return int(tokens[torch.multinomial(chances, 1, generator=generator)])

    return sample


# What the user asked ``pagedkv generate`` for, checked before anything heavy is loaded.

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")

_MAX_NEW_TOKENS = 128
_TEMPERATURE = 0.7
_SINK_TOKENS = 4
_WINDOW_TOKENS = 508
_MAX_COUNT = 2**31 - 2


@dataclass(frozen=True)
class GenerateRequest:
    """The options of ``pagedkv generate``; None stands for an option that was not given.

    Raises
    ------
    Failure
        An option is out of range or does not go with another one; the text names it.
    """

    prompt: str
    model: str | None = None
    samples: int = 1
    beams: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    device: str = "cpu"
    kv_dtype: str | None = None
    block_size: int = 16
    num_blocks: int | None = None
    strategy: str = "lru"
    stream: bool = False
    sink_tokens: int | None = None
    window_tokens: int | None = None
    echo: bool = True
    show_blocks: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_pairs()

    def _check_ranges(self) -> None:
        require_kv_dtype(self.kv_dtype)
        _require_count("-n", self.samples, 1)
        _require_count("--beams", self.beams, 1)
        _require_count("--max-new-tokens", self.max_new_tokens, 1)
        _require_count("--seed", self.seed, 0, 2**63 - 1)
        _require_count("--block-size", self.block_size, 1)
        _require_count("--num-blocks", self.num_blocks, 1)
        _require_count("--sink-tokens", self.sink_tokens, 0)
        _require_count("--window-tokens", self.window_tokens, 1)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise Failure(f"--temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise Failure(f"--top-p: expected a number above 0 and at most 1, got {self.top_p}")

    def _check_pairs(self) -> None:
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
    def model_path(self) -> Path:
        """The folder of the model."""
        return shipped_model_path() if self.model is None else Path(self.model).expanduser()

    @property
    def rows(self) -> int:
        """Sequences that are written side by side."""
        return max(self.samples, self.beams)

    @property
    def token_limit(self) -> int | None:
        """New tokens of a sample; None without end."""
        if self.max_new_tokens is None and not self.stream:
            return _MAX_NEW_TOKENS
        return self.max_new_tokens

    @property
    def heat(self) -> float:
        """The temperature; 0 for the likeliest token."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.beams > 1 else _TEMPERATURE

    @property
    def sinks(self) -> int:
        """First tokens that ``--stream`` keeps."""
        return _SINK_TOKENS if self.sink_tokens is None else self.sink_tokens

    @property
    def window(self) -> int:
        """Last tokens that ``--stream`` keeps."""
        return _WINDOW_TOKENS if self.window_tokens is None else self.window_tokens

    def read_prompt(self) -> str:
        """Return the prompt, from stdin if it is ``-``.

        Raises
        ------
        Failure
            It is empty, or no UTF-8.
        """
        try:
            text = sys.stdin.read() if self.prompt == "-" else self.prompt
            text.encode()
        except UnicodeError:
            raise Failure("the prompt is not valid UTF-8") from None
        if not text:
            raise Failure("the prompt is empty" + (": nothing came from stdin" if self.prompt == "-" else ""))
        return text

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks a sequence of so many tokens takes."""
        return -(-num_tokens // self.block_size)

    def pool_size(self, prompt_tokens: int) -> int:
        """Return ``--num-blocks``, or what this call can need at most.

        Raises
        ------
        Failure
            The pool does not even hold the prompt.
        """
        if self.num_blocks is None:
            return self._largest_need(prompt_tokens)
        held = min(prompt_tokens, self.sinks + self.window) if self.stream else prompt_tokens
        needed = self.blocks_for(held)
        if needed > self.num_blocks:
            raise Failure(
                f"the prompt of {prompt_tokens} tokens takes {needed} blocks of {self.block_size} tokens, the pool has "
                f"{self.num_blocks}: raise --num-blocks to {needed + 1} or more"
            )
        return self.num_blocks

    def _largest_need(self, prompt_tokens: int) -> int:
        if self.token_limit is None or self.stream:
            held = max(prompt_tokens, self.sinks + self.window)
            return self.blocks_for(held) + 2  # the hole has two edges, each inside of a block
        per_row = self.blocks_for(prompt_tokens + self.token_limit)
        spare = 2 if self.beams > 1 else 1  # beams are forked anew before the old ones are freed
        return -(-per_row * self.rows * spare // 16) * 16


def require_kv_dtype(name: str | None) -> None:
    """Raise ``Failure`` where ``--kv-dtype`` was given and cannot be."""
    if name is not None and name not in KV_DTYPES:
        raise Failure(f"--kv-dtype: expected {', '.join(KV_DTYPES)}, got {name}")


def _require_count(name: str, value: int | None, low: int, high: int = _MAX_COUNT) -> None:
    if value is not None and not low <= value <= high:
        raise Failure(f"{name}: expected an integer in {low} … {high}, got {value}")


# Lets a model write through the paged cache: a bounded text by ``generate()``, an endless one by sinks and window.

Show = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """What a model wrote, and the pool when it had written it.

    Attributes
    ----------
    token_ids : list of list of int
        New tokens of each sample, the one that ended it included.
    stop_tokens : frozenset of int
    snapshot : pagedkv.CacheSnapshot
    cached_tokens, dropped_tokens : int
    block_bytes : int
        Of K and V of a block, over all layers.
    seconds : float
    """

    token_ids: list[list[int]]
    stop_tokens: frozenset[int]
    snapshot: pagedkv.CacheSnapshot
    cached_tokens: int
    dropped_tokens: int
    block_bytes: int
    seconds: float


def write(request: GenerateRequest, loaded: LoadedModel, ids: list[int], show: Show) -> Written:
    """Write what ``--max-new-tokens`` allows: one text, several samples, or the best of a beam search.

    Raises
    ------
    Failure
        The pool is too small.
    """
    import torch

    from pagedkv.hf import PagedCache

    cache = PagedCache(
        loaded.model.config,
        num_blocks=request.pool_size(len(ids)),
        block_size=request.block_size,
        strategy=request.strategy,
        dtype=request.kv_dtype,
    )
    stops = _stop_tokens(loaded)
    streamer = TokenStreamer(TextPieces(loaded.tokenizer.decode), stops, show)
    prompt = torch.tensor([ids], device=loaded.model.device)
    started = time.perf_counter()
    cached_tokens = cache.prompt(prompt)
    torch.manual_seed(request.seed)
    try:
        if request.samples > 1:
            _read_once(loaded.model, prompt, cache, request.samples)
        sequences = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=request.token_limit,
            pad_token_id=_pad_token(loaded, stops),
            **_way_of_writing(request),
            **({} if request.beams > 1 else {"streamer": streamer}),
        )
    except pagedkv.OutOfMemory as error:
        raise _pool_is_full(request, cache.manager, len(ids)) from error
    seconds = time.perf_counter() - started
    rows = [_until_stop(row[len(ids) :], stops) for row in sequences.tolist()]
    snapshot, block_bytes = cache.manager.snapshot(), cache.manager.block_memory_bytes
    cache.release()
    return Written(rows, stops, snapshot, cached_tokens, 0, block_bytes, seconds)


def write_endlessly(request: GenerateRequest, loaded: LoadedModel, ids: list[int], show: Show) -> Written:
    """Write until the limit, if there is one, or Ctrl-C.

    Raises
    ------
    Failure
        The pool does not hold sinks and window, or the model cannot stream.
    """
    from pagedkv.hf.streaming import StreamingSession, blocks_for_streaming

    needed = blocks_for_streaming(request.sinks, request.window, request.block_size)
    if request.num_blocks is not None and request.num_blocks < needed:
        raise Failure(
            f"{request.sinks} sink and {request.window} window tokens take {needed} blocks of {request.block_size} "
            f"tokens, the pool has {request.num_blocks}: raise --num-blocks or lower --window-tokens"
        )
    session = StreamingSession(
        loaded.model,
        request.sinks,
        request.window,
        block_size=request.block_size,
        num_blocks=request.num_blocks,
        dtype=request.kv_dtype,
    )
    stops = _stop_tokens(loaded)
    streamer = TokenStreamer(TextPieces(loaded.tokenizer.decode), frozenset(), show)
    sampler = make_sampler(request.heat, request.top_p, request.seed)
    row: list[int] = []
    started = time.perf_counter()
    try:
        for token in session.generate(ids, request.token_limit, sampler=_never(stops, sampler)):
            row.append(token)
            streamer.take(token)
    except KeyboardInterrupt:
        pass  # the way to end a text without end
    streamer.end()
    seconds = time.perf_counter() - started
    cache = session.cache
    return Written([row], frozenset(), cache.snapshot(), 0, session.num_dropped, cache.block_memory_bytes, seconds)


def _read_once(model: Any, prompt: Any, cache: Any, samples: int) -> None:
    """Compute the prompt for one sequence and fork it; ``generate()`` would compute it for each.

    The last token is left over: its logits are what the samples begin with.
    """
    import torch

    read = prompt[:, cache.num_cached_tokens : -1]
    if read.shape[1]:
        with torch.inference_mode():
            model(read, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(samples)


def _never(tokens: frozenset[int], sampler: Callable[[Any], int]) -> Callable[[Any], int]:
    """Keep a sampler from drawing tokens that would end the text."""
    banned = sorted(tokens)

    def sample(logits: Any) -> int:
        logits = logits.clone()
        logits[banned] = float("-inf")
        return sampler(logits)

    return sample


def _way_of_writing(request: GenerateRequest) -> dict[str, Any]:
    if request.heat == 0:
        # The settings of sampling that the model's folder may bring would only raise a warning.
        plain = {"temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": False, "num_beams": request.beams, **plain}
    return {
        "do_sample": True,
        "temperature": request.heat,
        "top_p": request.top_p,
        "num_return_sequences": request.samples,
    }


def _stop_tokens(loaded: LoadedModel) -> frozenset[int]:
    ends = loaded.model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def _pad_token(loaded: LoadedModel, stops: frozenset[int]) -> int:
    pad = loaded.model.generation_config.pad_token_id
    return pad if pad is not None else min(stops, default=0)


def _until_stop(row: list[int], stops: frozenset[int]) -> list[int]:
    """Cut off what fills a row up to the length of the longest."""
    end = next((place for place, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def _pool_is_full(request: GenerateRequest, manager: pagedkv.BlockManager, prompt_tokens: int) -> Failure:
    longest = request.rows * request.blocks_for(prompt_tokens + (request.token_limit or 0))
    return Failure(
        f"the pool of {manager.total_blocks} blocks of {manager.block_size} tokens is full: the whole call takes up to "
        f"{longest} blocks, so raise --num-blocks or lower --max-new-tokens"
    )


# What a run of ``pagedkv generate`` tells: the JSON object and the table.


class BlockUse(msgspec.Struct):
    """The pool when the last token was written.

    Attributes
    ----------
    used : int
        Blocks that sequences hold.
    shared : int
        Used blocks that two or more sequences hold.
    copied : int
        Blocks copied because a shared one was written to, over the whole run.
    cached : int
        Findable blocks that nobody holds.
    peak : int
        Most blocks used at a time.
    total : int
        Size of the pool.
    block_size : int
        Tokens per block.
    """

    used: int
    shared: int
    copied: int
    cached: int
    peak: int
    total: int
    block_size: int


class MemoryUse(msgspec.Struct):
    """K and V in bytes.

    Attributes
    ----------
    paged : int
        The blocks at the peak.
    contiguous : int
        One contiguous cache per sequence, with room for prompt and longest continuation.
    """

    paged: int
    contiguous: int


class GenerateReport(msgspec.Struct):
    """What ``pagedkv generate --json`` prints.

    Attributes
    ----------
    model, prompt : str
    seed : int
    texts : list of str
        The continuations, without the prompt.
    token_ids : list of list of int
        Their new tokens, the end-of-text token included.
    prompt_tokens, cached_tokens, new_tokens : int
        Tokens of the prompt; those of them whose K and V were found in the cache; new tokens of all samples.
    dropped_tokens : int
        Tokens that ``--stream`` gave back.
    blocks : BlockUse
    memory : MemoryUse
    seconds, tokens_per_second : float
        Of generation, reading the prompt included and loading the model left out.
    """

    model: str
    prompt: str
    seed: int
    texts: list[str]
    token_ids: list[list[int]]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    dropped_tokens: int
    blocks: BlockUse
    memory: MemoryUse
    seconds: float
    tokens_per_second: float


def print_json(report: GenerateReport) -> None:
    """Write the report to stdout as one line of JSON, in UTF-8 whatever the terminal has."""
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def print_table(report: GenerateReport, console: Console) -> None:
    """Show the figures of a run."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    console.print(table)


def _lines(report: GenerateReport) -> list[tuple[str, str]]:
    blocks, memory = report.blocks, report.memory
    lines = [
        ("prompt tokens", f"{report.prompt_tokens:,}"),
        ("cached tokens", f"{report.cached_tokens:,}"),
        ("new tokens", f"{report.new_tokens:,}"),
        (
            "blocks used",
            f"{blocks.used:,} of {blocks.total:,} ({blocks.block_size} tokens each), {blocks.peak:,} at peak",
        ),
        ("blocks shared", f"{blocks.shared:,}"),
        ("blocks copied", f"{blocks.copied:,}"),
        ("memory", _comparison(memory)),
        ("tokens/s", f"{report.tokens_per_second:,.1f}"),
    ]
    if report.dropped_tokens:
        lines.insert(3, ("dropped tokens", f"{report.dropped_tokens:,}"))
    return lines


def _comparison(memory: MemoryUse) -> str:
    text = f"{_bytes(memory.paged)}; a contiguous cache: {_bytes(memory.contiguous)}"
    return f"{text} ({memory.contiguous / memory.paged:.1f}×)" if memory.paged else text


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# Shows the text while it is written: the first sample live, the others when they are done.


class Screen:
    """Text on stdout, a spinner on stderr as long as there is nothing to show.

    Parameters
    ----------
    prompt : str
        Printed before each text; "" for nothing.
    samples : int
        How many texts will come.
    status : rich.status.Status
        The spinner, which says what is done meanwhile.
    silent : bool
        Show no text at all, only how far it is.
    """

    def __init__(self, prompt: str, samples: int, status: Status, silent: bool) -> None:
        self._prompt = prompt
        self._samples = samples
        self._silent = silent
        self._status = status
        self._begun = False
        self._ends_with_newline = True
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode must not end the text

    def __enter__(self) -> Screen:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._status.stop()
        if kind is not None and not issubclass(kind, BrokenPipeError):
            self.end_line()

    def show(self, piece: str) -> None:
        """Show a piece of the first text."""
        if self._silent:
            self._status.update("writing")
            return
        if not self._begun:
            self._status.stop()
            self._begin(0)
        self._write(piece)

    def finish(self, texts: list[str]) -> None:
        """Show what was not shown yet of all the texts."""
        self._status.stop()
        if self._silent:
            return
        for number, text in enumerate(texts):
            if number or not self._begun:
                self._begin(number)
                self._write(text)
            self.end_line()

    def end_line(self) -> None:
        """Begin a new line where the last one is not ended."""
        if not self._ends_with_newline and not self._silent:
            self._write("\n")

    def _begin(self, number: int) -> None:
        self._begun = True
        if self._samples > 1:
            self._write(f"--- sample {number + 1} of {self._samples} ---\n")
        self._write(self._prompt)

    def _write(self, text: str) -> None:
        if text:
            # What a model writes must not steer the terminal.
            sys.stdout.write(text.replace("\x1b", "␛") if sys.stdout.isatty() else text)
            sys.stdout.flush()
            self._ends_with_newline = text.endswith("\n")


def run(request: GenerateRequest) -> None:
    """Do what was asked for: text to stdout as it comes, then the figures.

    Raises
    ------
    Failure
        The request cannot be met; the text says what to change.
    """
    _check_strategy(request)
    check_folder(request.model_path)
    prompt = request.read_prompt()
    console = notes()
    with library_notices(console):
        with console.status("loading the model"):
            loaded = load_model(request.model_path, request.device)
        ids = loaded.encode(prompt)
        _check_length(request, loaded, len(ids))
        _check_memory(request, loaded, len(ids))
        doing = f"searching with {request.beams} beams" if request.beams > 1 else "reading the prompt"
        prefix = prompt if request.echo else ""
        screen = Screen(prefix, request.samples, console.status(doing), silent=request.json)
        with threads_for(loaded.model), screen:
            run = write_endlessly if request.stream else write
            written = run(request, loaded, ids, screen.show)
            texts = [_text(loaded, row, written.stop_tokens) for row in written.token_ids]
            screen.finish(texts)
    _tell(request, _report(request, prompt, len(ids), texts, written), written, console)


def _check_strategy(request: GenerateRequest) -> None:
    from pagedkv import InvalidOperation, parse_strategy

    try:
        parse_strategy(request.strategy)
    except InvalidOperation as error:
        raise Failure(f"--{error.reason}") from None


def _check_length(request: GenerateRequest, loaded: LoadedModel, prompt_tokens: int) -> None:
    limit = loaded.max_positions
    if limit is None:
        return
    if request.stream:
        if request.sinks + request.window >= limit:
            raise Failure(
                f"--sink-tokens and --window-tokens expect less than the model's {limit} positions together, "
                f"got {request.sinks + request.window}"
            )
    elif prompt_tokens + (request.token_limit or 0) > limit:
        raise Failure(
            f"the prompt of {prompt_tokens} tokens and {request.token_limit} new ones exceed the model's {limit} "
            f"positions: lower --max-new-tokens, or use --stream"
        )


def _check_memory(request: GenerateRequest, loaded: LoadedModel, prompt_tokens: int) -> None:
    """Refuse a pool beyond all memory: the system would grant it, and end the process when it is used."""
    blocks = request.pool_size(prompt_tokens)
    needed = blocks * request.block_size * loaded.bytes_per_token(request.kv_dtype)
    available = physical_memory()
    if available is not None and needed > available and loaded.model.device.type == "cpu":
        raise Failure(
            f"a pool of {blocks} blocks of {request.block_size} tokens takes {needed / 1e9:,.1f} GB, this machine has "
            f"{available / 1e9:,.1f}: lower --num-blocks, -n or --max-new-tokens"
        )


def _text(loaded: LoadedModel, row: list[int], stop_tokens: frozenset[int]) -> str:
    """Decode as the streamer does, so that what was shown and what is reported are the same."""
    pieces = TextPieces(loaded.tokenizer.decode)
    kept = row[:-1] if row and row[-1] in stop_tokens else row
    return "".join(map(pieces.add, kept)) + pieces.flush()


def _report(
    request: GenerateRequest, prompt: str, prompt_tokens: int, texts: list[str], written: Written
) -> GenerateReport:
    snapshot = written.snapshot
    refs = snapshot.ref_count
    new_tokens = sum(map(len, written.token_ids))
    longest = prompt_tokens + (request.token_limit or new_tokens)
    return GenerateReport(
        model=str(request.model_path),
        prompt=prompt,
        seed=request.seed,
        texts=texts,
        token_ids=written.token_ids,
        prompt_tokens=prompt_tokens,
        cached_tokens=written.cached_tokens,
        new_tokens=new_tokens,
        dropped_tokens=written.dropped_tokens,
        blocks=BlockUse(
            used=int((refs > 0).sum()),
            shared=int((refs > 1).sum()),
            copied=snapshot.stats.blocks_copied,
            cached=int(snapshot.cached.sum()),
            peak=snapshot.stats.peak_blocks_used,
            total=snapshot.total_blocks,
            block_size=snapshot.block_size,
        ),
        memory=MemoryUse(
            paged=snapshot.stats.peak_blocks_used * written.block_bytes,
            contiguous=request.rows * longest * written.block_bytes // snapshot.block_size,
        ),
        seconds=written.seconds,
        tokens_per_second=new_tokens / written.seconds if written.seconds else 0.0,
    )


def _tell(request: GenerateRequest, report: GenerateReport, written: Written, console: Console) -> None:
    if request.json:
        print_json(report)
    else:
        console.print()
        print_table(report, console)
    if request.show_blocks:
        console.print()
        console.print(BlockMap(written.snapshot))
