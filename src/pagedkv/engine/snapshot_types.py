"""What a snapshot of the engine holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.engine.stats import EngineStats

__all__ = [
    "ACTIVE",
    "CACHED",
    "FREE",
    "KINDS",
    "PINNED",
    "SHARED",
    "EngineSnapshot",
    "PrefixRecord",
    "RequestRecord",
]

KINDS = ("free", "active", "shared", "cached", "pinned")
"""What a block is, by the number that stands for it in ``EngineSnapshot.kinds``."""
FREE, ACTIVE, SHARED, CACHED, PINNED = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request, without a word of its text and without its salt.

    Attributes
    ----------
    request_id : str
    state : {"running", "waiting"}
    prompt_tokens, output_tokens : int
        Output tokens of all its texts together.
    cached_tokens : int
        Tokens of the prompt that came from the cache.
    blocks : int
        Blocks in the tables of its texts; one that two texts share counts twice.
    priority : int
    age : float
        Seconds since it came.
    num_preemptions : int
    """

    request_id: str
    state: str
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    blocks: int = 0
    priority: int = 0
    age: float = 0.0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRecord:
    """A prefix that several requests have used, without its tokens; see `control.hot_prefixes.HotPrefix`."""

    block_id: int
    num_tokens: int
    uses: int
    ref_count: int
    age: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineSnapshot:
    """All that a view shows; arrays have one entry a block and are never written again.

    Attributes
    ----------
    taken : float
        Unix time, seconds.
    block_size : int
    strategy : str
    tick : int
        The cache's logical clock: it counts calls that use blocks.
    kinds : uint8 [num_blocks]
        Index into `KINDS`. Pinned goes before all others; shared blocks are held by two sequences or more.
    ref_count : uint16 [num_blocks]
        Sequences that hold the block, at most 65,535.
    owner : int32 [num_blocks]
        Index into `requests` of one that holds the block, −1 if none does.
    depth : uint16 [num_blocks]
        Blocks before it in its prefix, at most 65,535; 0 for blocks that nobody can find.
    age : uint32 [num_blocks]
        Ticks since its last use; 0 for a free block.
    requests : tuple of RequestRecord
        Running ones first.
    tables : int32 [total of the requests' blocks]
        The blocks of the first request, in order, then those of the second, …
    prefixes : tuple of PrefixRecord
        The hottest first.
    stats : EngineStats
    clock : tuple of (int, float)
        When the cache was used: ticks, ascending, and how many seconds before `taken` each was.
    cost : float
        Seconds that it took to take; not part of what is encoded.
    """

    taken: float
    block_size: int
    strategy: str
    tick: int
    kinds: npt.NDArray[np.uint8]
    ref_count: npt.NDArray[np.uint16]
    owner: npt.NDArray[np.int32]
    depth: npt.NDArray[np.uint16]
    age: npt.NDArray[np.uint32]
    tables: npt.NDArray[np.int32]
    requests: tuple[RequestRecord, ...] = ()
    prefixes: tuple[PrefixRecord, ...] = ()
    stats: EngineStats
    clock: tuple[tuple[int, float], ...] = ()
    cost: float = 0.0

    @property
    def total_blocks(self) -> int:
        """How many blocks the pool has."""
        return len(self.kinds)

    def blocks_of(self, place: int) -> npt.NDArray[np.int32]:
        """Return the blocks of the request at a place of `requests`."""
        start = sum(record.blocks for record in self.requests[:place])
        return self.tables[start : start + self.requests[place].blocks]

    def seconds_since(self, age: int) -> float | None:
        """Return how many seconds an age in ticks is, interpolated; None where nobody noted the time."""
        if not self.clock:
            return None
        ticks, seconds = zip(*self.clock, strict=True)
        return float(np.interp(self.tick - age, ticks, seconds))

    def counts(self) -> dict[str, int]:
        """Return how many blocks there are of each kind."""
        numbers = np.bincount(self.kinds, minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, numbers, strict=True))
