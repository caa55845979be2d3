"""A progress bar, where one is wanted."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Shows how many of `total` requests are done.

    Parameters
    ----------
    total : int
    show : bool
        Nothing is shown, or loaded, if not.
    """

    def __init__(self, total: int, show: bool) -> None:
        self._total, self._show = total, show
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._show:
            from rich.progress import MofNCompleteColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(*Bar.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
            self._task = self._bar.add_task("requests", total=self._total)
            self._bar.start()
        return self

    def advance(self) -> None:
        """Count one more."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
