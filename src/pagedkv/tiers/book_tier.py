"""BookTier: a BlockManager that says what is where, over anything that has slots for payloads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pagedkv.control.events import BlockStored, CacheEvent
from pagedkv.control.manager import BlockManager
from pagedkv.control.prefix import checked_salt
from pagedkv.control.protocol import Strategy
from pagedkv.control.restore import BlockRecords, restore_blocks
from pagedkv.errors import InvalidOperation, OutOfMemory
from pagedkv.tiers.calls import first_block, not_open, whole_blocks
from pagedkv.tiers.tier import BlockFormat, Rows, answered
from pagedkv.tiers.transfers import Ints, Sums, after, checksums, run_pieces
from pagedkv.typing import TokenIds

THREADS = 4
# What one call of a thread moves: enough for the rate of a disk, and little enough that a chain is shared by threads.
_PIECE_BYTES, _PIECE_BLOCKS = 2 * 2**20, 256
_SECONDS_OF_A_DAY = 86_400
_MOST_SALTS = 10_000


class Kept(NamedTuple):
    """What slots hold when they are opened.

    Attributes
    ----------
    num_slots : int
    records : BlockRecords or None
        What is known of each slot; None where nothing is.
    salts : sequence of str
        The names of salts that the records count.
    checksums : uint64 [num_slots]
        Of the payloads; 0 where there is none.
    """

    num_slots: int
    records: BlockRecords | None
    salts: Sequence[str]
    checksums: Sums


class Entries(NamedTuple):
    """Blocks of one chain whose payloads were written just now, k of them.

    Attributes
    ----------
    slots, parents : int64 [k]
        Where they lie, and the blocks before them; −1 for the first of a prefix.
    token_ids : int64 [k, block_size]
    checksums : uint64 [k]
    are_new : bool [k]
        Whether the slot holds another block now; else the same one was written again.
    salt : str
    last_access : int
    """

    slots: Ints
    parents: Ints
    token_ids: Ints
    checksums: Sums
    are_new: npt.NDArray[np.bool_]
    salt: str
    last_access: int


class Slots(Protocol):
    """A place with numbered slots for one payload each: all that a :class:`BookTier` needs. Threads call it at once."""

    medium: str
    is_read_only: bool

    def open(self, block: BlockFormat) -> Kept:
        """Get ready to hold such blocks."""
        ...

    def name_of_salt(self, cache_salt: str) -> str:
        """Return what stands for a salt in the records."""
        ...

    def read(self, slots: Ints, rows: Rows, places: Ints) -> None:
        """Read slots, ascending, into rows: slot i into ``rows[places[i]]``. What fails leaves anything there."""
        ...

    def write(self, slots: Ints, rows: Rows, places: Ints) -> None:
        """Write rows into slots, ascending; OSError unless all of it was written."""
        ...

    def prepared(self, entries: Entries) -> Callable[[], None] | None:
        """Return what notes for good that slots hold this, to be called outside of the lock: OSError if it fails.

        Once `forget` was called, it notes nothing that is found again.
        """
        ...

    def forget(self) -> None:
        """Note that no slot holds anything; if it is read only, do nothing."""
        ...

    def close(self, blocks: npt.NDArray[np.void] | None) -> None:
        """Let go. `blocks` are the records that the books have of each slot, to note how these were used."""
        ...


@dataclass(frozen=True)
class TierStats:
    """What a tier has done since it was opened, in blocks unless said otherwise.

    Attributes
    ----------
    restored : int
        Found when it was opened.
    stored, skipped : int
        Written, and not written because they were there.
    loaded : int
        Read and right.
    corrupt : int
        Read and not what was stored: misses, rewritten when such a block is next stored.
    failed : int
        Not stored because a write failed.
    refused : int
        Not stored because the writes of the day were spent, or other transfers held all slots.
    unanswered : int
        Calls that a server did not answer in time, or by an error.
    read_bytes, written_bytes : int
    read_seconds, write_seconds : float
        From the call to its end, added up over loads and stores; these overlap where several run at once.
    """

    restored: int = 0
    stored: int = 0
    skipped: int = 0
    loaded: int = 0
    corrupt: int = 0
    failed: int = 0
    refused: int = 0
    unanswered: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


_Storing = tuple[Ints, str, Future[int]]  # the text and the salt of a store under way


class _Chain(NamedTuple):
    """Blocks that a transfer holds: a sequence of the books."""

    seq_id: int
    slots: Ints
    num_found: int
    last_access: int


class _DayOfWrites:
    """How much may be written: a day's bytes at once, and as they trickle back."""

    def __init__(self, daily_bytes: int | None) -> None:
        self._daily = daily_bytes
        self._left = float(daily_bytes or 0)
        self._at = time.monotonic()

    def take(self, wanted: int, block_bytes: int) -> int:
        """Return how many of the wanted blocks may be written, and count them."""
        if self._daily is None:
            return wanted
        now = time.monotonic()
        self._left = min(self._daily, self._left + (now - self._at) / _SECONDS_OF_A_DAY * self._daily)
        self._at = now
        granted = min(wanted, int(self._left // block_bytes))
        self._left -= granted * block_bytes
        return granted


class BookTier:
    """A tier over anything that has slots. Its books are a BlockManager, a transfer is a sequence of theirs.

    So what is being loaded cannot be overwritten, what is being stored cannot be found, and strategies, ``check()``,
    events and snapshots are those of a pool. Every payload has a checksum (xxh3, 64 bits) that is verified when it is
    loaded. It is opened by whoever knows the blocks; until then it finds nothing. Many threads may use one tier.

    Parameters
    ----------
    slots : Slots
        Where payloads lie.
    strategy : str or EvictionStrategy
        What is given up first when it is full. Priorities are not kept.
    daily_writes : int, optional
        Most bytes of payloads that are written in a day; what is beyond is not stored.
    """

    def __init__(self, slots: Slots, *, strategy: Strategy = "lru", daily_writes: int | None = None) -> None:
        self.medium = slots.medium
        self._slots = slots
        self._strategy = strategy
        self._budget = _DayOfWrites(daily_writes)
        self._block = BlockFormat("none", 1, 1)
        self._books = BlockManager(0, strategy=strategy, whole_hits=True)
        self._checksums = np.zeros(0, np.uint64)  # by slot
        self._doubtful: set[int] = set()  # slots of findable blocks that are not to be believed
        self._seq_ids = itertools.count(1)
        self._salts: dict[str, str] = {}  # by what stands for them, those that were given of late
        self._clears = 0
        self._stats = TierStats()
        self._lock = threading.RLock()
        self._threads: ThreadPoolExecutor | None = None
        self._storing: list[_Storing] = []

    def open(self, block: BlockFormat) -> BookTier:
        """Get ready to hold such blocks, and find those that are there from before; returns the tier.

        Raises
        ------
        InvalidOperation
            If it is open already, or too small for a block.
        TierError
            If the medium cannot be had.
        """
        with self._lock:
            if self._threads is not None:
                raise InvalidOperation("the tier is open already")
            kept = self._slots.open(block)
            try:
                self._restore(block, kept)
            except BaseException:
                self._slots.close(None)
                raise
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pagedkv-tier")
        return self

    def _restore(self, block: BlockFormat, kept: Kept) -> None:
        books = BlockManager(kept.num_slots, block.block_size, strategy=self._strategy, whole_hits=True)
        restored = 0
        if kept.records is not None:
            restored = int(restore_blocks(books, kept.records, kept.salts).sum())
        self._block, self._books, self._checksums = block, books, kept.checksums
        self._doubtful = set()
        self._stats = TierStats(restored=restored)

    @property
    def is_open(self) -> bool:
        """Whether it can be used."""
        return self._threads is not None

    @property
    def is_read_only(self) -> bool:
        """Whether nothing is stored in it from here."""
        return self._slots.is_read_only

    @property
    def block(self) -> BlockFormat:
        """What it was opened for."""
        return self._block

    @property
    def books(self) -> BlockManager:
        """Which block lies where: to be read, subscribed to and checked."""
        return self._books

    def subscribe(self, callback: Callable[[CacheEvent], None]) -> Callable[[], None]:
        """Call `callback` with every event of the books until what is returned is called; salts are as they were given.

        See :meth:`pagedkv.BlockManager.subscribe`. Nothing is told of what was found when the tier was opened.
        """

        def hear(event: CacheEvent) -> None:
            if isinstance(event, BlockStored):
                event = replace(event, cache_salt=self._salts.get(event.cache_salt, event.cache_salt))
            callback(event)

        return self._books.subscribe(hear)

    @property
    def stats(self) -> TierStats:
        """What it has done since it was opened."""
        return self._stats

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._books.cached_block_count}/{self._books.total_blocks} blocks)"

    def match(self, token_ids: TokenIds, cache_salt: str = "") -> Future[int]:
        """Answer at once how many leading blocks of a text it seems to have: see :meth:`Tier.match`."""
        ids, salt = self._text(token_ids, cache_salt)
        with self._lock:
            self._require_open()
            return answered(self._count_good(ids, salt))

    def load(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Fill `rows` with the last blocks of a text: see :meth:`Tier.load`."""
        ids, salt = self._text(token_ids, cache_salt)
        first = first_block(ids, rows, self._block, is_filled=True)
        began = time.perf_counter()
        with self._lock:
            threads = self._require_open()
            count = self._count_good(ids, salt)
            if count <= first:
                return answered(0)
            chain = self._hold(ids[: count * self._block.block_size], salt)
            wanted = self._checksums[chain.slots]
            is_right = np.zeros(count, np.bool_)

            def read(places: Ints) -> None:
                self._slots.read(chain.slots[places], rows, places - first)
                is_right[places] = checksums(rows, places - first) == wanted[places]

            def end() -> int:
                return self._end_load(chain, wanted, is_right[first:], first, began)

            return run_pieces(threads, self._pieces(chain, np.arange(first, count)), read, end)

    def store(self, token_ids: TokenIds, rows: Rows, cache_salt: str = "") -> Future[int]:
        """Keep the last blocks of a text: see :meth:`Tier.store`."""
        ids, salt = self._text(token_ids, cache_salt)
        first_block(ids, rows, self._block)
        began = time.perf_counter()
        with self._lock:
            self._require_open()
            before, clears = self._store_before(ids, salt), self._clears
            if before is None:
                stored = self._store(ids, salt, rows, clears, began)
            else:
                stored = after(before, lambda: self._store(ids, salt, rows, clears, began))
            if not stored.done():
                entry = (ids, salt, stored)
                self._storing.append(entry)
                stored.add_done_callback(lambda _: self._end_of_store(entry))
            return stored

    def _store_before(self, ids: Ints, salt: str) -> Future[int] | None:
        """Return the last store under way of a text that begins alike, beyond what is there already.

        Both at once would give the same blocks two slots each, and records behind one of them a parent that is let go.
        """
        size = self._block.block_size
        there = self._books.match_prefix(ids, salt) if self._storing else 0
        for other, other_salt, stored in reversed(self._storing):
            length = min(len(ids), len(other), there + size)
            if salt == other_salt and length > there and (ids[:length] == other[:length]).all():
                return stored
        return None

    def _end_of_store(self, entry: _Storing) -> None:
        with self._lock:
            self._storing = [each for each in self._storing if each is not entry]

    def _store(self, ids: Ints, salt: str, rows: Rows, clears: int, began: float) -> Future[int]:
        """Begin to write what is not there."""
        with self._lock:
            threads = self._require_open()
            wanted = len(ids) // self._block.block_size
            first, there = wanted - len(rows), self._count_good(ids, salt)
            if clears != self._clears:
                return answered(0)
            if there < first or self._slots.is_read_only:
                return answered(there)
            chain = self._hold(ids, salt)
            missing = np.arange(max(first, there), len(chain.slots))
            missing = missing[(missing >= chain.num_found) | self._are_doubtful(chain.slots[missing])]
            granted = self._budget.take(len(missing), self._block.block_bytes)
            end_at = int(missing[granted]) if granted < len(missing) else len(chain.slots)
            self._count(skipped=end_at - first - granted, refused=wanted - end_at)
            missing = missing[:granted]
            sums = np.zeros(len(chain.slots), np.uint64)

            def write(places: Ints) -> None:
                written = checksums(rows, places - first)
                self._slots.write(chain.slots[places], rows, places - first)
                sums[places] = written

            def end() -> int:
                return self._end_store(chain, ids, salt, missing, sums, end_at, clears, began)

            return run_pieces(threads, self._pieces(chain, missing), write, end)

    def clear(self) -> None:
        """Forget everything, but what another process writes: see :meth:`Tier.clear`."""
        with self._lock:
            self._require_open()
            self._slots.forget()
            self._clears += 1
            self._books.clear_prefix_cache()
            self._doubtful.clear()

    def close(self) -> None:
        """Finish what is under way and let go of the medium. A second call does nothing; it can be opened again."""
        while True:
            with self._lock:
                storing = [stored for *_, stored in self._storing]
                if not storing:
                    threads, self._threads = self._threads, None
                    break
            wait(storing)
        if threads is None:
            return
        threads.shutdown()
        self._slots.close(self._books.block_records(np.arange(self._books.total_blocks)))

    def __enter__(self) -> BookTier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What calls are made of.

    def _require_open(self) -> ThreadPoolExecutor:
        if self._threads is None:
            raise not_open()
        return self._threads

    def _text(self, token_ids: TokenIds, cache_salt: str) -> tuple[Ints, str]:
        """Return the ids of the whole blocks, and what stands for the salt."""
        ids = whole_blocks(token_ids, self._block)
        name = self._slots.name_of_salt(checked_salt(cache_salt))
        if name not in self._salts:
            with self._lock:
                if len(self._salts) >= _MOST_SALTS:
                    del self._salts[next(iter(self._salts))]
                self._salts[name] = cache_salt
        return ids, name

    def _count_good(self, ids: Ints, salt: str) -> int:
        """Return how many leading blocks are there and not in doubt."""
        count = self._books.match_prefix(ids, salt) // self._block.block_size
        if count and self._doubtful:
            chain = self._hold(ids[: count * self._block.block_size], salt)
            self._books.free(chain.seq_id)
            doubtful = np.flatnonzero(self._are_doubtful(chain.slots))
            count = int(doubtful[0]) if len(doubtful) else count
        return count

    def _hold(self, ids: Ints, salt: str) -> _Chain:
        """Start a sequence over a text, or over as much of it as there is room for."""
        seq_id, size = next(self._seq_ids), self._block.block_size
        while True:
            try:
                info = self._books.allocate(seq_id, ids, cache_salt=salt)
            except OutOfMemory as error:
                ids = ids[: len(ids) - (error.requested - error.available) * size]
                continue
            slots = info.block_table.astype(np.int64)
            return _Chain(seq_id, slots, info.num_cached_tokens // size, info.last_access)

    def _pieces(self, chain: _Chain, places: Ints) -> list[Ints]:
        """Cut places of a chain into pieces for the threads, slots ascending: neighbours travel together."""
        places = places[np.argsort(chain.slots[places], kind="stable")]
        length = max(1, min(_PIECE_BLOCKS, _PIECE_BYTES // self._block.block_bytes))
        return [places[start : start + length] for start in range(0, len(places), length)]

    def _end_load(self, chain: _Chain, wanted: Sums, is_right: npt.NDArray[np.bool_], first: int, began: float) -> int:
        """Let the blocks go; those that are wrong are in doubt, unless they were rewritten meanwhile."""
        wrong = first + np.flatnonzero(~is_right)
        count = int(wrong[0]) - first if len(wrong) else len(is_right)
        with self._lock:
            self._books.free(chain.seq_id)
            is_same = self._checksums[chain.slots[wrong]] == wanted[wrong]
            self._doubtful.update(chain.slots[wrong[is_same]].tolist())
            self._count(
                loaded=count,
                corrupt=len(wrong),
                read_bytes=len(is_right) * self._block.block_bytes,
                read_seconds=time.perf_counter() - began,
            )
        return count

    def _end_store(
        self, chain: _Chain, ids: Ints, salt: str, missing: Ints, sums: Sums, end_at: int, clears: int, began: float
    ) -> int:
        """Make what was written findable, up to the first block that was not; returns how many blocks are there."""
        unwritten = missing[sums[missing] == 0]
        count = min(end_at, int(unwritten[0])) if len(unwritten) else end_at
        written = missing[missing < count]
        try:
            if len(written):
                self._note(self._entries(chain, ids, salt, written, sums), clears)
        except OSError:
            count, written = int(missing[0]), written[:0]
        except BaseException:
            count, written = int(missing[0]), written[:0]
            raise
        finally:
            with self._lock:
                if clears != self._clears:
                    count, written = 0, written[:0]
                self._checksums[chain.slots[written]] = sums[written]
                self._doubtful.difference_update(chain.slots[written].tolist())
                self._books.truncate(chain.seq_id, count * self._block.block_size)
                self._books.commit(chain.seq_id)
                self._books.free(chain.seq_id)
                self._count(
                    stored=len(written),
                    failed=len(missing) - len(written),
                    written_bytes=len(written) * self._block.block_bytes,
                    write_seconds=time.perf_counter() - began,
                )
        return count

    def _note(self, entries: Entries, clears: int) -> None:
        """Let the slots note for good what they hold, unless all was forgotten meanwhile."""
        with self._lock:
            note = self._slots.prepared(entries) if clears == self._clears else None
        if note is not None:
            note()

    def _entries(self, chain: _Chain, ids: Ints, salt: str, places: Ints, sums: Sums) -> Entries:
        parents = np.where(places > 0, chain.slots[places - 1], -1)
        tokens = ids.reshape(-1, self._block.block_size)[places]
        are_new = places >= chain.num_found
        return Entries(chain.slots[places], parents, tokens, sums[places], are_new, salt, chain.last_access)

    def _are_doubtful(self, slots: Ints) -> npt.NDArray[np.bool_]:
        return np.array([slot in self._doubtful for slot in slots.tolist()], np.bool_)

    def _count(self, **changes: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in changes.items()})
