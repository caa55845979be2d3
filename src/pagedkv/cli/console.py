"""Where things are printed: results to stdout, everything about them to stderr."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

__all__ = ["library_notices", "notes", "output"]


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
