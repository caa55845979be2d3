"""How a command fails: one clear line on stderr and exit code 2; a traceback only where it was asked for."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from pagedkv.errors import MissingExtra, PagedKvError

# Where things are printed: results to stdout, everything about them to stderr.


class _Output(Console):
    """Says that nobody reads on, where rich would end the process with an exit code of its own."""

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
def failures_in_one_line(debug: bool) -> Iterator[None]:
    """Turn every failure of the body into a line and an exit code.

    Parameters
    ----------
    debug : bool
        Print the traceback before the line.

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
        say_error(_message(error))
        raise typer.Exit(FAILED) from None


def _message(error: Exception) -> str:
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
