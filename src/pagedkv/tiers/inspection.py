"""The directory of a disk tier, looked at from outside: what it holds, whether that is right, and emptying it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import BlockManager
from pagedkv.control.restore import NO_PARENT, restore_blocks
from pagedkv.tiers.book_tier import Kept
from pagedkv.tiers.slab import Slab
from pagedkv.tiers.tier import BlockFormat
from pagedkv.tiers.transfers import Ints, checksums

_PIECE_BYTES = 8 * 2**20
_PAUSE = 0.2  # seconds, in which whoever overwrites a slot comes to its record


@dataclass(frozen=True)
class TierFacts:
    """What a directory says of itself.

    Attributes
    ----------
    directory : str
    block : BlockFormat
        What its blocks are of.
    num_slots, num_blocks : int
        Blocks that there is room for, and blocks that can be found.
    num_salts : int
        Different salts among these, none counting as one.
    num_bytes : int
        Of all its files.
    written_at : float
        When a block was last stored, or the tier closed, in seconds since 1970.
    writer : str or None
        The process that writes to it now.
    """

    directory: str
    block: BlockFormat
    num_slots: int
    num_blocks: int
    num_salts: int
    num_bytes: int
    written_at: float
    writer: str | None


@dataclass(frozen=True)
class TierCheck:
    """What reading every block has shown.

    Attributes
    ----------
    good : int
        Blocks that can be found, and are what was stored.
    corrupt : int
        Slots whose payload or record is not what was written. They are misses, and are written again when such a block
        is next stored.
    unreachable : int
        Slots that no text leads to any more, as a block before them is gone, or another holds the same. They do no
        harm, and are used again.
    seconds : float
    num_bytes : int
        Of the payloads that were read.
    """

    good: int
    corrupt: int
    unreachable: int
    seconds: float
    num_bytes: int


def inspect_tier(directory: str | Path) -> TierFacts:
    """Say what a directory holds; nothing is locked or changed, and no model is needed.

    Raises
    ------
    TierError
        If it is no directory of a tier, of another version, or cannot be read.
    """
    slab = Slab(directory, 0, is_read_only=True)
    block = slab.format()
    kept = slab.open(block)
    try:
        is_findable = _findable(block, kept)
        first = is_findable & (kept.records.parents == NO_PARENT) if kept.records is not None else is_findable
        salts = kept.records.salts[first] if kept.records is not None else np.zeros(0, np.int32)
        files = [entry.stat() for entry in os.scandir(slab.directory)]
        written = max(os.stat(slab.directory / name).st_mtime for name in ("records", "slab"))
        return TierFacts(
            directory=str(slab.directory),
            block=block,
            num_slots=kept.num_slots,
            num_blocks=int(is_findable.sum()),
            num_salts=len(np.unique(salts)),
            num_bytes=sum(file.st_size for file in files),
            written_at=written,
            writer=slab.writer(),
        )
    finally:
        slab.close(None)


def check_tier(directory: str | Path, progress: Callable[[int, int], None] = lambda done, of: None) -> TierCheck:
    """Read every block and compare it with its checksum; nothing is locked or changed.

    What a writer overwrites meanwhile is no fault: a block that is wrong is looked at again, with its record.

    Parameters
    ----------
    directory : str or Path
    progress : callable
        Told how many blocks were read, of how many.

    Raises
    ------
    TierError
        If it is no directory of a tier, of another version, or cannot be read.
    """
    began = time.perf_counter()
    slab = Slab(directory, 0, is_read_only=True)
    block = slab.format()
    slab.open(block)
    try:
        records, exists = slab.read_records(slab.num_slots)
        kept = slab.believed(records, exists)
        is_findable = _findable(block, kept)
        findable = np.flatnonzero(is_findable)
        piece = max(1, _PIECE_BYTES // block.block_bytes)
        wrong: list[int] = []
        for start in range(0, len(findable), piece):
            slots = findable[start : start + piece]
            wrong += slots[~_are_right(slab, block, slots, kept.checksums)].tolist()
            progress(min(start + piece, len(findable)), len(findable))
        suspects = np.array(wrong, np.int64)
        damaged = np.flatnonzero((records["generation"] != 0) & ~exists)
        if len(suspects) or len(damaged):
            time.sleep(_PAUSE)
            now, exists_now = slab.read_records(len(records))
            is_same = now["generation"][suspects] == records["generation"][suspects]
            suspects = suspects[is_same]
            suspects = suspects[~_are_right(slab, block, suspects, now["checksum"])]
            damaged = damaged[~exists_now[damaged]]
        return TierCheck(
            good=len(findable) - len(wrong),
            corrupt=len(suspects) + len(damaged),
            unreachable=int((exists & ~is_findable).sum()),
            seconds=time.perf_counter() - began,
            num_bytes=len(findable) * block.block_bytes,
        )
    finally:
        slab.close(None)


def clear_tier(directory: str | Path) -> None:
    """Forget all blocks of a directory and give their room back to the disk.

    Raises
    ------
    TierError
        If a process writes to it, or it is no directory of a tier; nothing is changed then.
    """
    Slab(directory, 0).erase()


def _findable(block: BlockFormat, kept: Kept) -> npt.NDArray[np.bool_]:
    if kept.records is None:
        return np.zeros(kept.num_slots, np.bool_)
    return restore_blocks(BlockManager(kept.num_slots, block.block_size), kept.records, kept.salts)


def _are_right(slab: Slab, block: BlockFormat, slots: Ints, wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell which slots have the payload of their checksum; what cannot be read has not."""
    rows, places = np.zeros((len(slots), block.block_bytes), np.uint8), np.arange(len(slots))
    try:
        slab.read(slots, rows, places)
    except OSError:  # one bad sector: slot by slot then
        for place in places.tolist():
            with suppress(OSError):
                slab.read(slots[place : place + 1], rows, places[place : place + 1])
    is_right: npt.NDArray[np.bool_] = checksums(rows, places) == wanted[slots]
    return is_right
