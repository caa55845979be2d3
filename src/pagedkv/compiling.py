"""Compiles of kernels: none for what the disk cache has, one among processes, a progress line, a hook that counts."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from numba.core import caching
from numba.core.compiler_lock import global_compiler_lock

from pagedkv.kernel_cache import DiskCache, EntryLock, disk_cache, kernel_digest

logger = logging.getLogger("pagedkv")

Watcher = Callable[[str, float], None]


class _Progress:
    """One line in the log for each thing that takes time; on a terminal, a line that counts and is then cleared."""

    def __init__(self) -> None:
        self.count = 0
        self._width = 0
        self._said: set[str] = set()

    def compile(self, name: str, directory: str | None) -> None:
        kept = f" (kept in {directory})" if directory else ""
        if _is_terminal():
            self._show(f"pagedkv: compiling its kernels, once: {self.count} done, now {name}{kept}")
        elif directory:
            text = f"pagedkv: compiling its kernels; this happens once, the result is kept in {directory}"
            self.warn_once(text, "compile")

    def nowhere(self) -> None:
        self.warn_once(
            "pagedkv: compiling its kernels in every process, as no directory to keep them in can be written to; "
            "NUMBA_CACHE_DIR names one"
        )

    def wait(self) -> None:
        """Say that another process compiles; called again and again."""
        text = "pagedkv: waiting for another process that compiles its kernels"
        if _is_terminal():
            self._show(text)
        else:
            self.warn_once(text)

    def warn_once(self, text: str, topic: str = "") -> None:
        if (topic or text) not in self._said:
            self._said.add(topic or text)
            self.clear()
            logger.warning("%s", text)

    def _show(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        self._write("\r" + text.ljust(self._width))
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or a closed one
            sys.stderr.write(text)
            sys.stderr.flush()


def _is_terminal() -> bool:
    with contextlib.suppress(AttributeError, ValueError):
        return logger.isEnabledFor(logging.WARNING) and sys.stderr.isatty()
    return False


_progress = _Progress()
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watch_compiles(callback: Watcher) -> Iterator[None]:
    """Call back after every function that pagedkv compiles meanwhile, in any thread.

    Parameters
    ----------
    callback : callable
        Is given the function's name with its module, and the seconds that it took; those of the functions that were
        compiled within it are counted again in it. What is loaded from disk is not reported.
    """
    _watchers.append(callback)
    try:
        yield
    finally:
        _watchers.remove(callback)


class _Compile:
    """A function that is being compiled: it was not on the disk."""

    def __init__(self, name: str, directory: str | None, lock: EntryLock | None) -> None:
        self.name = name
        self.directory = directory
        self.lock = lock
        self.start = time.perf_counter()
        self.is_done = False


# The compiles that are going on, each within the one before it; guarded by Numba's compiler lock.
_running: list[_Compile] = []


class _KernelCache(caching.NullCache):
    """What Numba asks for a function's code before it compiles, and gives it to afterwards."""

    def __init__(self, function: Callable[..., Any], on_disk: bool) -> None:
        self._function = function
        self._on_disk = on_disk

    @functools.cached_property
    def _disk(self) -> DiskCache | None:
        return disk_cache(self._function) if self._on_disk else None

    @property
    def cache_path(self) -> str | None:
        return self._disk.directory if self._disk else None

    def flush(self) -> None:
        if self._disk:
            self._disk.flush()

    def load_overload(self, signature: Any, target: Any) -> Any:
        found, lock = None, None
        if self._disk:
            found = self._disk.load_overload(signature, target)
            if found is None:
                found, lock = self._wait(self._disk, signature, target)
        if found is None:
            if self._on_disk and self.cache_path is None:
                _progress.nowhere()
            _begin(_Compile(self._name, self._directory, lock))
        return found

    def _wait(self, disk: DiskCache, signature: Any, target: Any) -> tuple[Any, EntryLock | None]:
        """Return what another process saved meanwhile; if nothing, this one compiles and has the lock."""
        lock = disk.lock(signature, target)
        if lock is None:
            return None, None
        found = None
        try:
            if not lock.wait(_progress.wait):
                _progress.warn_once("pagedkv: waited too long for another process, compiling its kernels here too")
            # Saved while this process waited, or between its first look and its turn.
            found = disk.load_overload(signature, target)
        except BaseException:
            lock.release()
            raise
        if found is not None:
            lock.release()
        return found, lock

    @property
    def _name(self) -> str:
        return f"{self._function.__module__}.{self._function.__qualname__}"

    @property
    def _directory(self) -> str | None:
        """Where the code goes: that of a function without files of its own is kept in the code of its callers."""
        return _running[-1].directory if _running and not self._on_disk else self.cache_path

    def save_overload(self, signature: Any, data: Any) -> None:
        if self._disk:
            try:
                self._disk.save_overload(signature, data)
            except OSError as error:
                _progress.warn_once(f"pagedkv: its compiled kernels cannot be kept: {error}")
        if _running:
            _running[-1].is_done = True


def _begin(compile: _Compile) -> None:
    _running.append(compile)
    _progress.compile(compile.name, compile.directory)


def _end() -> None:
    """End the innermost compile, which failed unless it is done."""
    ended = _running.pop()
    if ended.lock:
        ended.lock.release()
    if ended.is_done:
        _progress.count += 1
    if _running:
        _progress.compile(_running[-1].name, _running[-1].directory)
    else:
        _progress.clear()
    if ended.is_done:
        for watcher in list(_watchers):
            watcher(ended.name, time.perf_counter() - ended.start)


def manage(dispatcher: Any, *, on_disk: bool) -> Any:
    """Give a function of Numba this module's cache, and return it.

    Parameters
    ----------
    dispatcher : Dispatcher
        What `numba.njit` made, without its own cache and without signatures.
    on_disk : bool
        Whether its code is kept in files of its own. If not, it is kept within the code of the functions that call it.
    """
    kernel_digest()  # of the sources that are being imported
    dispatcher._cache = _KernelCache(dispatcher.py_func, on_disk)
    compile_it = dispatcher.compile

    @functools.wraps(compile_it)
    def compile(signature: Any) -> Any:
        # A failed compile saves nothing: only here is it known that it has ended.
        with global_compiler_lock:
            depth = len(_running)
            try:
                return compile_it(signature)
            finally:
                while len(_running) > depth:
                    _end()

    dispatcher.compile = compile
    return dispatcher
