"""The one compiler door: ``@compiled`` is Numba's ``njit`` with our settings, and the first compile is announced."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core import event

__all__ = ["compiled"]

Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger("pagedkv")


class _FirstCompile(event.Listener):
    """Says once per process that Numba compiles; a load from the disk cache stays silent."""

    def __init__(self) -> None:
        self.announced = False

    def on_start(self, event: Any) -> None:
        name = event.data["dispatcher"].py_func.__module__
        if not self.announced and name.startswith("pagedkv."):
            self.announced = True
            logger.warning("pagedkv: compiling its kernels; this happens once, the result is kept on disk")

    def on_end(self, event: Any) -> None:
        return


event.register("numba:compile", _FirstCompile())


def _as_plain_python(function: Function) -> Function:
    """Let a function of the hot path run uncompiled: its integers wrap around as they do in machine code."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with np.errstate(over="ignore"):
            return function(*args)

    return run  # type: ignore[return-value]


def compiled(function: Function) -> Function:
    """Compile a function of the hot path: cached on disk, without the GIL, exact arithmetic.

    With ``NUMBA_DISABLE_JIT=1`` in the environment the function runs as plain Python.
    """
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return decorated
