"""DiskTier: blocks in the files of one directory, found again after a restart."""

from __future__ import annotations

import os
from pathlib import Path

from pagedkv.control.protocol import Strategy
from pagedkv.control.strategies import as_strategy
from pagedkv.errors import bad_argument
from pagedkv.tiers.book_tier import BookTier
from pagedkv.tiers.slab import Slab
from pagedkv.tiers.tier import BlockFormat
from pagedkv.validate import require_flag, require_size, shown


class DiskTier(BookTier):
    """Blocks on a local disk. What was stored is found again after a restart, a crash or a power cut, or is a miss.

    One process writes; others may open the same directory with ``read_only=True``, need no lock, and see what was there
    when they opened it. Files can be read by their owner alone (0600): token ids, K and V are private text.

    Parameters
    ----------
    directory : str or Path
        Empty, not there yet, or a tier's. It holds blocks of one fingerprint: opened for another one, it begins anew.
    size : int or str
        The most bytes of all files, as an int or as text: ``"50GB"``. They are allocated when it is opened. With
        `read_only` it may be left out, and means nothing.
    strategy : str or EvictionStrategy
        What is given up first when it is full.
    durable : bool
        Whether a store is on the medium before it is findable, so that a power cut loses nothing that was stored; else
        it follows within seconds. What is found is right in either case.
    daily_writes : int or str, optional
        Most bytes that are written in a day, for disks that wear out; what is beyond is not stored.
    read_only : bool
        Whether another process writes to the directory, or none does: nothing is stored, and `clear` leaves the files
        as they are.

    Raises
    ------
    InvalidOperation
        If an argument is out of range.

    Examples
    --------
    >>> tier = DiskTier("/var/cache/pagedkv", "50GB")  # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | Path,
        size: int | str | None = None,
        *,
        strategy: Strategy = "lru",
        durable: bool = False,
        daily_writes: int | str | None = None,
        read_only: bool = False,
    ) -> None:
        if not isinstance(directory, (str, os.PathLike)) or not str(directory):
            raise bad_argument("directory", "a path", shown(directory), "name a folder of its own for the tier")
        if size is None and not read_only:
            raise bad_argument("size", "the most bytes of its files, such as '50GB'", "none", "or read_only=True")
        slab = Slab(
            directory,
            0 if size is None else require_size("size", size),
            durable=require_flag("durable", durable),
            is_read_only=require_flag("read_only", read_only),
        )
        budget = None if daily_writes is None else require_size("daily_writes", daily_writes)
        super().__init__(slab, strategy=as_strategy(strategy), daily_writes=budget)
        self.directory = slab.directory

    @staticmethod
    def format_of(directory: str | Path) -> BlockFormat:
        """Return what a directory holds blocks of, so that it can be opened without the model.

        Raises
        ------
        TierError
            If it is no directory of a tier, of another version, or cannot be read.
        """
        return Slab(directory, 0, is_read_only=True).format()
