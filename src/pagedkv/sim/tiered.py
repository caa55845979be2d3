"""Replay of a trace through a pool and the tiers beneath it: hits by tier, blocks written, what a restart loses.

The books of a tier are those that serve models, and what happens to them is what `pagedkv.tiers.BookTier` does with its
own: a load holds the chain that it reads; a store matches a chain, takes blocks for what is missing, commits, frees.
Every level finds a block behind its parents only, so a chain lies in a tier from its first block on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pagedkv.control.content_cache import ContentCache
from pagedkv.control.events import BlockRemoved, BlockStored, CacheEvent
from pagedkv.control.protocol import Strategy
from pagedkv.control.restore import records_of, restore_blocks
from pagedkv.control.strategies import as_strategy
from pagedkv.errors import bad_argument
from pagedkv.sim.trace import MAX_BLOCKS, Int32s, Trace
from pagedkv.validate import require_choice, require_flag, require_int, shown

HOST, DISK = "host", "disk"
FINISH, RECLAIM, SECOND_HIT = "finish", "reclaim", "second-hit"


@dataclass(frozen=True)
class TierSpec:
    """A tier to replay with.

    Parameters
    ----------
    medium : {"host", "disk"}
        What a restart leaves of it: nothing, or everything.
    blocks : int
        Capacity, 1 … 2³¹−2.
    strategy : str or EvictionStrategy
        What it gives up first when it is full.
    """

    medium: str
    blocks: int
    strategy: Strategy = "lru"

    def __post_init__(self) -> None:
        require_choice("medium", self.medium, (HOST, DISK))
        require_int("blocks", self.blocks, 1, MAX_BLOCKS)
        as_strategy(self.strategy)


@dataclass(frozen=True)
class Tiers:
    """The tiers beneath a pool, the fastest first, and how they are used.

    Parameters
    ----------
    levels : sequence of TierSpec
        Of different media; none is fine, for a restart of the pool alone.
    writes : {"finish", "reclaim", "second-hit"}
        When a chain is stored: in every tier when its request ends; in the next tier when a level reclaims its last
        block; in every tier when it is found, that is its second use.
    exclusive : bool
        Whether what is loaded leaves the tier, but for blocks that other chains there continue. What the pool reclaims
        goes down, so `writes` must be ``"reclaim"``.
    restart_at : int, optional
        The request before which everything begins anew: the pool and a host tier are empty then, a disk tier has been
        closed and opened again. None, or a number beyond the last request, for no restart.

    Raises
    ------
    InvalidOperation
        If an argument is out of range, or two levels are of one medium.
    """

    levels: Sequence[TierSpec] = ()
    writes: str = FINISH
    exclusive: bool = False
    restart_at: int | None = None

    def __post_init__(self) -> None:
        for level in self.levels:
            if not isinstance(level, TierSpec):
                hint = 'write TierSpec("disk", blocks)'
                raise bad_argument("tiers", "TierSpec objects", shown(level), hint)
        media = [level.medium for level in self.levels]
        if len(set(media)) < len(media):
            raise bad_argument("tiers", "at most one of each medium", ", ".join(media))
        require_choice("writes", self.writes, (FINISH, RECLAIM, SECOND_HIT))
        if require_flag("exclusive", self.exclusive) and self.writes != RECLAIM:
            raise bad_argument("writes", f"{RECLAIM!r} for exclusive tiers", f"{self.writes!r}")
        if self.restart_at is not None:
            require_int("restart_at", self.restart_at)


@dataclass(frozen=True, eq=False)
class TierResult:
    """What one tier did in a replay.

    Attributes
    ----------
    medium : str
    strategy : str
    blocks : int
        Capacity.
    accesses, tokens : int
        Blocks that all requests touched, and input tokens of them all.
    hit_blocks, hit_tokens : int
        Found here and in no level above: blocks that were loaded, and input tokens in them.
    written : int
        Blocks stored, one as often as it came.
    hits : int32 [requests]
        Blocks that every request found here and in no level above.
    """

    medium: str
    strategy: str
    blocks: int
    accesses: int
    tokens: int
    hit_blocks: int
    hit_tokens: int
    written: int
    hits: Int32s = field(repr=False)

    @property
    def hit_ratio(self) -> float:
        """Blocks found here over blocks touched; 0.0 for a trace without blocks."""
        return self.hit_blocks / self.accesses if self.accesses else 0.0

    @property
    def token_hit_ratio(self) -> float:
        """Input tokens found here over input tokens; 0.0 for a trace without tokens."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0

    @property
    def written_share(self) -> float:
        """Blocks stored over blocks touched; 0.0 for a trace without blocks."""
        return self.written / self.accesses if self.accesses else 0.0


@dataclass(frozen=True)
class Restart:
    """What was found after a restart, by a tenth of the trace's requests.

    Attributes
    ----------
    request : int
        The first one after it.
    requests, accesses, hit_blocks : int
        Requests that count, blocks that they touched, and blocks that they found, in any level.
    """

    request: int
    requests: int
    accesses: int
    hit_blocks: int

    @property
    def hit_ratio(self) -> float:
        """Blocks found over blocks touched; 0.0 where nothing was touched."""
        return self.hit_blocks / self.accesses if self.accesses else 0.0


_SHARE_AFTER_RESTART = 10
"""A tenth of the requests shows what a restart cost: later ones meet what came after it."""


class _Level:
    """The books of one level, and the content ids that they gave up of late where the next level wants them."""

    def __init__(self, blocks: int, strategy: Strategy, *, survives: bool, tells: bool) -> None:
        self._blocks, self._strategy, self._survives, self._tells = blocks, strategy, survives, tells
        self._stored_before = self._reclaimed_before = 0
        self._restored = 0
        self.given_up: list[int] = []
        self.books = self._new_books()

    @property
    def reclaimed(self) -> int:
        """Blocks reclaimed, over all restarts."""
        return self._reclaimed_before + self.books.stats.blocks_reclaimed

    @property
    def stored(self) -> int:
        """Blocks stored, over all restarts: those that are there, or were and are not."""
        here = self.books.cached_block_count + self.books.stats.blocks_reclaimed - self._restored
        return self._stored_before + here

    def store(self, ids: Int32s) -> int:
        """Hold a chain, or as much of it as there is room for; returns how many blocks of it were there."""
        return int(self.books.run(ids, np.array([0, len(ids)], np.int64))[0])

    def restart(self) -> None:
        """Begin anew, with what was there before where the medium keeps it."""
        self._stored_before, self._reclaimed_before = self.stored, self.reclaimed
        records = records_of(self.books) if self._survives else None
        self.books = self._new_books()
        self._restored = int(restore_blocks(self.books, *records).sum()) if records else 0
        self.given_up.clear()

    def _new_books(self) -> ContentCache:
        # A strategy that learned begins anew.
        books = ContentCache(self._blocks, copy.deepcopy(self._strategy))
        if self._tells:
            holds: dict[int, int] = {}

            def hear(event: CacheEvent) -> None:
                if isinstance(event, BlockStored):
                    holds[event.block_id] = event.token_ids[0]
                elif isinstance(event, BlockRemoved):
                    self.given_up.append(holds[event.block_id])

            books.subscribe(hear)
        return books


class TieredReplay:
    """A trace, the pool that it goes through, and the tiers beneath.

    Parameters
    ----------
    trace : Trace
    blocks : int
        Of the pool.
    strategy : str or EvictionStrategy
        Of the pool.
    tiers : Tiers
    """

    def __init__(self, trace: Trace, blocks: int, strategy: Strategy, tiers: Tiers) -> None:
        self._trace, self._tiers = trace, tiers
        most, last = max(1, trace.num_distinct), len(tiers.levels)
        tells = [tiers.writes == RECLAIM and place < last for place in range(last + 1)]
        self._pool = _Level(min(blocks, most), strategy, survives=False, tells=tells[0])
        self._levels = [
            _Level(min(tier.blocks, most), tier.strategy, survives=tier.medium == DISK, tells=tells[place])
            for place, tier in enumerate(tiers.levels, start=1)
        ]
        self._hits = np.zeros((last + 1, trace.num_requests), np.int32)

    def run(self) -> None:
        """Replay the trace."""
        ids, offsets = np.asarray(self._trace.ids), self._trace.offsets.tolist()
        serve = {FINISH: self._finish, SECOND_HIT: self._second_hit, RECLAIM: self._reclaim}[self._tiers.writes]
        for request, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            if request == self._tiers.restart_at:
                for level in (self._pool, *self._levels):
                    level.restart()
            self._serve(request, ids[start:stop], serve)

    @property
    def hits(self) -> Int32s:
        """Blocks that every request found in any level, int32 [requests]."""
        hits: Int32s = self._hits.sum(axis=0, dtype=np.int32)
        return hits

    @property
    def reclaimed(self) -> int:
        """Blocks that the pool reclaimed."""
        return self._pool.reclaimed

    def results(self) -> tuple[TierResult, ...]:
        """Return what every tier did."""
        return tuple(map(self._result, range(len(self._levels))))

    def restart(self) -> Restart | None:
        """Return what was found after the restart; None if there was none."""
        first, trace = self._tiers.restart_at, self._trace
        if first is None or first >= trace.num_requests:
            return None
        stop = min(trace.num_requests, first + max(1, trace.num_requests // _SHARE_AFTER_RESTART))
        accesses = int(trace.offsets[stop] - trace.offsets[first])
        return Restart(first, stop - first, accesses, int(self._hits[:, first:stop].sum()))

    def _serve(self, request: int, ids: Int32s, write: Callable[[Int32s, int], None]) -> None:
        """Find the leading blocks of a request level by level, load what tiers have, and write by the policy."""
        reaches = [level.books.match_prefix(ids) for level in self._levels]
        found = self._hits[0, request] = self._pool.store(ids)
        for place, reach in enumerate(reaches):
            if reach > found:
                self._load(self._levels[place], ids[:reach])
                self._hits[place + 1, request] = reach - found
                found = reach
        write(ids, int(found))

    def _load(self, level: _Level, ids: Int32s) -> None:
        level.store(ids)
        # A pool too small for the chain has not got all of it: then it stays.
        if self._tiers.exclusive and self._pool.books.match_prefix(ids) == len(ids):
            level.books.drop_tail(ids)
            level.given_up.clear()

    def _finish(self, ids: Int32s, found: int) -> None:
        for level in self._levels:
            level.store(ids)

    def _second_hit(self, ids: Int32s, found: int) -> None:
        for level in self._levels:
            if found:
                level.store(ids[:found])

    def _reclaim(self, ids: Int32s, found: int) -> None:
        above = self._pool
        for level in self._levels:
            for chain in self._chains(above.given_up):
                level.store(chain)
            above.given_up.clear()
            above = level

    def _chains(self, given_up: list[int]) -> Iterator[Int32s]:
        """Yield the chains that end in blocks given up, but for those that are the beginning of another one.

        Blocks are given up from the tail of a chain.
        """
        parents, continued = self._trace.parents, set()
        for block in given_up:
            if block not in continued:
                start, stop = self._first_uses[:, block].tolist()
                yield self._trace.ids[start:stop]
            continued.add(int(parents[block]))

    @cached_property
    def _first_uses(self) -> npt.NDArray[np.int64]:
        """Where in the trace each block first stands behind all that precede it: from and to, int64 [2, blocks]."""
        _, first = np.unique(self._trace.ids, return_index=True)
        offsets = np.asarray(self._trace.offsets)
        return np.stack([offsets[np.searchsorted(offsets, first, side="right") - 1], first + 1])

    def _result(self, place: int) -> TierResult:
        trace, tier, level = self._trace, self._tiers.levels[place], self._levels[place]
        hits = self._hits[place + 1]
        down_to = self._hits[: place + 2].sum(axis=0, dtype=np.int32)
        return TierResult(
            medium=tier.medium,
            strategy=str(tier.strategy),
            blocks=tier.blocks,
            accesses=trace.num_accesses,
            tokens=trace.num_tokens,
            hit_blocks=int(hits.sum(dtype=np.int64)),
            hit_tokens=trace.hit_tokens(down_to) - trace.hit_tokens(down_to - hits),
            written=level.stored,
            hits=hits,
        )
