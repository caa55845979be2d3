"""``pagedkv chat``: a chat in the terminal or over a pipe; yesterday's goes on without being read again."""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from pagedkv.cli.chats import FORMS, Answer, Chat, Chats, ChatStore, ChatTokens, private_folder
from pagedkv.cli.loading import LoadedModel, load_model, require_dtype, require_kv_dtype, require_weights
from pagedkv.cli.model_source import ModelArgument, ModelSource, find_model
from pagedkv.cli.terminal import (
    DebugOption,
    Failure,
    facts_table,
    failures_in_one_line,
    from_options,
    library_notices,
    notes,
    options_from,
    threads_for,
)
from pagedkv.cli.writing import of_folder, shown_safely, warm_up
from pagedkv.errors import InvalidOperation, PagedKvError, TierError
from pagedkv.format import duration, format_bytes, percent
from pagedkv.server.config import setting
from pagedkv.validate import require_choice, require_int, require_number, require_size

if TYPE_CHECKING:
    from pagedkv.engine import LLM, SamplingParams
    from pagedkv.tiers import Tier
    from pagedkv.typing import Dtype, Weights

EXAMPLES = """Chat with a language model whose keys and values live in paged blocks, in memory and on the disk.

[bold]Examples[/bold]

  pagedkv chat ./my-chat-model

  pagedkv chat model-Q4_K_M.gguf --system "Answer in one sentence."

  pagedkv chat HuggingFaceTB/SmolLM2-135M-Instruct --continue

  echo "What is a KV cache?" | pagedkv chat ./my-chat-model

A message is a line; [bold]\"\"\"[/bold] begins and ends one of several lines, and so does a backslash at the end of a
line. Ctrl-C stops an answer, Ctrl-D ends. Commands begin with a slash: /help lists them.

Chats are kept in files, their keys and values beside them in a disk tier, so that a chat goes on at once.
A model without a chat template goes on from what is typed.
"""

COMMANDS = {
    "/system [TEXT]": "show the system prompt, or set it; new chats have it, too",
    "/new [NAME]": "begin another chat under the same system prompt",
    "/fork [NAME]": "go on in a copy of this chat",
    "/chats": "list the open chats, and those in files",
    "/load NAME": "go on with another chat",
    "/save [NAME]": "write the chat to its file now; with a name, call it so",
    "/retry": "let the last message be answered again",
    "/stats": "what the cache holds, shares and saved",
    "/model [MODEL]": "show the model, or go on with another one",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}

DISK_SIZE = 2 * 10**9
"""Bytes of keys and values on the disk where no size is given, and a tenth of what is free is not less."""

_MODEL, _SAMPLING, _KEEPING, _POOL = "The model", "What to write", "What is kept", "The pool"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The options of ``pagedkv chat``, checked before anything heavy is loaded; None was not given."""

    system: str | None = setting(None, "What the model is told before the first message.", shown=False, group=_MODEL)
    form: str | None = setting(
        None,
        "How a chat is written out: template, roles (user: …), text (as it is).",
        shown="the model's template; text where it has none",
        group=_MODEL,
    )
    device: str = setting("cpu", "A torch device: cpu, cuda, cuda:1.", group=_MODEL)
    dtype: str = setting("auto", "auto (as stored), float32, bfloat16, float16.", group=_MODEL)
    weights: str | None = setting(
        None, "Weights in 8 bits: int8, on the CPU, in compiled mode.", shown="as stored", group=_MODEL
    )
    max_new_tokens: int = setting(1024, "Stop an answer after so many tokens.", group=_SAMPLING)
    temperature: float = setting(0.7, "0 takes the likeliest token.", group=_SAMPLING)
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this total probability.", group=_SAMPLING)
    seed: int | None = setting(
        None, "The same seed gives the same answers.", shown="another each time", group=_SAMPLING
    )
    load: str | None = setting(None, "Go on with the chat of this name.", shown=False, group=_KEEPING)
    last: bool = setting(False, "Go on with the last chat.", flag="--continue,-c", group=_KEEPING)
    sessions: Path | None = setting(
        None,
        "The folder of chats, and of their keys and values.",
        shown="$XDG_DATA_HOME/pagedkv/chats",
        env="PAGEDKV_SESSIONS",
        group=_KEEPING,
    )
    disk: bool = setting(True, "Keep chats, keys and values on the disk.", group=_KEEPING)
    disk_size: str | None = setting(
        None,
        "Bytes of keys and values that are kept of a model.",
        shown="2GB, or a tenth of what is free",
        group=_KEEPING,
    )
    num_blocks: int | None = setting(None, "Blocks of the pool.", group=_POOL, shown="from the memory")
    block_size: int = setting(16, "Tokens per block.", group=_POOL)
    kv_dtype: str | None = setting(
        None,
        "Of keys and values: float32, bfloat16, float16, or quantised: int8, fp8.",
        group=_POOL,
        shown="as the model",
    )

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_kv_dtype(self.kv_dtype)
        require_weights(self.weights)
        if self.form is not None:
            require_choice("form", self.form, FORMS)
        require_int("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        require_number("temperature", self.temperature, 0, 1e9)
        require_number("top_p", self.top_p, 1e-9, 1)
        if self.seed is not None:
            require_int("seed", self.seed, 0, 2**62)
        if self.disk_size is not None:
            require_size("disk_size", self.disk_size)
        if self.load is not None and self.last:
            raise Failure("--load and --continue do not go together")
        if not self.disk and (self.load is not None or self.last):
            raise Failure(f"{'--continue' if self.last else '--load'} does not go with --no-disk")

    @property
    def folder(self) -> Path:
        """Where chats are kept."""
        if self.sessions is not None:
            return self.sessions.expanduser()
        home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        return Path(home).expanduser() / "pagedkv" / "chats"


@options_from(ChatOptions)
def chat(
    context: typer.Context,
    model: ModelArgument = None,
    *,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Gather the options and chat; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug, context):
        given = from_options(ChatOptions, options)
        source = find_model(model, "MODEL")
        Screen(given, Typist(given.folder if given.disk else None)).run(source)


# What is typed.


class Typist:
    """Messages and commands from a terminal, with a history of them, or from a pipe.

    Parameters
    ----------
    folder : Path, optional
        Where the history of what was typed is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if self.is_terminal:
            _remember(None if folder is None else folder / "history")

    def read(self) -> str | None:
        """Return the next message or command; None where there are no more."""
        line = self._line(">>> ")
        if line is None:
            return None
        if line.lstrip().startswith('"""'):
            return self._block(line.lstrip()[3:])
        lines = [line]
        while lines[-1].endswith("\\"):
            more = self._line("... ")
            lines[-1] = lines[-1][:-1]
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines)

    def _block(self, begun: str) -> str:
        lines = [begun] if begun else []
        while not (lines and lines[-1].rstrip().endswith('"""')):
            more = self._line("... ")
            if more is None:
                return "\n".join(lines)
            lines.append(more)
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).rstrip("\n")

    def _line(self, prompt: str) -> str | None:
        try:
            if self.is_terminal:
                return input(prompt)
            line = sys.stdin.readline()
        except EOFError:
            print()
            return None
        except UnicodeError:
            raise Failure("what comes from stdin is not valid UTF-8") from None
        return line.rstrip("\n") if line else None


def _remember(history: Path | None) -> None:
    """Let lines be edited and called back, those of earlier chats too."""
    try:
        import readline
    except ImportError:  # as on Windows: lines can be typed all the same
        return
    if history is None:
        return
    try:
        private_folder(history.parent)
        history.touch(mode=0o600)
        readline.read_history_file(history)
    except OSError:
        return
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, history)


# What is shown.


class Screen:
    """A chat on the terminal: answers to stdout, all else to stderr."""

    def __init__(self, options: ChatOptions, typist: Typist) -> None:
        self._options, self._typist, self._console = options, typist, notes()
        self._is_over = False

    def run(self, source: ModelSource | None) -> None:
        """Chat until there is nothing more to read; another model is loaded in between where it is asked for.

        Two may not fit into the memory, so the one before is gone by then: where the other cannot be had, it is loaded
        again.
        """
        before: Chats | None = None
        last: ModelSource | None = None
        while source is not None:
            with ExitStack() as open_now:
                try:
                    chats = open_now.enter_context(opened(self._options, source, self._console))
                except (PagedKvError, MemoryError, KeyboardInterrupt) as error:
                    if last in (None, source) or not self._typist.is_terminal:
                        raise
                    why = "stopped" if isinstance(error, KeyboardInterrupt) else "there is no memory for it"
                    self._say(f"/model {source.name}: {str(error) or why}", style="red")
                    source = last
                    continue
                self._greet(source, chats)
                if before is None:
                    self._begin(chats)
                else:
                    chats.take_over(before)
                source, before, last = self._converse(chats), chats, source

    def _converse(self, chats: Chats) -> ModelSource | None:
        """Answer messages and obey commands; returns the model that is to take over, None at the end."""
        while True:
            try:
                text = self._typist.read()
            except KeyboardInterrupt:
                if not self._typist.is_terminal:
                    raise
                print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
                continue
            if text is None or text.split() == ["/quit"]:
                return None
            try:
                if text.lstrip().startswith("/"):
                    source = self._obey(chats, text.strip())
                    if source is not None:
                        return source
                elif text.strip():
                    self._answer(chats, lambda show, text=text: chats.say(text, show))  # type: ignore[misc]
            except PagedKvError as error:
                if not self._typist.is_terminal:
                    raise
                self._say(str(error), style="red")
            except KeyboardInterrupt:
                if not self._typist.is_terminal:
                    raise
                self._say("stopped")

    def _answer(self, chats: Chats, ask: Callable[[Callable[[str], None]], Answer]) -> None:
        status = self._console.status("reading")
        ends_well = True

        def show(piece: str) -> None:
            nonlocal ends_well
            status.stop()
            sys.stdout.write(shown_safely(piece))
            sys.stdout.flush()
            ends_well = piece.endswith("\n")

        with status:
            answer = ask(show)
        if not ends_well:
            print(flush=True)
        if answer.finish_reason == "length" and answer.new_tokens >= self._options.max_new_tokens:
            self._say(f"(cut after {answer.new_tokens:,} tokens: --max-new-tokens)")
        if answer.finish_reason == "abort":
            self._say("(stopped)" if answer.new_tokens else "(stopped before the first token: nothing was said)")
        self._say(_took(answer))
        self._keep(chats)

    def _keep(self, chats: Chats) -> None:
        """Save the chat: over a pipe only one that has a name of its own."""
        if chats.store is not None and (self._typist.is_terminal or chats.current.name in chats.store.names()):
            chats.save()

    def _obey(self, chats: Chats, line: str) -> ModelSource | None:
        command, _, rest = line.partition(" ")
        name = rest.strip() or None
        if command == "/system":
            self._system(chats, name)
        elif command == "/new":
            chats.new(name or fresh_name(chats))
            self._say(f"chat {chats.current.name}")
        elif command == "/fork":
            chats.fork(name or fresh_name(chats))
            self._say(f"chat {chats.current.name}, a copy of what was said so far")
        elif command == "/save":
            chats.save(name)
            self._say(f"saved as {chats.current.name}")
        elif command == "/load" and name is not None:
            self._load(chats, name)
        elif command in ("/load", "/chats"):
            self._list(chats)
        elif command == "/retry":
            if not self._options.temperature:
                self._say("(--temperature is 0: the answer will be the same)")
            self._answer(chats, chats.retry)
        elif command == "/stats":
            self._console.print(facts_table(stats_of(chats)))
        elif command == "/model":
            if name is not None:
                return find_model(name, "/model")
            self._say(chats.model)
        elif command == "/help":
            self._console.print(facts_table(COMMANDS.items()))
        else:
            raise Failure(f"there is no command {command}: /help lists them; put a space before a message like this")
        return None

    def _system(self, chats: Chats, text: str | None) -> None:
        if text is None:
            self._say(chats.current.system or "(no system prompt)")
            return
        before, chats.current.system = chats.current.system, text
        try:
            chats.tokens.token_ids(chats.current, open_answer=bool(chats.current.messages))
        except Failure:  # a template that takes none
            chats.current.system = before
            raise
        if chats.current.messages:
            self._say("the chat is read again from its beginning with the next message")

    def _load(self, chats: Chats, name: str) -> None:
        with self._console.status("reading the chat"):
            read = chats.load(name)
        self._say(f"chat {name}: {len(chats.current.messages)} messages")
        for message in chats.current.messages[-2:] if self._typist.is_terminal else ():
            self._console.print(Text(f"{'>>> ' * (message.role == 'user')}{shown_safely(message.content)}"))
        if read is not None:
            self._say(_brought(read))

    def _list(self, chats: Chats) -> None:
        rows = [(f"{'*' if chats.current.name == name else ' '} {name}", fact) for name, fact in chats.facts()]
        stored = [] if chats.store is None else [name for name in chats.store.names() if name not in chats.open]
        self._console.print(facts_table([*rows, *((f"  {name}", "in a file") for name in stored)]))

    def _greet(self, source: ModelSource, chats: Chats) -> None:
        sizes = chats.llm.sizes
        facts = [f"{source.name}: {sizes.total_blocks:,} blocks of {sizes.block_size} tokens"]
        for tier in chats.llm.stats().tiers:
            facts.append(f"{tier.blocks:,} of {tier.total_blocks:,} on the disk")
        self._say(", ".join(facts) + ("; /help" if self._typist.is_terminal else ""))
        if self._options.form is None and chats.tokens.form == "text":
            self._say(
                f"{source.name} has no chat template, so it was hardly trained to answer: it goes on from your text"
            )

    def _begin(self, chats: Chats) -> None:
        """Go on with the chat that was asked for."""
        options, store = self._options, chats.store
        name = options.load
        if options.last and store is not None:
            name = next(iter(store.names()), None)
            if name is None:
                raise Failure(f"--continue: there is no chat in {store.folder} yet")
        if name is not None:
            unused = chats.current
            if store is not None and options.load is not None and name not in store.names():
                chats.new(name)
                store.save(chats.current)
            else:
                self._load(chats, name)
            chats.open.pop(unused.name, None)
            if options.system is not None and options.system != chats.current.system:
                self._system(chats, options.system)

    def _say(self, text: str, style: str = "dim") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def fresh_name(chats: Chats | None = None) -> str:
    """Return a name that no chat has: the time of day."""
    name = base = time.strftime("%Y-%m-%d %H.%M.%S")
    taken = {*chats.open, *(chats.store.names() if chats.store else ())} if chats is not None else set()
    number = 1
    while name in taken:
        number += 1
        name = f"{base}-{number}"
    return name


def _took(answer: Answer) -> str:
    """Return in a line what an answer took, and what did not have to be computed for it."""
    found = f"{answer.cached_tokens:,} of {answer.prompt_tokens:,} tokens before it were not computed"
    if answer.disk_tokens:
        found += f", {answer.disk_tokens:,} came from the disk"
    return (
        f"{answer.new_tokens:,} tokens, {answer.tokens_per_second:,.1f}/s, the first after "
        f"{duration(answer.first_token)}; {found}"
    )


def _brought(read: Answer) -> str:
    """Return in a line where the text of a chat came from."""
    computed, pool = read.prompt_tokens - read.cached_tokens, read.cached_tokens - read.disk_tokens
    parts = [f"{read.disk_tokens:,} from the disk", f"{computed:,} computed"]
    if pool:
        parts.insert(1, f"{pool:,} in the pool already")
    return f"{read.prompt_tokens:,} tokens: {', '.join(parts)}, in {duration(read.seconds)}"


def stats_of(chats: Chats) -> Iterator[tuple[str, str]]:
    """Yield what ``/stats`` shows."""
    shared, llm = chats.sharing(), chats.llm
    size = shared.block_bytes
    yield "model", f"{chats.model}, chats written as {chats.tokens.form}"
    yield "chat", f"{chats.current.name}, {len(chats.current.messages)} messages"
    held = f"{shared.used:,} blocks hold {shared.chats:,} {'chat' if shared.chats == 1 else 'chats'}"
    yield "blocks", held if shared.chats == 1 else f"{held}; apart they would take {shared.apart:,}"
    yield (
        "memory",
        f"{format_bytes(shared.used * size)}; a cache for each chat: {format_bytes(shared.apart * size)}; "
        f"preallocated for the longest: {format_bytes(shared.preallocated * size)}",
    )
    part = shared.cached_tokens / shared.prompt_tokens if shared.prompt_tokens else 0.0
    yield (
        "not computed",
        f"{shared.cached_tokens:,} of {shared.prompt_tokens:,} prompt tokens ({percent(part)}), "
        f"{shared.disk_tokens:,} of them from the disk",
    )
    for tier in llm.stats().tiers:
        yield "disk", f"{tier.blocks:,} of {tier.total_blocks:,} blocks, {tier.loads:,} loaded, {tier.stores:,} stored"
    if chats.last is not None:
        yield "last answer", _took(chats.last)


# The engine behind it.


@contextmanager
def opened(options: ChatOptions, source: ModelSource, console: Console) -> Iterator[Chats]:
    """Load a model, and have its chats, at first a new one, open for as long as the body runs."""
    with library_notices(console), console.status(f"loading {source.name}"):
        loaded = load_model(source, options.device, options.dtype)
        tokens = ChatTokens(loaded, options.form)  # type: ignore[arg-type]
        params = _params(options, loaded.model.generation_config, tokens)
        num_parameters = loaded.model.num_parameters()
        llm = _engine(options, source, loaded, console)
    with threads_for(num_parameters), llm:
        with library_notices(console), console.status("warming up"):
            warm_up(llm)
        store = ChatStore(options.folder) if options.disk else None
        yield Chats(llm, tokens, source.name, params, Chat(fresh_name(), options.system), store)


def _params(options: ChatOptions, of_model: Any, tokens: ChatTokens) -> SamplingParams:
    """Return the sampling parameters; what is no option is as the model's ``generation_config.json`` has it."""
    from pagedkv.engine import SamplingParams

    return SamplingParams(
        max_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=tokens.stops,
        **of_folder(of_model, "top_k", "min_p", "repetition_penalty"),
    )


def _engine(options: ChatOptions, source: ModelSource, loaded: LoadedModel, console: Console) -> LLM:
    """Return the engine, with the disk behind it where it can be had."""
    from pagedkv.engine import LLM
    from pagedkv.engine.llm import default_blocks, default_states
    from pagedkv.hf import load_runner

    at_once = 4  # by which the pool has its size: a chat is answered at a time
    runner = load_runner(
        loaded.model,
        num_blocks=options.num_blocks or default_blocks(loaded.model, options.block_size, at_once),
        block_size=options.block_size,
        kv_dtype=cast("Dtype | None", options.kv_dtype),
        weights=cast("Weights | None", options.weights),
        keep_model=False,
        num_states=default_states(loaded.model, at_once),
    )

    def behind(tiers: list[Tier]) -> LLM:
        return LLM(runner, loaded.tokenizer, max_num_seqs=at_once, tiers=tiers)

    try:
        return behind(_tiers(options, source))
    except (TierError, InvalidOperation) as error:
        if isinstance(error, InvalidOperation) and error.argument != "size":
            raise
        if options.disk_size is not None and isinstance(error, InvalidOperation):
            raise Failure(f"--disk-size{error.reason.removeprefix('size')}") from None
        why = error
    try:  # another chat writes to it, say
        engine = behind(_tiers(options, source, read_only=True))
        said = "read, and nothing is stored"
    except TierError:
        engine, said = behind([]), "left alone"
    console.print(Text(f"the disk is {said}: {why}", style="yellow"), soft_wrap=True)
    return engine


def _tiers(options: ChatOptions, source: ModelSource, *, read_only: bool = False) -> list[Tier]:
    """Return the disk tier: a directory for each model, and for each way to run it, as it holds blocks of one kind."""
    if not options.disk:
        return []
    from pagedkv.tiers import DiskTier

    way = [source.path.resolve(), options.dtype, options.weights, options.kv_dtype, options.block_size, options.device]
    digest = hashlib.sha256(repr(way).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", source.name)
    directory = options.folder / "blocks" / f"{name}-{digest}"
    try:
        private_folder(options.folder)
        private_folder(directory.parent)
    except OSError as error:
        raise Failure(f"--sessions: cannot write {directory.parent}: {error.strerror or error}") from error
    held = sum(file.stat().st_size for file in directory.glob("*") if file.is_file())
    size = options.disk_size or min(DISK_SIZE, (shutil.disk_usage(directory.parent).free + held) // 10)
    return [DiskTier(directory, size, read_only=read_only)]
