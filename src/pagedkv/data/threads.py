"""Running a kernel in several threads at once: torch's own, so that nobody fights for the cores.

OpenMP's threads go on spinning for milliseconds after torch's last parallel operation, waiting for the next one. A
second pool of threads would share the cores with them, and lose; a kernel that runs *in* them finds them awake.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch

__all__ = ["num_threads", "run_in_threads"]

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def num_threads() -> int:
    """Return how many threads a kernel may use: as many as torch does (``torch.set_num_threads``)."""
    return 1 if numba.config.DISABLE_JIT else torch.get_num_threads()  # type: ignore[attr-defined]


def run_in_threads(kernel: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    """Call ``kernel(*arguments)`` in ``threads`` threads at the same time and wait for all of them.

    The kernel releases the GIL, and its threads share out the work among themselves.
    """
    if threads <= 1:
        kernel(*arguments)
        return
    errors: list[BaseException] = []

    def body(_: Any = None) -> None:
        try:
            kernel(*arguments)
        except BaseException as error:  # noqa: B036 - must not vanish in a foreign thread
            errors.append(error)

    parallel = _openmp()
    if parallel is not None:
        parallel(_CALLBACK(body), None, threads, 0)
    else:
        others = [_pool(os.getpid(), threads).submit(body) for _ in range(threads - 1)]
        body()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """Return ``GOMP_parallel`` of the OpenMP library that torch has loaded, where it has that entry."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):  # another platform, or another OpenMP
        return None
    parallel.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    call: Callable[..., None] = parallel
    return call


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked child has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="pagedkv")
