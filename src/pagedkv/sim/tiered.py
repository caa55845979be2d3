"""Replay of a trace through a pool and the tiers beneath it: hits by tier, blocks written, what a restart loses.

The books of a tier are those that serve models, and what happens to them is what `pagedkv.tiers.BookTier` does with its
own: a load holds the chain that it reads; a store matches a chain, takes blocks for what is missing, commits, frees.
Every level finds a block behind its parents only, so a chain lies in a tier from its first block on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pagedkv.control.content_cache import ContentCache
from pagedkv.control.protocol import Strategy
from pagedkv.control.restore import records_of, restore_blocks
from pagedkv.control.strategies import as_strategy
from pagedkv.errors import bad_argument
from pagedkv.sim.trace import MAX_BLOCKS, Int32s, Int64s, Trace
from pagedkv.validate import require_choice, require_flag, require_int, require_number, shown

HOST, DISK, SHARED = "host", "disk", "shared"
FINISH, RECLAIM, SECOND_HIT = "finish", "reclaim", "second-hit"


@dataclass(frozen=True)
class TierSpec:
    """A tier to replay with.

    Parameters
    ----------
    medium : {"host", "disk", "shared"}
        A restart leaves nothing of a host tier, all of a disk, and does not touch a shared one: that is a server, one
        for all replicas of a fleet. Of the others each replica has its own.
    blocks : int
        Capacity, 1 … 2³¹−2; the replicas of a fleet share that of a host tier or disk in equal parts.
    strategy : str or EvictionStrategy
        What it gives up first when it is full.
    bytes_per_second : float, optional
        How fast a replica loads from it, for a replay in time; None for at once.
    latency : float
        Seconds before the first byte, of every load.
    """

    medium: str
    blocks: int
    strategy: Strategy = "lru"
    bytes_per_second: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        require_choice("medium", self.medium, (HOST, DISK, SHARED))
        require_int("blocks", self.blocks, 1, MAX_BLOCKS)
        as_strategy(self.strategy)
        if self.bytes_per_second is not None:
            require_number("bytes_per_second", self.bytes_per_second, 0, above=True)
        require_number("latency", self.latency, 0)

    def blocks_each(self, replicas: int) -> int:
        """Return how much of it one of so many replicas has; `InvalidOperation` where no block is left for it."""
        if self.medium == SHARED:
            return self.blocks
        if self.blocks < replicas:
            raise bad_argument("tiers", f"at least one block for each of {replicas} replicas", f"{self.blocks}")
        return self.blocks // replicas

    def seconds(self, num_bytes: float) -> float:
        """Return how long a load takes."""
        return self.latency + (num_bytes / self.bytes_per_second if self.bytes_per_second is not None else 0.0)


@dataclass(frozen=True)
class Tiers:
    """The tiers beneath a pool, the fastest first, and how they are used.

    Parameters
    ----------
    levels : sequence of TierSpec
        Of different media, a shared one last; none is fine, for a restart of the pool alone.
    writes : {"finish", "reclaim", "second-hit"}
        When a chain is stored: in every tier when its request ends; in the next tier when a level reclaims its last
        block; in every tier when it is found, that is its second use.
    exclusive : bool
        Whether what is loaded leaves the tier, but for blocks that other chains there continue. What the pool reclaims
        goes down, so `writes` must be ``"reclaim"``.
    restart_at : int, optional
        The request before which everything begins anew: the pool and a host tier are empty then, a disk tier has been
        closed and opened again, on every replica. None, or a number beyond the last request, for no restart.

    Raises
    ------
    InvalidOperation
        If an argument is out of range, two levels are of one medium, or a level stands beneath a shared one.
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
        if SHARED in media[:-1]:
            raise bad_argument("tiers", "the shared one last", ", ".join(media))
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


class TraceClock:
    """What pools ask for the time while a trace is replayed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.seconds


class Level:
    """The books of one level, which remember what they give up where the next level wants it."""

    def __init__(
        self, blocks: int, strategy: Strategy, *, medium: str = HOST, tells: bool, clock: TraceClock | None = None
    ) -> None:
        self._blocks, self._strategy, self._medium, self._tells = blocks, strategy, medium, tells
        self._clock = clock
        self._stored_before = self._reclaimed_before = 0
        self._restored = 0
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

    def store(self, ids: Int64s, output: int = 0) -> int:
        """Hold a chain, or as much of it as there is room for; returns how many blocks of it were there."""
        return int(self.books.run(ids, np.array([0, len(ids)], np.int64), outputs=np.array([output], np.int64))[0])

    def restart(self) -> None:
        """Begin anew, with what was there before where the medium keeps it; a shared one is a server that goes on."""
        if self._medium == SHARED:
            return
        self._stored_before, self._reclaimed_before = self.stored, self.reclaimed
        records = records_of(self.books) if self._medium == DISK else None
        self.books = self._new_books()
        self._restored = int(restore_blocks(self.books, *records).sum()) if records else 0

    def _new_books(self) -> ContentCache:
        # A strategy that learned begins anew.
        books = ContentCache(self._blocks, copy.deepcopy(self._strategy), clock=self._clock)
        if self._tells:
            books.remember_given_up()
        return books


class _Chains:
    """Finds the chain that ends in a block."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def ending_in(self, given_up: list[int]) -> Iterator[Int64s]:
        """Yield the chains that end in blocks given up, but for those that are the beginning of another one.

        Blocks are given up from the tail of a chain.
        """
        parents, continued = self._trace.parents, set()
        for block in given_up:
            if block not in continued:
                start, stop = self._first_uses[:, block].tolist()
                yield self._trace.ids[start:stop].astype(np.int64)
            continued.add(int(parents[block]))

    @cached_property
    def _first_uses(self) -> npt.NDArray[np.int64]:
        """Where in the trace each block first stands behind all that precede it: from and to, int64 [2, blocks]."""
        _, first = np.unique(self._trace.ids, return_index=True)
        offsets = np.asarray(self._trace.offsets)
        return np.stack([offsets[np.searchsorted(offsets, first, side="right") - 1], first + 1])


class TieredPool:
    """What one replica has: a pool, and the tiers beneath it, of which it may share the last one."""

    def __init__(self, pool: Level, levels: Sequence[Level], tiers: Tiers, chains: _Chains) -> None:
        self.pool, self.levels = pool, levels
        self._tiers, self._chains = tiers, chains

    @property
    def books(self) -> ContentCache:
        """Those of the pool."""
        return self.pool.books

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """The pool, and the tiers from the fastest on."""
        return (self.pool, *self.levels)

    def reaches(self, ids: Int64s) -> list[int]:
        """Return how many leading blocks each level has, the pool first."""
        return [level.books.match_prefix(ids) for level in self.all_levels]

    def serve(self, ids: Int64s, reaches: Sequence[int], output: int) -> list[int]:
        """Serve a request at once: load what tiers have, write by the policy; returns the blocks found by level.

        `reaches` is what the levels have of it, and `output` how many tokens it writes.
        """
        hits = [self.pool.store(ids, output)]
        for place, reach in enumerate(reaches[1:]):
            found = sum(hits)
            hits.append(max(0, reach - found))
            if reach > found:
                self._load(self.levels[place], ids[:reach])
        self._write(ids, sum(hits))
        if self._tiers.writes == FINISH:
            self.finished(ids)
        return hits

    def begin(self, request: int, ids: Int64s, more: int, hits: Sequence[int]) -> None:
        """Give a request its blocks, and `more` for its answer, load what it is to find in tiers, write what is found.

        There is room for it. It holds its blocks until the pool is told to free them.
        """
        self.books.allocate(request, ids)
        self.books.append(request, more)
        for place, reach in enumerate(np.cumsum(hits)[1:].tolist()):
            if hits[place + 1]:
                self._load(self.levels[place], ids[:reach], holds_all=True)
        self._write(ids, sum(hits))

    def finished(self, ids: Int64s) -> None:
        """Write the prompt of a request that ends to every tier, if that is when they are written."""
        if self._tiers.writes == FINISH:
            for level in self.levels:
                level.store(ids)

    def _load(self, level: Level, ids: Int64s, holds_all: bool = False) -> None:
        level.store(ids)
        # A pool too small for the chain has not got all of it: then it stays.
        if self._tiers.exclusive and (holds_all or self.books.match_prefix(ids) == len(ids)):
            level.books.drop_tail(ids)
            level.books.take_given_up()  # it went up, not down

    def _write(self, ids: Int64s, found: int) -> None:
        """Write what is written when a request begins: what it found, or what a level reclaimed for it."""
        if self._tiers.writes == SECOND_HIT and found:
            for level in self.levels:
                level.store(ids[:found])
        elif self._tiers.writes == RECLAIM:
            above = self.pool
            for level in self.levels:
                for chain in self._chains.ending_in(above.books.take_given_up().tolist()):
                    level.store(chain)
                above = level


def tiered_pools(
    trace: Trace,
    blocks: int,
    strategy: Strategy,
    tiers: Tiers,
    clock: TraceClock,
    *,
    replicas: int = 1,
    most: int | None = None,
) -> list[TieredPool]:
    """Return what each replica has: a pool of `blocks`, its parts of the tiers, and the shared one that all have.

    A pool has at most `most` blocks, by default what the trace fills; that finds the same in less memory.
    """
    filled, last = max(1, trace.num_distinct), len(tiers.levels)
    tells = [tiers.writes == RECLAIM and place < last for place in range(last + 1)]

    def level(place: int) -> Level:
        tier = tiers.levels[place]
        each = min(tier.blocks_each(replicas), filled)
        return Level(each, tier.strategy, medium=tier.medium, tells=tells[place + 1])

    shared = {place: level(place) for place, tier in enumerate(tiers.levels) if tier.medium == SHARED}
    chains = _Chains(trace)
    return [
        TieredPool(
            Level(min(blocks, most or filled), strategy, tells=tells[0], clock=clock),
            [shared.get(place) or level(place) for place in range(last)],
            tiers,
            chains,
        )
        for _ in range(replicas)
    ]


class LevelHits:
    """The levels of all replicas, the blocks that every request found in them, and what follows from that.

    Parameters
    ----------
    trace : Trace
    tiers : Tiers
    pools : sequence of TieredPool
        Of all replicas.
    """

    def __init__(self, trace: Trace, tiers: Tiers, pools: Sequence[TieredPool]) -> None:
        self._trace, self._tiers, self._pools = trace, tiers, pools
        self.by_level = np.zeros((len(tiers.levels) + 1, trace.num_requests), np.int32)
        self._levels = list(dict.fromkeys(level for pool in pools for level in pool.all_levels))
        self._places = [[self._levels.index(level) for level in pool.all_levels] for pool in pools]

    def reaches(self, ids: Int64s) -> list[list[int]]:
        """Return how many leading blocks each level of each replica has; a shared one is asked once."""
        found = [level.books.match_prefix(ids) for level in self._levels]
        return [[found[place] for place in places] for places in self._places]

    @property
    def hits(self) -> Int32s:
        """Blocks that every request found in any level, int32 [requests]."""
        hits: Int32s = self.by_level.sum(axis=0, dtype=np.int32)
        return hits

    @property
    def reclaimed(self) -> int:
        """Blocks that all pools reclaimed."""
        return sum(pool.pool.reclaimed for pool in self._pools)

    def restart_if_due(self, request: int) -> None:
        """Begin anew on every replica, if that is to happen before this request."""
        if request == self._tiers.restart_at:
            for level in self._levels:
                level.restart()

    def tiers(self) -> tuple[TierResult, ...]:
        """Return what every tier did."""
        return tuple(map(self._tier, range(len(self._tiers.levels))))

    def restart(self) -> Restart | None:
        """Return what was found after the restart; None if there was none."""
        first, trace = self._tiers.restart_at, self._trace
        if first is None or first >= trace.num_requests:
            return None
        stop = min(trace.num_requests, first + max(1, trace.num_requests // _SHARE_AFTER_RESTART))
        accesses = int(trace.offsets[stop] - trace.offsets[first])
        return Restart(first, stop - first, accesses, int(self.by_level[:, first:stop].sum()))

    def _tier(self, place: int) -> TierResult:
        trace, tier = self._trace, self._tiers.levels[place]
        hits = self.by_level[place + 1]
        down_to = self.by_level[: place + 2].sum(axis=0, dtype=np.int32)
        return TierResult(
            medium=tier.medium,
            strategy=str(tier.strategy),
            blocks=tier.blocks,
            accesses=trace.num_accesses,
            tokens=trace.num_tokens,
            hit_blocks=int(hits.sum(dtype=np.int64)),
            hit_tokens=trace.hit_tokens(down_to) - trace.hit_tokens(down_to - hits),
            written=sum(level.stored for level in {pool.levels[place] for pool in self._pools}),
            hits=hits,
        )


def run_tiered(trace: Trace, blocks: int, strategy: Strategy, tiers: Tiers) -> LevelHits:
    """Replay a trace through one pool and the tiers beneath it."""
    clock = TraceClock()
    (pool,) = pools = tiered_pools(trace, blocks, strategy, tiers, clock)
    found = LevelHits(trace, tiers, pools)
    ids, offsets = np.asarray(trace.ids).astype(np.int64), trace.offsets.tolist()
    for request, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        clock.seconds = float(trace.times[request])
        found.restart_if_due(request)
        asked = ids[start:stop]
        found.by_level[:, request] = pool.serve(asked, pool.reaches(asked), int(trace.output_tokens[request]))
    return found
