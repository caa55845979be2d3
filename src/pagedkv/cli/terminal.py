"""How a command fails: one clear line on stderr and exit code 2; a traceback only where it was asked for."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pagedkv.errors import MissingExtra, PagedKvError

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
