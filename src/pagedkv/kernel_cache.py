"""Disk cache of compiled kernels: digest of their sources, files, the lock between processes, progress, Ctrl-C.

Numba's own disk cache watches the file of a function alone, while a kernel holds code and constants of many files.
Here the name of a cached entry has a digest of all sources that can end in machine code, so that a change in any of
them gives new code, and an unchanged tree loads what is there. Every entry is one file, named after everything that
it depends on and replaced in one step: processes that write at the same time cannot mix up their code, and the lock
that lets one of them compile while the others wait only saves work.

Lock order: Numba's global compiler lock, then the locks of entries, from a kernel to the kernels that it calls. The
first is held by one thread of a process; the second are held between processes, and no kernel calls itself by way of
another one, so two processes never wait for each other. If they did, the limit of waiting would end it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import inspect
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite  # type: ignore[import-untyped]
import numba
from numba.core import caching, config
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.serialize import dumps

logger = logging.getLogger("pagedkv")

Watcher = Callable[[str, float], None]
Stamps = dict[Path, tuple[int, int]]

_PACKAGE = Path(__file__).parent
# Of this many states of the sources code is kept on disk, so that going back to another branch compiles nothing.
_KEPT_STATES = 3
# A process that waits longer for another one compiles by itself: the other may be stopped, or the lock be broken.
_WAIT_SECONDS = 300.0
# The size of the lock file, in theory: what Windows allows. Two entries that share a byte would share a lock.
_LOCK_BYTES = 2**31 - 1
# Settings of Numba that change the code but not the key under which Numba keeps it.
_SETTINGS = (
    "NUMBA_BOUNDSCHECK",
    "NUMBA_DEBUGINFO",
    "NUMBA_LOOP_VECTORIZE",
    "NUMBA_OPT",
    "NUMBA_SLP_VECTORIZE",
)

_KERNEL_FILE = re.compile(rb"^(?:from|import)[ \t]+(?:numba|pagedkv\.jit)\b", re.MULTILINE)
# Each begins with a fixed word, which is found several times faster than the begin of a line.
_FROM_IMPORT = re.compile(rb"from[ \t]+(pagedkv[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)")
_IMPORT = re.compile(rb"import[ \t]+(pagedkv[\w.]*)")
_ENTRY_NAME = re.compile(r"-([0-9a-f]{16})-[0-9a-f]{16}\.nbc")


# The sources


def kernel_files(package: Path = _PACKAGE) -> dict[str, Path]:
    """Return the files of a package that compiled code can come from, by module name.

    These are all files that import Numba or the decorators of `pagedkv.jit`, and what they import from the package, and
    so on: a constant that a kernel uses stands in one of them. They are found by reading every file of the package.
    """
    paths = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        paths[".".join(("pagedkv", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    texts = {name: path.read_bytes() for name, path in paths.items()}
    open_ends = [name for name, text in texts.items() if _is_kernel_file(text)]
    found: dict[str, Path] = {}
    while open_ends:
        name = open_ends.pop()
        if name not in found:
            found[name] = paths[name]
            open_ends += [other for other in _imported(texts[name]) if other in paths]
    return {name: found[name] for name in sorted(found)}


def _is_kernel_file(text: bytes) -> bool:
    return (b"numba" in text or b"pagedkv.jit" in text) and bool(_KERNEL_FILE.search(text))


def _imported(text: bytes) -> Iterator[str]:
    """Yield the modules that a file imports, and what may be modules: every name that it imports from one."""
    for module in _IMPORT.findall(text):
        yield module.decode()
    for origin, names in _FROM_IMPORT.findall(text):
        yield origin.decode()
        for word in re.findall(rb"\w+", names):
            yield f"{origin.decode()}.{word.decode()}"


def _stamps_of(files: Iterable[Path]) -> Stamps:
    """Return time and size of files, without those that are gone."""
    found = {path: path.stat() for path in files if path.exists()}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}


@functools.cache
def _sources() -> tuple[str, Stamps]:
    """Return digest and stamps of the sources when the first kernel was defined: what this process has imported."""
    files = kernel_files()
    stamps = _stamps_of(files.values())
    settings = [f"{name}={os.environ.get(name, '')}" for name in _SETTINGS]
    digest = hashlib.sha256("\n".join([numba.__version__, llvmlite.__version__, *settings]).encode())
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16], stamps


def _are_sources_unchanged() -> bool:
    """Tell whether a new process would find the same; if not, it must not find what this one compiles."""
    stamps = _sources()[1]
    return _stamps_of(stamps) == stamps


def kernel_digest() -> str:
    """Return the digest of the kernels' sources, of the compiler's version and of its settings, in the file names."""
    return _sources()[0]


# The files


class _Files:
    """The files of a function's code: one for each signature and processor, named after all that it depends on.

    New code goes to the first directory that can be written to of ``NUMBA_CACHE_DIR``, if it is set, ``__pycache__`` in
    the package, and the user's cache directory. Code that was shipped is found in the first two even where Numba would
    not look for it, as it cannot write there.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        file = function.__code__.co_filename
        home = __file__ if _PACKAGE in Path(file).parents else file  # one directory for all kernels of the package
        writable = (kind.from_function(function, home) for kind in caching.CacheImpl._locator_classes)
        chosen = next(filter(None, writable), None)
        shipped: list[Any] = [caching.InTreeCacheLocator(function, home)]
        if config.CACHE_DIR:
            shipped.insert(0, caching.UserProvidedCacheLocator(function, home))
        place = chosen or shipped[-1]
        self.directory: str | None = chosen.get_cache_path() if chosen else None
        self._readable = dict.fromkeys(locator.get_cache_path() for locator in [place, *shipped])
        self._stamp = place.get_source_stamp()
        name = re.sub("[<>]", "", f"{function.__module__}.{function.__qualname__}".removeprefix("pagedkv."))
        python = f"py{sys.version_info[0]}{sys.version_info[1]}{getattr(sys, 'abiflags', '')}"
        self._base = f"{name}-{place.get_disambiguator()}.{python}-{kernel_digest()}"

    def _name(self, key: object) -> str:
        return f"{self._base}-{hashlib.sha256(repr((self._stamp, key)).encode()).hexdigest()[:16]}.nbc"

    def load(self, key: object, target: Any) -> Any:
        """Return the code that was saved under the key, or None; a damaged file counts as none and is soon replaced."""
        for directory in self._readable:
            try:
                saved_key, data = pickle.loads(Path(directory, self._name(key)).read_bytes())
                if saved_key == key:
                    return CompileResult._rebuild(target, *data)
            except FileNotFoundError:
                continue
            except Exception as error:
                logger.debug("pagedkv: cannot use the kept code in %s: %r", self._name(key), error)
        return None

    def save(self, key: object, code: Any) -> None:
        """Keep new code, unless it depends on this process, or the sources changed since this process imported them."""
        if self.directory is None or code.library.has_dynamic_globals or not _are_sources_unchanged():
            return
        temporary = Path(self.directory, f"{self._name(key)}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(dumps((key, code._reduce())))
            temporary.replace(Path(self.directory, self._name(key)))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _remove_old_states(self.directory)

    def lock(self, key: object) -> EntryLock | None:
        """Return the lock of an entry, or None where nothing is kept."""
        return EntryLock(self.directory, self._name(key)) if self.directory else None


def _files_of(function: Callable[..., Any]) -> _Files | None:
    """Return the files of a function, or None if it has no source file."""
    try:
        return _Files(function)
    except OSError:
        return None


def cache_directory() -> Path | None:
    """Return the directory that new compiled code is kept in, or None if it is not kept.

    Set ``NUMBA_CACHE_DIR`` to choose another one. None means that no directory can be written to, or that
    ``NUMBA_DISABLE_JIT`` is set and nothing is compiled.
    """
    files = None if config.DISABLE_JIT else _files_of(cache_directory)
    return None if files is None or files.directory is None else Path(files.directory)


@functools.cache
def _remove_old_states(directory: str) -> None:
    """Remove, once a process, the code of all states of the sources but the newest few.

    A process that looks for a file that is just removed compiles it again.
    """
    paths = list(Path(directory).iterdir())
    found = [(match[1], path) for path in paths if (match := _ENTRY_NAME.search(path.name))]
    newest = {kernel_digest(): math.inf}
    for digest, path in found:
        with contextlib.suppress(OSError):
            newest[digest] = max(newest.get(digest, 0.0), path.stat().st_mtime)
    kept = sorted(newest, key=newest.__getitem__)[-_KEPT_STATES:]
    for digest, path in found:
        if digest not in kept:
            with contextlib.suppress(OSError):
                path.unlink()


# The lock


if sys.platform == "win32":
    import msvcrt

    def _set_lock(file: int, place: int, *, held: bool) -> None:
        os.lseek(file, place, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK if held else msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _set_lock(file: int, place: int, *, held: bool) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB if held else fcntl.LOCK_UN, 1, place)


@functools.cache
def _lock_file(directory: str) -> int | None:
    """Open the lock file of a directory, for the life of the process: closing it would free all its locks."""
    try:
        return os.open(os.path.join(directory, "pagedkv.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None


class EntryLock:
    """A lock between processes: one byte of the lock file, so that a directory needs only one such file.

    The operating system frees it when its holder dies, and a forked process does not inherit it. Where locks do not
    work it counts as taken: every process compiles for itself.
    """

    def __init__(self, directory: str, name: str) -> None:
        self._file = _lock_file(directory)
        self._place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _LOCK_BYTES
        self._is_held = False

    def wait(self, on_wait: Callable[[], None]) -> bool:
        """Take the lock, calling back again and again meanwhile; return False after waiting for too long."""
        end = time.monotonic() + _WAIT_SECONDS
        while self._file is not None:
            try:
                _set_lock(self._file, self._place, held=True)
                self._is_held = True
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    return False
            except OSError:
                break
            on_wait()
            time.sleep(0.05)
        return True

    def release(self) -> None:
        """Let another process go on; does nothing if the lock is not held."""
        if self._is_held and self._file is not None:
            self._is_held = False
            with contextlib.suppress(OSError):
                _set_lock(self._file, self._place, held=False)


# Ctrl-C


class _Patient:
    """A handler of SIGINT in another one's place: keeps a first signal for later, and lets both through at a second."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self._before = before
        self._process = os.getpid()
        self._has_come = False

    def __call__(self, number: int, frame: Any) -> None:
        # In a process that was forked meanwhile nothing ends this, unless it was this thread that forked.
        if self._has_come or os.getpid() != self._process:
            self.end()
            self._before(number, frame)
        else:
            self._has_come = True

    def obey(self) -> None:
        """Do what the handler before this one does, if a signal has come."""
        if self._has_come:
            self._has_come = False
            self._before(signal.SIGINT, inspect.currentframe())

    def end(self) -> None:
        """Put the handler before this one back into its place, and let it do what it was kept from."""
        is_there = signal.getsignal(signal.SIGINT) is self
        if is_there:
            signal.signal(signal.SIGINT, self._before)
        self.obey()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the body ends; who presses it twice gets out at once.

    Numba and LLVM are not made for an exception that comes from nowhere. It was lost where LLVM calls back to Python,
    left the compiler's lock taken for ever, or types half registered, so that no kernel could be compiled any more.
    """
    before = signal.getsignal(signal.SIGINT)
    is_asked = threading.current_thread() is threading.main_thread()  # no other thread gets signals, nor may it do this
    if not is_asked or not callable(before) or isinstance(before, _Patient):
        yield
        return
    patient = _Patient(before)
    signal.signal(signal.SIGINT, patient)
    try:
        yield
    finally:
        patient.end()


def _wait_patiently() -> None:
    """Say that another process compiles, and obey Ctrl-C: nothing is half done, and it may take minutes."""
    _progress.wait()
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Patient) and threading.current_thread() is threading.main_thread():
        handler.obey()


# The compiles


class _Progress:
    """One line in the log for each thing that takes time; on a terminal, a line that counts and is then cleared."""

    def __init__(self) -> None:
        self.count = 0
        self._width = 0
        self._said: set[str] = set()

    def compile(self, name: str, directory: str | None) -> None:
        kept = f" (kept in {directory})" if directory else ""
        once = f"pagedkv: compiling its kernels; this happens once, the result is kept in {directory}"
        self._show(
            f"pagedkv: compiling its kernels, once: {self.count} done, now {name}{kept}", once if directory else ""
        )

    def wait(self) -> None:
        """Say that another process compiles; called again and again."""
        text = "pagedkv: waiting for another process that compiles its kernels"
        self._show(text, text)

    def warn_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.clear()
            logger.warning("%s", text)

    def _show(self, on_terminal: str, in_log: str) -> None:
        if _is_terminal():
            text = on_terminal[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif in_log:
            self.warn_once(in_log)

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


@dataclass
class _Compile:
    """A function that is being compiled: it was not on the disk."""

    name: str
    directory: str | None
    lock: EntryLock | None
    start: float = 0.0
    is_done: bool = False


# The compiles that are going on, each within the one before it; guarded by Numba's compiler lock.
_running: list[_Compile] = []


class _KernelCache(caching.NullCache):
    """What Numba asks for a function's code before it compiles, and gives it to afterwards."""

    def __init__(self, function: Callable[..., Any], options: object, on_disk: bool) -> None:
        self._py_func = function
        self._options = options
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._on_disk = on_disk

    @functools.cached_property
    def _files(self) -> _Files | None:
        return _files_of(self._py_func) if self._on_disk else None

    @property
    def cache_path(self) -> str | None:
        return self._files.directory if self._files else None

    def _key(self, signature: Any, codegen: Any) -> object:
        # With the options: one function is compiled for Python, and otherwise for the kernels that it is a part of.
        return caching.FunctionCache._index_key(self, signature, codegen), self._options  # type: ignore[arg-type]

    def load_overload(self, signature: Any, target: Any) -> Any:
        target.refresh()
        files, lock = self._files, None
        if files:
            key = self._key(signature, target.codegen())
            found = files.load(key, target)
            if found is not None:
                return found
            lock = files.lock(key)
        # The code of a function without files of its own is kept in that of its callers.
        directory = _running[-1].directory if _running and not self._on_disk else self.cache_path
        this = _Compile(self._name, directory, lock)
        _running.append(this)
        if files and lock:
            if not lock.wait(_wait_patiently):
                _progress.warn_once("pagedkv: waited too long for another process, compiling its kernels here too")
            # Saved while this process waited, or between its first look and its turn.
            found = files.load(key, target)
            if found is not None:
                _end()
                return found
        if self._on_disk and self.cache_path is None:
            _progress.warn_once(
                "pagedkv: compiling its kernels in every process, as no directory to keep them in can be written to; "
                "NUMBA_CACHE_DIR names one"
            )
        this.start = time.perf_counter()
        _progress.compile(this.name, this.directory)
        return None

    def save_overload(self, signature: Any, code: Any) -> None:
        if self._files:
            try:
                self._files.save(self._key(signature, code.codegen), code)
            except OSError as error:
                _progress.warn_once(f"pagedkv: its compiled kernels cannot be kept: {error}")
        if _running:
            _running[-1].is_done = True


def _end() -> None:
    """End the innermost compile, which failed or was not needed unless it is done."""
    ended = _running.pop()
    if ended.lock:
        ended.lock.release()
    if ended.is_done:
        _progress.count += 1
        gc.collect(0)  # what this compile left over, before the next one makes as much
    if _running:
        _progress.compile(_running[-1].name, _running[-1].directory)
    else:
        _progress.clear()
    if ended.is_done:
        for watcher in list(_watchers):
            watcher(ended.name, time.perf_counter() - ended.start)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Let Python collect no garbage by itself: a compile makes a million objects, and each walk goes over all of them.

    That took a quarter of the time of a compile. At the end of each its own are walked, once: 1% of the time, and a
    compile of the forward pass takes 120 to 150 MiB less.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# In a child nobody could let go of the lock that another thread of its parent held: a fork waits for a compile to end.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def manage(dispatcher: Any, *, on_disk: bool) -> None:
    """Give a function of Numba, without a cache or signatures of its own, this module's cache.

    Its code is kept in files of its own (`on_disk`), or within the code of the functions that call it.
    """
    kernel_digest()  # of the sources that are being imported
    options = tuple(sorted(dispatcher.targetoptions.items()))
    dispatcher._cache = _KernelCache(dispatcher.py_func, options, on_disk)
    compile_it = dispatcher.compile

    @functools.wraps(compile_it)
    def compile(signature: Any) -> Any:
        # A failed compile saves nothing: only here is it known that it has ended.
        with uninterrupted(), global_compiler_lock, _without_collections():
            depth = len(_running)
            try:
                return compile_it(signature)
            finally:
                while len(_running) > depth:
                    _end()

    dispatcher.compile = compile
