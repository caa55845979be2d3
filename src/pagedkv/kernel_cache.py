"""Disk cache of compiled kernels: the digest of their sources, the directory, the files, the lock between processes.

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
import glob
import hashlib
import logging
import os
import pickle
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite  # type: ignore[import-untyped]
import numba
from numba.core import caching, config
from numba.core.serialize import dumps

logger = logging.getLogger("pagedkv")

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

_KERNEL_FILE = re.compile(rb"^[ \t]*(?:from|import)[ \t]+(?:numba|pagedkv\.jit)\b", re.MULTILINE)
# Each begins with a fixed word, which is found several times faster than the begin of a line.
_FROM_IMPORT = re.compile(rb"from[ \t]+(pagedkv[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)")
_IMPORT = re.compile(rb"import[ \t]+(pagedkv[\w.]*)")
_ENTRY_NAME = re.compile(r"-([0-9a-f]{16})-[0-9a-f]{16}\.nbc")


# The sources


class _Sources(NamedTuple):
    """The state of the kernels' sources when the first kernel was defined: what this process has imported."""

    digest: str
    stamps: dict[Path, tuple[int, int]]

    def are_unchanged(self) -> bool:
        """Whether a new process would find the same; if not, it must not find what this one compiles."""
        try:
            return all(_stamp(path) == stamp for path, stamp in self.stamps.items())
        except OSError:
            return False


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def kernel_files(package: Path = _PACKAGE) -> dict[str, Path]:
    """Return the files that compiled code can come from, by module name.

    These are all files that import Numba or the decorators of `pagedkv.jit`, and what they import from the package, and
    so on: a constant that a kernel uses stands in one of them. They are found by reading every file of the package.

    Parameters
    ----------
    package : Path
        The folder of the package; another one than this for a copy.
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


@functools.cache
def _sources() -> _Sources:
    files = kernel_files()
    stamps = {path: _stamp(path) for path in files.values()}
    settings = [f"{name}={os.environ.get(name, '')}" for name in _SETTINGS]
    digest = hashlib.sha256("\n".join([numba.__version__, llvmlite.__version__, *settings]).encode())
    for name, path in files.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return _Sources(digest.hexdigest()[:16], stamps)


def kernel_digest() -> str:
    """Return the digest of the kernels' sources, of the compiler's version and of its settings, in the file names."""
    return _sources().digest


# Where


class _NowhereLocator(caching.InTreeCacheLocator):
    """Stands where no directory can be written to."""

    def ensure_cache_path(self) -> None:
        raise PermissionError(f"{self.get_cache_path()} cannot be written to")


class _Locator:
    """Numba's choice of a directory, the same one for all kernels of the package.

    That is ``NUMBA_CACHE_DIR`` if it is set, else ``__pycache__`` in the package, else the user's cache directory: the
    first that can be written to.
    """

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Any:
        home = _home(file)
        for locator in caching.CompileResultCacheImpl._locator_classes:
            found = locator.from_function(function, home)
            if found is not None:
                return found
        return _NowhereLocator(function, home)


def _home(file: str) -> str:
    return __file__ if _PACKAGE in Path(file).parents else file


def _readable_directories(function: Callable[..., Any]) -> Iterator[str]:
    """Yield where code may lie that was shipped, and that Numba would not look at unless it can write there."""
    home = _home(function.__code__.co_filename)
    if config.CACHE_DIR:
        yield caching.UserProvidedCacheLocator(function, home).get_cache_path()
    yield caching.InTreeCacheLocator(function, home).get_cache_path()


def cache_directory() -> Path | None:
    """Return the directory that new compiled code is kept in, or None if it is not kept.

    Set ``NUMBA_CACHE_DIR`` to choose another one. None means that no directory can be written to, or that
    ``NUMBA_DISABLE_JIT`` is set and nothing is compiled.
    """
    if config.DISABLE_JIT:
        return None
    cache = disk_cache(cache_directory)
    return None if cache is None or cache.directory is None else Path(cache.directory)


# The files


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes: Any = [_Locator]

    def __init__(self, function: Callable[..., Any]) -> None:
        self._module = str(function.__module__).removeprefix("pagedkv.")
        self._qualname = function.__qualname__
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        base = super().get_filename_base(f"{self._module}.{self._qualname}", abiflags)
        return f"{base}-{kernel_digest()}"


class _Entries:
    """The files of a function: one for each signature and processor, named after all that it depends on."""

    def __init__(self, base: str, stamp: object, directories: list[str], is_writable: bool) -> None:
        self.base = base
        self.stamp = stamp
        self.directories = directories
        self.is_writable = is_writable

    def name(self, key: object) -> str:
        identity = hashlib.sha256(repr((self.stamp, key)).encode()).hexdigest()
        return f"{self.base}-{identity[:16]}.nbc"

    def load(self, key: object) -> Any:
        """Return what was saved under the key, or None; a damaged file counts as none and is soon replaced."""
        for directory in self.directories:
            try:
                saved_key, data = pickle.loads(Path(directory, self.name(key)).read_bytes())
            except FileNotFoundError:
                continue
            except Exception as error:
                logger.debug("pagedkv: cannot load %s: %r", self.name(key), error)
                continue
            if saved_key == key:
                return data
        return None

    def save(self, key: object, data: Any) -> None:
        directory, name = self.directories[0], self.name(key)
        temporary = Path(directory, f"{name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(dumps((key, data)))
            temporary.replace(Path(directory, name))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _remove_old_states(directory)

    def remove(self) -> None:
        for path in Path(self.directories[0]).glob(f"{glob.escape(self.base)}-*.nbc"):
            path.unlink(missing_ok=True)


@functools.cache
def _remove_old_states(directory: str) -> None:
    """Remove, once a process, the code of all states of the sources but the newest few.

    A process that looks for a file that is just removed compiles it again.
    """
    newest: dict[str, float] = {}
    files: dict[str, list[Path]] = {}
    for path in Path(directory).iterdir():
        match = _ENTRY_NAME.search(path.name)
        if match:
            with contextlib.suppress(OSError):
                digest = match[1]
                newest[digest] = max(newest.get(digest, 0.0), path.stat().st_mtime)
                files.setdefault(digest, []).append(path)
    newest[kernel_digest()] = float("inf")
    for digest in sorted(newest, key=lambda digest: newest[digest])[:-_KEPT_STATES]:
        for path in files[digest]:
            with contextlib.suppress(OSError):
                path.unlink()


class DiskCache(caching.FunctionCache):
    """Numba's cache of one function, with the names, the files and the lock of this module."""

    _impl_class = _Implementation

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        writable = [] if isinstance(locator, _NowhereLocator) else [locator.get_cache_path()]
        readable = [path for path in _readable_directories(function) if path not in writable]
        self._entries = self._cache_file = _Entries(
            self._impl.filename_base, locator.get_source_stamp(), writable + readable, bool(writable)
        )

    @property
    def directory(self) -> str | None:
        """Where new code is kept; None if nowhere."""
        return self._entries.directories[0] if self._entries.is_writable else None

    def flush(self) -> None:
        """Remove what is kept."""
        if self._entries.is_writable:
            self._entries.remove()

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the code for a signature, or None if there is none that can be used."""
        try:
            return super().load_overload(signature, target)
        except Exception as error:
            logger.debug("pagedkv: cannot use the kept code of %s: %r", self._name, error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep new code, unless the sources changed since this process imported them."""
        if self._entries.is_writable and _sources().are_unchanged():
            super().save_overload(signature, data)

    def lock(self, signature: Any, target: Any) -> EntryLock | None:
        """Return the lock of an entry, or None where nothing is kept."""
        if self.directory is None:
            return None
        name = self._entries.name(self._index_key(signature, target.codegen()))
        return EntryLock(_lock_file(self.directory), int(hashlib.sha256(name.encode()).hexdigest(), 16) % _LOCK_BYTES)


def disk_cache(function: Callable[..., Any]) -> DiskCache | None:
    """Return the cache of a function, or None if it has no source file, or no place in those that the user chose."""
    try:
        return DiskCache(function)
    except (OSError, RuntimeError):
        return None


# The lock


if sys.platform == "win32":
    import msvcrt

    def _lock_byte(file: int, place: int) -> None:
        os.lseek(file, place, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _unlock_byte(file: int, place: int) -> None:
        os.lseek(file, place, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock_byte(file: int, place: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)

    def _unlock_byte(file: int, place: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, place)


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

    def __init__(self, file: int | None, place: int) -> None:
        self.file = file
        self.place = place
        self.is_held = False

    def wait(self, on_wait: Callable[[], None]) -> bool:
        """Take the lock, calling back again and again meanwhile; return False after waiting for too long."""
        end = time.monotonic() + _WAIT_SECONDS
        while not self._try():
            if time.monotonic() > end:
                return False
            on_wait()
            time.sleep(0.05)
        return True

    def _try(self) -> bool:
        if self.file is None:
            return True
        try:
            _lock_byte(self.file, self.place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        self.is_held = True
        return True

    def release(self) -> None:
        """Let another process go on; does nothing if the lock is not held."""
        if self.is_held and self.file is not None:
            self.is_held = False
            with contextlib.suppress(OSError):
                _unlock_byte(self.file, self.place)
