"""Shows the text while it is written: the first sample live, the others when they are done."""

from __future__ import annotations

import sys
from typing import Any

from rich.status import Status

__all__ = ["Screen"]


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
