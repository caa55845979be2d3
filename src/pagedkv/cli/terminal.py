"""Terminal input and output of commands: consoles, errors in one line, options, config file, progress bars."""

from __future__ import annotations

import difflib
import errno
import inspect
import json
import logging
import os
import shlex
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pagedkv.errors import InvalidOperation, MissingExtra, PagedKvError

Settings = TypeVar("Settings")


class _Output(Console):
    """Raises BrokenPipeError, where rich would end the process with an exit code of its own."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


def output() -> Console:
    """Return a console on today's stdout."""
    return _Output(file=sys.stdout, highlight=False)


def notes() -> Console:
    """Return a console on today's stderr."""
    return Console(file=sys.stderr, highlight=False)


class _Notice(logging.Handler):
    """Shows what the library has to say, that it compiles for instance, as one dim line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(" ".join(record.getMessage().split()), style="dim"), soft_wrap=True)


@contextmanager
def library_notices(console: Console) -> Iterator[None]:
    """Show the messages of the logger ``pagedkv`` on a console for as long as the body runs."""
    logger, handler = logging.getLogger("pagedkv"), _Notice(console)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


FAILED = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


class Failure(PagedKvError):
    """What the user has to change, in one line."""


def say_error(message: str) -> None:
    """Write a message to stderr as one line."""
    print("pagedkv: error:", " ".join(message.split()), file=sys.stderr, flush=True)


@contextmanager
def failures_in_one_line(debug: bool, context: typer.Context | None = None) -> Iterator[None]:
    """Turn every failure of the body into a line and an exit code: 2, 130 after Ctrl-C, 141 where the output is closed.

    With the context of the command, an argument that the library refuses is called by the option that carries it.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _discard_stdout()
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        say_error(_message(error, context))
        raise typer.Exit(FAILED) from None


def _message(error: Exception, context: typer.Context | None) -> str:
    if isinstance(error, InvalidOperation) and error.argument and context:
        flag = next((_flag(given) for given in context.command.params if given.name == error.argument), None)
        if flag is not None:
            return f"{flag}{error.reason.removeprefix(error.argument)}"
    if isinstance(error, PagedKvError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _LIBRARIES:
        return str(MissingExtra(str(error.name).partition(".")[0], "hf"))
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line} (run it again with --debug for the traceback)"


def _discard_stdout() -> None:
    """Send what is still buffered nowhere: the interpreter flushes at its end and would complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            return


# How every command declares an option: with its help, in a panel.


def option(*names: str, help: str, panel: str | None = None, default: str | bool = True, env: str | None = None) -> Any:
    """Return an option of these names; `default` is whether, or as what, the help shows the default."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default, envvar=env)


def _flag(parameter: Any) -> str:
    """Return how a parameter is written on the command line."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return "".join(filter(str.isalpha, parameter.metavar or parameter.name.upper()))


# The options that several commands share.

TraceArgument = Annotated[
    Path, typer.Argument(metavar="TRACE", help="A trace in any known format, gzipped or not.", show_default=False)
]
FormatOption = Annotated[
    str | None, option("--format", help="The format of the trace.", default="recognised", panel="The trace")
]
BlockTokensOption = Annotated[
    int | None, option("--block-tokens", help="Tokens per block.", default="what the format says", panel="The trace")
]
SkipBadOption = Annotated[
    bool, option("--skip-bad", help="Count broken lines and go on without them.", panel="The trace")
]
JobsOption = Annotated[
    int | None, option("--jobs", "-j", help="Processes.", default="one a core, if it is worth it", panel="How")
]
HtmlOption = Annotated[
    Path | None, option("--html", help="Write a report to this file.", default=False, panel="What to show")
]
JsonOption = Annotated[bool, option("--json", help="Print one JSON object instead.", panel="What to show")]
DebugOption = Annotated[bool, option("--debug", help="Show the traceback of an error.", panel="What to show")]

_NOT_REPEATED = ("jobs", "json", "csv", "html", "debug")


def command_line(context: typer.Context) -> str:
    """Return the command as it can be typed again to make its report, without what only says where results go."""
    words = ["pagedkv", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in _NOT_REPEATED or value in (None, parameter.default):
            continue
        if parameter.param_type_name == "argument":
            words.append(Path(value).name)  # some versions of typer leave it a text here
        elif value is True:
            words.append(_flag(parameter))
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [_flag(parameter), str(one)]
    return shlex.join([*words, "--html", str(context.params["html"])])


# Options from the fields of a dataclass, which pagedkv.server.config.setting makes, and from a config file.


def options_from(*settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of some dataclasses; they reach its ``**options`` by their names.

    The help shows them before the parameters of the command that are keyword-only.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        hints = {kind: get_type_hints(kind) for kind in settings}
        has_file = any(each.name == "config" for each in own)  # what it turns on the command line has to turn off
        made = [
            _parameter(each, hints[kind][each.name], has_file)
            for kind in settings
            for each in fields(kind)
            if each.metadata
        ]
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            sorted([*made, *own], key=lambda each: each.kind)
        )
        return command

    return decorate


def _names(setting: Field[Any]) -> list[str]:
    return str(setting.metadata["flag"] or "--" + setting.name.replace("_", "-")).split(",")


def _parameter(setting: Field[Any], hint: Any, has_file: bool) -> inspect.Parameter:
    told, names, default = setting.metadata, _names(setting), setting.default
    if default is True or (default is False and has_file):
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    if told["from_file"]:
        hint = Path | None
    elif get_origin(hint) is tuple:
        hint, default = list[str], []
    elif get_origin(hint) is Literal:
        hint = type(get_args(hint)[0])
    made = option(*names, help=told["help"], panel=told["group"], default=told["shown"], env=told["env"])
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, made]
    )


def from_options(kind: type[Settings], options: Mapping[str, Any]) -> Settings:
    """Return the dataclass that the options of a command make; `Failure` where a file of them cannot be read."""
    given = {}
    for each in fields(kind):  # type: ignore[arg-type]
        value = options[each.name]
        if each.metadata.get("from_file"):
            value = read_text(_names(each)[0], value)
        given[each.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def _keys(command: Any) -> dict[str, str]:
    """Return the names that a file may use, by the library or the option, with the parameter that each sets."""
    settings = [each for each in command.params if each.name != "config"]
    flags = {flag[2:].replace("-", "_"): str(each.name) for each in settings for flag in each.opts if flag[:2] == "--"}
    return flags | {str(each.name): str(each.name) for each in settings}


def _require_type(key: str, value: Any, annotation: Any) -> None:
    """Raise `ValueError` where a value of a file is not what the parameter is annotated with."""
    hint = get_args(annotation)[0]
    may_be_missing = NoneType in get_args(hint)
    plain = next((each for each in get_args(hint) if each is not NoneType), hint) if may_be_missing else hint
    plain = str if plain is Path else plain
    try:
        msgspec.convert(value, plain | None if may_be_missing else plain)
    except msgspec.ValidationError:
        said = json.dumps(value, ensure_ascii=False, default=str)
        raise ValueError(f"{key}: expected {_MEANT.get(plain, plain)}, got {said}") from None


_MEANT = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of texts",
}


def _settings_of(command: Any, given: Any) -> dict[str, Any]:
    """Return what a file says by the names of the parameters; `ValueError` where a command has no such setting."""
    if not isinstance(given, dict):
        raise ValueError("expected settings by their names")
    names, hints, taken = _keys(command), inspect.signature(command.callback).parameters, dict[str, Any]()
    for key, value in given.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(key.replace("-", "_"), names, 1)
            meant = f"did you mean {near[0]}?" if near else f"expected {', '.join(sorted(set(names.values())))}"
            raise ValueError(f"{key} is no setting; {meant}")
        if name in taken:
            raise ValueError(f"{key}: expected {name} once, got it under two names")
        _require_type(key, value, hints[name].annotation)
        taken[name] = value
    return taken


def _take_defaults(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        text = read_text("--config", path) or ""
        given = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except Failure as error:
        raise typer.BadParameter(str(error)) from None
    except ValueError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from None
    try:
        context.default_map = _settings_of(context.command, given)
    except ValueError as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    return path


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML or JSON file with any of the settings, by the names of library or options; options go before it.",
        show_default=False,
        is_eager=True,
        callback=_take_defaults,
    ),
]


# What commands read and write: JSON on stdout, tables, files.


def read_text(flag: str, path: Path | None) -> str | None:
    """Return the text of a file that an option names, None without one; `Failure` where it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{flag}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def print_json(value: Any, indent: int = -1) -> None:
    """Write a value to stdout as JSON, in UTF-8 whatever the terminal has; on one line if it is not indented."""
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=indent) + b"\n")
    sys.stdout.buffer.flush()


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and what belongs to each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts:
        table.add_row(name, Text(fact))
    return table


def require_writable(option: str, file: Path | None) -> None:
    """Raise `Failure` now, not after minutes of work, where a file is a folder or its folder is missing."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise Failure(f"{option}: expected a file in a folder that exists, got {file}")


def write_file(option: str, file: Path, text: str) -> None:
    """Write a whole file, or raise `Failure`."""
    try:
        file.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise Failure(f"{option} cannot write {file}: {error.strerror or error}") from error


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show a bar for as long as the body runs, on a terminal only, and the messages of the library above it.

    Yields a function from what is done at the moment to a callback that is told how much of it, of how much.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        library_notices(console),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=None, visible=False)

        def shows(what: str) -> Callable[[int, int], None]:
            def show(done: int, asked: int) -> None:
                progress.update(task, description=what, completed=done, total=asked or None, visible=True)

            return show

        yield shows


# How many threads torch gets: more than one is a loss where the work of a layer is small.

_SMALL = 100_000_000
"""Parameters. Below it one token takes a layer some microseconds, and threads wait for each other longer than that."""


def is_small(num_parameters: int) -> bool:
    """Whether a model is written fastest on one thread."""
    return num_parameters < _SMALL


@contextmanager
def threads_for(num_parameters: int) -> Iterator[None]:
    """Let torch run on one thread while a small model writes; ``OMP_NUM_THREADS`` in the environment has its way.

    On cores that other processes use too, threads that wait for each other after every small product cost far more
    than they bring.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and is_small(num_parameters):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
