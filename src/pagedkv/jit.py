"""The one compiler door: ``@compiled`` is Numba's ``njit`` with our settings, and the first compile is announced."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numba.core import cgutils, event
from numba.extending import intrinsic

__all__ = ["borrowed", "called", "compiled", "inlined"]

Arrays = TypeVar("Arrays")
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
    """Compile a function of the hot path: cached on disk, without the GIL, exact arithmetic, always inlined.

    With ``NUMBA_DISABLE_JIT=1`` in the environment the function runs as plain Python.
    """
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = numba.njit(cache=True, nogil=True, forceinline=True, error_model="numpy")(function)
    return decorated


def inlined(function: Function) -> Function:
    """Compile a part of other compiled functions that Python never calls: it is kept on disk within them."""
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = numba.njit(nogil=True, forceinline=True, error_model="numpy")(function)
    return decorated


def called(function: Function) -> Function:
    """Compile a part that is long and rarely runs: as `inlined`, but it is called, so its callers stay small."""
    if numba.config.DISABLE_JIT:
        return _as_plain_python(function)
    decorated: Function = numba.njit(nogil=True, error_model="numpy")(function)
    return decorated


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if not isinstance(kind, numba.types.Array):
        for place, part in enumerate(kind.types):
            inner = _without_owner(context, builder, part, builder.extract_value(value, place))
            value = builder.insert_value(value, inner, place)
        return value
    array = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


@intrinsic
def _borrowed(typing_context: Any, arrays: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _without_owner(context, builder, signature.args[0], args[0])

    return arrays(arrays), generate


def borrowed(arrays: Arrays) -> Arrays:
    """Inside a compiled function: the same array, or named tuple of arrays and such tuples, without counts.

    Something else must keep the arrays alive meanwhile; the caller does so for arguments. Without this every inner
    call would count each of them up and down, atomically, which takes longer than the work itself.
    """
    return arrays


if not TYPE_CHECKING and not numba.config.DISABLE_JIT:
    borrowed = _borrowed
