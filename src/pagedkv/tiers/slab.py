"""The files of a disk tier: a slab of slots for payloads, and a record of each slot, written in place.

=============  ========================================================================================================
``meta.json``  what the blocks are of, and a key drawn when the tier began or was cleared: records of another are void
``slab``       slot i at ``i * slot_bytes``, whole pages; preallocated, so that a disk that fills up is no matter
``records``    record i tells of slot i
``lock``       held by the one writer
=============  ========================================================================================================

Nothing is believed without a proof, so no order of writes matters and nothing has to be synced to be right:

* A record holds a sum of itself that begins with the key.
* It names its parent by slot and generation. A slot has another generation for each content, never one twice, and the
  record has the token ids themselves: a chain is exact, and no digest stands for a text.
* It holds the checksum of the payload. One that was half written, or overwritten since, does not fit.

So any mixture of old and new pages, after a kill or a power cut, costs blocks and never gives a wrong one, and readers
need no lock. Salts are named by a digest under the key.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.control.restore import NO_BLOCK, NO_PARENT, BlockRecords
from pagedkv.errors import TierError, bad_argument
from pagedkv.format import format_bytes
from pagedkv.jit import borrowed, compiled, mix64
from pagedkv.tiers.book_tier import Entries, Kept
from pagedkv.tiers.tier import BlockFormat, Rows
from pagedkv.tiers.transfers import Ints, Sums

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "pagedkv tier"
SCHEMA = 1
PAGE = 4096

_FILES = ("meta.json", "meta.json.new", "slab", "records", "lock")
_NO_TIER = "expected the directory of a tier, got one without"
_NOT_OURS = "expected a directory of a tier, got a meta.json that is none of ours"
_SYNC_SECONDS = 5.0
_LOCK_SECONDS = 0.2
"""How long a lock is tried for: one who only asks who writes holds it for a moment."""
# Locks, and the order of what is written, mean less on these; a tier there would be slow as well.
_NETWORK = "nfs nfs4 cifs smb3 smbfs 9p afs ceph lustre glusterfs fuse.glusterfs fuse.sshfs fuse.s3fs".split()

logger = logging.getLogger("pagedkv")


def record_dtype(block_size: int) -> np.dtype[Any]:
    """Return the layout of a record: 128 bytes where a block has 16 tokens."""
    fields: list[Any] = [
        ("sum", "<u8"),
        ("generation", "<u8"),
        ("parent_generation", "<u8"),
        ("checksum", "<u8"),
        ("salt", "<u8", 2),
        ("last_access", "<i8"),
        ("parent", "<i4"),
        ("access_count", "<i4"),
        ("token_ids", "<i4", block_size),
    ]
    return np.dtype([*fields, ("unused", "u1", -np.dtype(fields).itemsize % 64)])


@compiled
def sum_records(words: npt.NDArray[np.uint64], key: np.uint64, sums: npt.NDArray[np.uint64]) -> None:
    """Compute the sum of each row of words beyond the first."""
    words, sums = borrowed(words), borrowed(sums)
    for i in range(len(words)):
        mixed = key
        for j in range(1, words.shape[1]):
            mixed = mix64(mixed ^ words[i, j])
        sums[i] = mixed


class Slab:
    """The slots of a disk tier; see the module for the files.

    Parameters
    ----------
    directory : str or Path
        Empty, not there yet, or a tier's.
    size : int
        The most bytes of all its files.
    durable : bool
        Whether a store is on the medium before it is findable; else that follows within seconds. Either way what is
        found is right.
    is_read_only : bool
        Whether another process writes: nothing is locked or changed, and `size` means nothing.
    """

    medium = "DISK"

    def __init__(self, directory: str | Path, size: int, *, durable: bool = False, is_read_only: bool = False) -> None:
        self.directory = Path(directory)
        self.is_read_only = is_read_only
        self._size = size
        self._durable = durable
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._key = bytes(32)
        self._synced_at = time.monotonic()
        self._generation = secrets.randbits(31) << 32
        self._generations = np.zeros(0, np.uint64)
        self._dtype = record_dtype(1)
        self._block = BlockFormat("none", 1, 1)
        self._slot_bytes = PAGE

    def open(self, block: BlockFormat) -> Kept:
        """Open the files, or make them.

        Raises
        ------
        TierError
            If the directory cannot be had; nothing in it is changed then.
        InvalidOperation
            If not even one block fits into the size.
        """
        self._block = block
        self._dtype = record_dtype(block.block_size)
        self._slot_bytes = -(-block.block_bytes // PAGE) * PAGE
        try:
            with contextlib.ExitStack() as opened:
                opened.callback(self._let_go)
                kept = self._open_to_read() if self.is_read_only else self._open_to_write()
                opened.pop_all()
                return kept
        except OSError as error:
            raise self._said(error) from error

    def _open_to_read(self) -> Kept:
        meta = self._read_meta()
        if meta is None:
            raise self._error(_NO_TIER)
        if not self._is_ours(meta):
            raise self._error("holds blocks of another model: other weights, settings or shapes")
        self._key = bytes.fromhex(meta["key"])
        for name in ("slab", "records"):
            self._files[name] = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._kept(self.num_slots)

    def _open_to_write(self) -> Kept:
        num_slots = self._size // (self._slot_bytes + self._dtype.itemsize)
        if num_slots < 1:
            raise bad_argument("size", f"at least {self._slot_bytes + self._dtype.itemsize} bytes", f"{self._size}")
        if fcntl is None:
            raise self._error("needs file locks as POSIX has them")
        if (network := file_system_of(self.directory)) in _NETWORK:
            raise self._error(f"expected a local file system, got {network}")
        self._read_meta()  # refuses what is not ours, before anything is written
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        meta = self._read_meta()
        self._require_room(num_slots)
        if meta is None or not self._is_ours(meta):
            if meta is not None:
                logger.warning("tier %s held blocks of another model: they are dropped", self.directory)
            self._begin_anew()
        else:
            self._key = bytes.fromhex(meta["key"])
        self._generation = secrets.randbits(31) << 32
        for name, size in (("slab", self._slot_bytes), ("records", self._dtype.itemsize)):
            self._files[name] = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._allocate(name, num_slots * size)
        return self._kept(num_slots)

    # Whose the directory is.

    def format(self) -> BlockFormat:
        """Return what the directory holds blocks of; nothing is locked or changed.

        Raises
        ------
        TierError
            If it is no directory of a tier, of another version, or cannot be read.
        """
        try:
            meta = self._read_meta()
        except OSError as error:
            raise self._said(error) from error
        if meta is None:
            raise self._error(_NO_TIER)
        try:
            block = BlockFormat(meta["fingerprint"], meta["block_size"], meta["block_bytes"])
            record_dtype(block.block_size)
        except (KeyError, ValueError) as error:
            raise self._error(_NOT_OURS) from error
        return block

    def writer(self) -> str | None:
        """Return the id of the process that writes to the directory, None if there is none."""
        try:
            lock = os.open(self.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # nobody ever wrote, or the records cannot be read either
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment: who wants to write tries again
        except BlockingIOError:
            return _owner(lock)
        finally:
            os.close(lock)
        return None

    def erase(self) -> None:
        """Make all records void, and give the room of all blocks back to the disk.

        Raises
        ------
        TierError
            If a process writes to the directory, or it is no tier's; nothing is changed then.
        """
        self._block = self.format()
        try:
            self._take_lock()
            self._begin_anew()
        except OSError as error:
            raise self._said(error) from error
        finally:
            self._let_go()

    def _said(self, error: OSError) -> TierError:
        return error if isinstance(error, TierError) else self._error(f"{error.strerror or error}")

    def _error(self, reason: str) -> TierError:
        return TierError(str(self.directory), reason)

    def _read_meta(self) -> dict[str, Any] | None:
        """Return what the directory says of itself, None where it is empty; TierError if it is somebody else's."""
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return None
        foreign = [name for name in names if name not in (*_FILES, "lost+found")]
        if foreign or ("meta.json" not in names and {"slab", "records"} & set(names)):
            raise self._error(f"expected an empty directory or a tier's, got one with {(foreign or names)[0]!r}")
        if "meta.json" not in names:
            return None
        try:
            meta = json.loads((self.directory / "meta.json").read_bytes())
            is_known = (meta["format"], type(meta["schema"])) == (FORMAT, int) and len(bytes.fromhex(meta["key"])) == 32
        except (ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise self._error(_NOT_OURS)
        if meta["schema"] != SCHEMA:
            raise self._error(f"expected files of version {SCHEMA}, got version {meta['schema']} of another pagedkv")
        return meta

    def _is_ours(self, meta: dict[str, Any]) -> bool:
        return all(meta.get(name) == value for name, value in vars(self._block).items())

    def _take_lock(self) -> None:
        self._files["lock"] = lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    hint = "one writes, others open it to read: read_only=True, --disk-read-only of a server"
                    raise self._error(f"is in use by process {_owner(lock)}: {hint}") from None
                time.sleep(0.01)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def _begin_anew(self) -> None:
        """Draw a key: what records there are is void from now on."""
        for name in ("records", "slab"):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.directory / name, 0)
        key = secrets.token_bytes(32)
        meta = {"format": FORMAT, "schema": SCHEMA, **vars(self._block), "key": key.hex()}
        new = self.directory / "meta.json.new"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.directory / "meta.json")
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._key = key

    # Room.

    def _require_room(self, num_slots: int) -> None:
        """Refuse a size that the disk cannot hold, before anything is touched."""
        needed, held = num_slots * (self._slot_bytes + self._dtype.itemsize), 0
        for name in ("slab", "records"):
            with contextlib.suppress(FileNotFoundError):
                held += os.stat(self.directory / name).st_blocks * 512
        system = os.statvfs(self.directory)
        free = system.f_bavail * system.f_frsize + held
        if needed > free:
            raise self._error(f"expected room for {format_bytes(needed)}, got {format_bytes(free)} on the disk")

    def _allocate(self, name: str, size: int) -> None:
        file = self._files[name]
        before = os.fstat(file).st_size
        if before > size:
            os.ftruncate(file, size)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
            os.truncate(file, size)
        except OSError as error:
            os.ftruncate(file, min(before, size))
            raise self._error(f"{format_bytes(size)} cannot be had for {name}: {error.strerror}") from error

    # Records.

    def _key_word(self) -> np.uint64:
        return np.frombuffer(self._key, np.uint64, 1)[0]

    def _sums(self, records: npt.NDArray[np.void]) -> Sums:
        sums = np.empty(len(records), np.uint64)
        sum_records(records.view(np.uint64).reshape(len(records), self._dtype.itemsize // 8), self._key_word(), sums)
        return sums

    def _kept(self, num_slots: int) -> Kept:
        return self.believed(*self.read_records(num_slots))

    @property
    def num_slots(self) -> int:
        """How many records there are."""
        return os.fstat(self._files["records"]).st_size // self._dtype.itemsize

    def read_records(self, num_slots: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.bool_]]:
        """Return the records, and which of them prove themselves and have a slot."""
        data = np.zeros(num_slots * self._dtype.itemsize, np.uint8)
        os.preadv(self._files["records"], [data.data], 0)
        records = data.view(self._dtype)
        exists = records["generation"] != 0
        if exists.any():
            exists &= records["sum"] == self._sums(records)
        exists[os.fstat(self._files["slab"]).st_size // self._slot_bytes :] = False
        return records, exists

    def believed(self, records: npt.NDArray[np.void], exists: npt.NDArray[np.bool_]) -> Kept:
        """Return what is known of the slots: of records that prove themselves, those whose parents do."""
        num_slots = len(records)
        generations = np.where(exists, records["generation"], 0)
        parents = np.where(exists, records["parent"], NO_BLOCK)
        inner = np.flatnonzero(parents >= 0)
        orphans = parents[inner] >= num_slots
        parents[inner[orphans]], inner = NO_BLOCK, inner[~orphans]
        parents[inner[generations[parents[inner]] != records["parent_generation"][inner]]] = NO_BLOCK
        salts, names = _numbered(records["salt"], np.flatnonzero(parents == NO_PARENT))
        self._generations = generations
        return Kept(
            num_slots,
            BlockRecords(
                parents.astype(np.int32),
                salts,
                records["token_ids"].astype(np.int64),
                records["last_access"].copy(),
                records["access_count"].copy(),
            ),
            names,
            records["checksum"].copy(),
        )

    def name_of_salt(self, cache_salt: str) -> str:
        """Return a digest under the key of this tier: so no text of a salt is in a file, and it is found again."""
        return blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=16, key=self._key).hexdigest()

    def prepared(self, entries: Entries) -> Callable[[], None]:
        """Return what writes the records of these blocks."""
        order = np.argsort(entries.slots, kind="stable")
        new = np.flatnonzero(entries.are_new)
        records = np.zeros(len(order), self._dtype)
        with self._lock:
            self._generations[entries.slots[new]] = self._generation + 1 + np.arange(len(new), dtype=np.uint64)
            self._generation += len(new)
            records["generation"] = self._generations[entries.slots]
            records["parent_generation"] = np.where(entries.parents >= 0, self._generations[entries.parents], 0)
        records["checksum"] = entries.checksums
        records["salt"] = np.frombuffer(bytes.fromhex(entries.salt), np.uint64)
        records["last_access"] = entries.last_access
        records["parent"] = entries.parents
        records["access_count"] = 1
        records["token_ids"] = entries.token_ids
        records["sum"] = self._sums(records)
        return lambda: self._keep(entries.slots[order], records[order])

    def _keep(self, slots: Ints, records: npt.NDArray[np.void]) -> None:
        if self._durable:
            os.fdatasync(self._files["slab"])
        self._write_records(slots, records)
        now = time.monotonic()
        if self._durable:
            os.fdatasync(self._files["records"])
        elif now - self._synced_at > _SYNC_SECONDS:
            self._synced_at = now
            self._sync()

    def _write_records(self, slots: Ints, records: npt.NDArray[np.void]) -> None:
        data, size = records.view(np.uint8).reshape(len(records), self._dtype.itemsize), self._dtype.itemsize
        for start, stop in _runs(slots):
            if (
                os.pwrite(self._files["records"], data[start:stop].data, int(slots[start]) * size)
                != (stop - start) * size
            ):
                raise OSError("a record was written in part")

    def _sync(self) -> None:
        os.fdatasync(self._files["slab"])
        os.fdatasync(self._files["records"])

    def forget(self) -> None:
        """Make all records void, and give their bytes back to the disk; a reader leaves what another writes alone."""
        if self.is_read_only:
            return
        try:
            self._begin_anew()
            self._generations[:] = 0
            for name, size in (("slab", self._slot_bytes), ("records", self._dtype.itemsize)):
                self._allocate(name, len(self._generations) * size)
        except OSError as error:
            raise self._error(f"cannot be cleared: {error.strerror or error}") from error

    # Payloads.

    def read(self, slots: Ints, rows: Rows, places: Ints) -> None:
        """Read slots; a short read leaves anything in a row, which its checksum tells."""
        slab = self._files["slab"]
        for start, stop in _runs(slots):
            place = int(slots[start]) * self._slot_bytes
            if hasattr(os, "posix_fadvise"):  # or the system reads ahead of each row anew
                os.posix_fadvise(slab, place, (stop - start) * self._slot_bytes, os.POSIX_FADV_WILLNEED)
            os.preadv(slab, self._buffers(rows, places[start:stop]), place)

    def write(self, slots: Ints, rows: Rows, places: Ints) -> None:
        """Write slots; neighbours are one call, so small blocks travel as large ones do."""
        for start, stop in _runs(slots):
            buffers = self._buffers(rows, places[start:stop])
            written = os.pwritev(self._files["slab"], buffers, int(slots[start]) * self._slot_bytes)
            if written != sum(map(len, buffers)):
                raise OSError(f"{written} bytes of {sum(map(len, buffers))} were written")

    def _buffers(self, rows: Rows, places: Ints) -> list[Any]:
        """Return rows with what lies between their slots, none behind the last."""
        gap = self._slot_bytes - self._block.block_bytes
        if not gap:
            return [rows[place] for place in places.tolist()]
        filler = np.zeros(gap, np.uint8)
        return [part for place in places.tolist() for part in (rows[place], filler)][:-1]

    # The end.

    def close(self, blocks: npt.NDArray[Any] | None) -> None:
        """Note when blocks were last used, sync, and let go."""
        try:
            if blocks is not None and not self.is_read_only:
                with contextlib.suppress(OSError):  # costs the order of use after a restart
                    self._note_uses(blocks["last_access"], blocks["access_count"])
                    self._sync()
        finally:
            self._let_go()

    def _note_uses(self, last_access: Ints, access_counts: Ints) -> None:
        data = np.zeros(len(last_access) * self._dtype.itemsize, np.uint8)
        os.preadv(self._files["records"], [data.data], 0)
        records = data.view(self._dtype)
        is_current = (self._generations != 0) & (records["generation"] == self._generations)
        is_current[is_current] = records["sum"][is_current] == self._sums(records[is_current])
        changed = np.flatnonzero(is_current & (records["last_access"] != last_access))
        if len(changed):
            records["last_access"][changed] = last_access[changed]
            records["access_count"][changed] = access_counts[changed]
            records["sum"][changed] = self._sums(records[changed])
            self._write_records(changed, records[changed])

    def _let_go(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}


def _owner(lock: int) -> str:
    """Return the process that is named in a lock file."""
    return os.pread(lock, 20, 0).decode(errors="replace") or "unknown"


def _runs(slots: Ints) -> Iterator[tuple[int, int]]:
    """Cut ascending slots into runs of neighbours: [start, stop) of each."""
    if not len(slots):
        return iter(())
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    edges = [0, *cuts.tolist(), len(slots)]
    return zip(edges[:-1], edges[1:], strict=True)


def _numbered(salts: npt.NDArray[np.uint64], roots: Ints) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Number the salts of the first blocks of prefixes; returns the number of each slot, and the salts."""
    numbers = np.zeros(len(salts), np.int32)
    if not len(roots):
        return numbers, [""]
    order = roots[np.lexsort((salts[roots, 1], salts[roots, 0]))]
    is_new = np.concatenate([[True], (salts[order[1:]] != salts[order[:-1]]).any(axis=1)])
    numbers[order] = np.cumsum(is_new) - 1
    return numbers, [salt.tobytes().hex() for salt in salts[order[is_new]]]


def file_system_of(path: Path) -> str:
    """Return the type of the file system that a path lies on, or would; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    where, best, found = path.resolve(), -1, ""
    for fields in map(str.split, lines):
        mount = Path(fields[4].replace("\\040", " "))
        if where.is_relative_to(mount) and len(mount.parts) >= best:
            best, found = len(mount.parts), fields[fields.index("-") + 1]
    return found
