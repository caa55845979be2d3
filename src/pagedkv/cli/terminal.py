"""Terminal output of commands: consoles, errors in one line, shared options, progress bars."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from pagedkv.errors import InvalidOperation, MissingExtra, PagedKvError


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
    """Turn every failure of the body into a line and an exit code.

    Parameters
    ----------
    debug : bool
        Print the traceback before the line.
    context : typer.Context, optional
        Of the command: an argument that the library refuses is then called by the option that carries it.

    Raises
    ------
    typer.Exit
        With 2 after an error, 130 after Ctrl-C, 141 where nobody reads the output any more.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _let_go_of_stdout()
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


def _let_go_of_stdout() -> None:
    """Send what is still buffered nowhere: the interpreter flushes at its end and would complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            return


# How every command declares an option: with its help, in a panel.


def option(*names: str, help: str, panel: str, default: str | bool = True, env: str | None = None) -> Any:
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
            words.append(getattr(value, "name", str(value)))
        elif value is True:
            words.append(_flag(parameter))
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [_flag(parameter), str(one)]
    return shlex.join([*words, "--html", str(context.params["html"])])


# What commands write: JSON on stdout, files.


def print_json(encoded: bytes) -> None:
    """Write one line of JSON to stdout, in UTF-8 whatever the terminal has."""
    sys.stdout.flush()
    sys.stdout.buffer.write(encoded + b"\n")
    sys.stdout.buffer.flush()


def require_writable(option: str, file: Path | None) -> None:
    """Find out now, not after minutes of work, that a file cannot be written.

    Raises
    ------
    Failure
        It is a folder, or its folder is missing.
    """
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise Failure(f"{option}: expected a file in a folder that exists, got {file}")


def write_file(option: str, file: Path, text: str) -> None:
    """Write a whole file.

    Raises
    ------
    Failure
        It cannot be written.
    """
    try:
        file.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise Failure(f"{option} cannot write {file}: {error.strerror or error}") from error


class ProgressBar:
    """One bar on a terminal that says what is done at the moment; elsewhere it shows nothing."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, visible=False)

    def shows(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that is told how much is done, of how much."""

        def show(done: int, asked: int) -> None:
            self._progress.update(self._task, description=what, completed=done, total=asked or None, visible=True)

        return show


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressBar]:
    """Show a bar for as long as the body runs, and the messages of the library above it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        library_notices(console),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        yield ProgressBar(progress)


# How many threads torch gets: more than one is a loss where the work of a layer is small.

_SMALL = 100_000_000
"""Parameters. Below it one token takes a layer some microseconds, and threads wait for each other longer than that."""


@contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """Let torch run on one thread while a small model writes; ``OMP_NUM_THREADS`` in the environment has its way.

    On cores that other processes use too, threads that wait for each other after every small product cost far more
    than they bring.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
