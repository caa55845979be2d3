"""Engine snapshots and counters: what the page, the terminal view and recorded files are drawn from."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import BlockManager
from pagedkv.control.types import BLOCK_KINDS, FREE, HotPrefix
from pagedkv.engine.request import Request
from pagedkv.errors import bad_argument
from pagedkv.tiers.rung import TierFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """What an engine was made with and never changes.

    Attributes
    ----------
    block_size : int
        Tokens of a block.
    total_blocks : int
        Blocks of the pool.
    bytes_per_block : int
        Of K and V; 0 where the runner does not say.
    vocab_size : int
        Token ids are below it.
    max_model_len : int
        Tokens of a prompt and its continuation.
    max_num_seqs, max_batch_tokens : int
        As of :class:`pagedkv.engine.LLM`.
    """

    block_size: int
    total_blocks: int
    bytes_per_block: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int


class PinnedPrefix(NamedTuple):
    """A prefix that is kept in the pool.

    Attributes
    ----------
    handle : int
        Names it to `unpin`.
    num_tokens : int
        How many tokens are kept, of whole blocks; 0 where none of them was there.
    """

    handle: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An immutable snapshot of the counters since the engine was made.

    Attributes
    ----------
    num_running, num_waiting : int
        Requests that hold blocks now, and those that hold none.
    num_preemptions : int
        How often a running text lost its blocks to another.
    finished_requests : int
        Requests that came to their end, aborted ones not counted.
    aborted_requests : int
    prompt_tokens : int
        Tokens of the prompts of all requests that were admitted.
    generation_tokens : int
        Tokens generated.
    prefix_queries, prefix_hits : int
        Prompt tokens looked up in the cache when a request was first admitted, and those found.
    draft_tokens, accepted_tokens : int
        Tokens guessed by prompt lookup, and those that turned out right.
    blocks_total, blocks_used, blocks_cached, blocks_free : int
        `blocks_free` counts what an allocation can have: cached blocks too.
    block_size : int
    evictions : int
        Sequences evicted by the cache itself.
    reclaimed : int
        Cached blocks reclaimed for a new use.
    steps : int
        Forward passes.
    busy_seconds : float
        Wall time of all steps.
    forward_seconds, sampling_seconds : float
        Of these in the model, and in choosing tokens.
    tiers : tuple of TierFigures
        What each tier has done, nearest first, since it was opened.
    bookkeeping_seconds : float
        The rest: scheduling, the cache's books, stops, text and outputs.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    finished_requests: int = 0
    aborted_requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    block_size: int = 0
    evictions: int = 0
    reclaimed: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0
    tiers: tuple[TierFigures, ...] = ()

    @property
    def bookkeeping_seconds(self) -> float:
        """Seconds of all steps outside of the model and the sampler."""
        return self.busy_seconds - self.forward_seconds - self.sampling_seconds


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
        As of :attr:`pagedkv.CacheSnapshot.kinds`.
    ref_count : uint16 [num_blocks]
        Sequences that hold the block, at most 65,535.
    owner : int32 [num_blocks]
        Index into `requests` of one that holds the block, −1 if none does.
    depth : uint16 [num_blocks]
        Blocks before it in its prefix, at most 65,535; 0 for blocks that cannot be found.
    age : uint32 [num_blocks]
        Ticks since its last use; 0 for a free block.
    requests : tuple of RequestRecord
        Running ones first.
    tables : int32 [total of the requests' blocks]
        The blocks of the first request, in order, then those of the second, …
    prefixes : tuple of HotPrefix
        The hottest first, without their tokens.
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
    prefixes: tuple[HotPrefix, ...] = ()
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
        """Return how many seconds an age in ticks is, interpolated; None where the time was not noted."""
        if not self.clock:
            return None
        ticks, seconds = zip(*self.clock, strict=True)
        return float(np.interp(self.tick - age, ticks, seconds))

    def counts(self) -> dict[str, int]:
        """Return how many blocks there are of each kind."""
        numbers = np.bincount(self.kinds, minlength=len(BLOCK_KINDS)).tolist()
        return dict(zip(BLOCK_KINDS, numbers, strict=True))


# The wire format: for the page, ``/v1/cache/snapshot`` and recorded files.

VERSION = 1
MAX_BLOCKS = 2**31
_COLUMNS = (("kinds", "u1"), ("ref_count", "<u2"), ("owner", "<i4"), ("depth", "<u2"), ("age", "<u4"))
_BYTES_PER_BLOCK = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)
_TABLE_ENTRY = np.dtype("<i4")


class _Frame(msgspec.Struct, kw_only=True):
    """What a snapshot is on the wire: the columns one behind the other, deflated."""

    version: int
    taken: float
    block_size: int
    strategy: str
    tick: int
    num_blocks: int
    columns: bytes
    requests: tuple[RequestRecord, ...]
    prefixes: tuple[HotPrefix, ...]
    stats: EngineStats
    clock: tuple[tuple[int, float], ...] = ()


# Fields that a frame has as the snapshot has them.
_SAME = ("taken", "block_size", "strategy", "tick", "requests", "prefixes", "stats", "clock")
_decoder = msgspec.msgpack.Decoder(_Frame)


def pack_columns(snapshot: EngineSnapshot) -> bytes:
    """Return the arrays one behind the other, little-endian and deflated (zlib).

    They are kinds, ref_count, owner, depth and age, one entry a block, and then the tables.
    """
    parts = [getattr(snapshot, name).astype(kind, copy=False).tobytes() for name, kind in _COLUMNS]
    parts.append(snapshot.tables.astype(_TABLE_ENTRY, copy=False).tobytes())
    return zlib.compress(b"".join(parts), 1)


def encode(snapshot: EngineSnapshot) -> bytes:
    """Return a snapshot as one msgpack map."""
    same = {name: getattr(snapshot, name) for name in _SAME}
    frame = _Frame(version=VERSION, num_blocks=snapshot.total_blocks, columns=pack_columns(snapshot), **same)
    return msgspec.msgpack.encode(frame)


def decode(data: bytes | memoryview) -> EngineSnapshot:
    """Read what `encode` wrote.

    Raises
    ------
    InvalidOperation
        If it is no snapshot, or one of a version that is not known.
    """
    try:
        frame = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise bad_argument("data", f"an encoded snapshot: {error}") from None
    if frame.version != VERSION:
        raise bad_argument("data", f"a snapshot of version {VERSION}", f"version {frame.version}")
    return EngineSnapshot(**{name: getattr(frame, name) for name in _SAME}, **_columns(frame))


def _columns(frame: _Frame) -> dict[str, Any]:
    entries = sum(record.blocks for record in frame.requests)
    if not 0 <= frame.num_blocks < MAX_BLOCKS or any(record.blocks < 0 for record in frame.requests):
        raise bad_argument("data", f"0 … {MAX_BLOCKS - 1} blocks", f"{frame.num_blocks}")
    raw = _inflated(frame.columns, frame.num_blocks * _BYTES_PER_BLOCK + entries * _TABLE_ENTRY.itemsize)
    arrays, place = {}, 0
    for name, kind in _COLUMNS:
        arrays[name] = np.frombuffer(raw, kind, frame.num_blocks, place)
        place += arrays[name].nbytes
    arrays["tables"] = np.frombuffer(raw, _TABLE_ENTRY, entries, place)
    ranges = {"kinds": len(BLOCK_KINDS), "owner": len(frame.requests), "tables": frame.num_blocks}
    for name, end in ranges.items():
        if not _lies_below(arrays[name], end, -1 if name == "owner" else 0):
            raise bad_argument("data", f"{name} below {end}")
    return arrays


def _inflated(packed: bytes, size: int) -> bytes:
    try:
        # Never more than the header promises: a few bytes can be deflated from gigabytes.
        raw = zlib.decompressobj().decompress(packed, size + 1)
    except zlib.error as error:
        raise bad_argument("data", f"an encoded snapshot: {error}") from None
    if len(raw) != size:
        raise bad_argument("data", f"columns of {size} bytes", f"{len(raw)}{('' if len(raw) < size else ' or more')}")
    return raw


def _lies_below(values: npt.NDArray[Any], end: int, least: int) -> bool:
    return not len(values) or (int(values.min()) >= least and int(values.max()) < end)


# Ticks of a cache to seconds.

SECONDS_APART = 0.25
MOST_POINTS = 128


class TickClock:
    """Keeps a few points of time, dense of late and ever sparser long ago: what lies between is interpolated."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []

    def mark(self, tick: int, now: float) -> None:
        """Note the tick that a cache has reached.

        Parameters
        ----------
        tick : int
            Not before the one that was noted last.
        now : float
            Seconds of ``time.monotonic``.
        """
        points = self._points
        # The newest point is always kept, or a cache that rests would seem to have been used right now.
        if len(points) > 1 and now - points[-2][1] < SECONDS_APART:
            points[-1] = (tick, now)
            return
        points.append((tick, now))
        if len(points) > MOST_POINTS:
            del points[1 : MOST_POINTS // 2 : 2]

    def ago(self, now: float) -> tuple[tuple[int, float], ...]:
        """Return (tick, seconds since then) of each point, the oldest first."""
        return tuple((tick, round(max(0.0, now - then), 3)) for tick, then in self._points)


NUM_PREFIXES = 12


def take_snapshot(
    cache: BlockManager, requests: Iterable[Request], stats: EngineStats, clock: TickClock | None = None
) -> EngineSnapshot:
    """Freeze a cache with the requests that use it, in time linear in the pool.

    Parameters
    ----------
    cache : BlockManager
    requests : iterable of Request
        Those under way.
    stats : EngineStats
    clock : TickClock, optional
        Of the cache.
    """
    now = time.monotonic()
    frozen = cache.snapshot()
    held = {int(info.seq_id): info.block_table for info in frozen.sequences}
    listed = [(_tables(request, held), request) for request in requests]
    listed.sort(key=lambda pair: not pair[0])
    place_of = {sequence.seq_id: place for place, (_, request) in enumerate(listed) for sequence in request.sequences}
    # One entry more than there are sequences: the owner −1 of a block without one finds −1.
    places = np.array([place_of.get(int(info.seq_id), -1) for info in frozen.sequences] + [-1], np.int32)
    kinds = frozen.kinds
    age = np.where(kinds == FREE, 0, np.clip(frozen.tick - frozen.last_access, 0, 2**32 - 1))
    return EngineSnapshot(
        taken=time.time(),
        block_size=frozen.block_size,
        strategy=frozen.strategy,
        tick=frozen.tick,
        kinds=kinds,
        ref_count=np.minimum(frozen.ref_count, 2**16 - 1).astype(np.uint16),
        owner=places[frozen.owner],
        depth=np.minimum(frozen.depth, 2**16 - 1).astype(np.uint16),
        age=age.astype(np.uint32),
        tables=np.concatenate([np.empty(0, np.int32), *(table for tables, _ in listed for table in tables)]),
        requests=tuple(_record(request, sum(map(len, tables)), now) for tables, request in listed),
        prefixes=cache.hottest_prefixes(NUM_PREFIXES),
        stats=stats,
        clock=clock.ago(now) if clock is not None else (),
        cost=time.monotonic() - now,
    )


def _tables(request: Request, held: dict[int, npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int32]]:
    return [held[sequence.seq_id] for sequence in request.sequences if sequence.seq_id in held]


def _record(request: Request, blocks: int, now: float) -> RequestRecord:
    return RequestRecord(
        request_id=request.request_id,
        state="running" if blocks else "waiting",
        prompt_tokens=request.num_prompt_tokens,
        output_tokens=sum(len(sequence.output_ids) for sequence in request.sequences),
        cached_tokens=request.num_cached_tokens or 0,
        blocks=blocks,
        priority=request.priority,
        age=max(0.0, now - request.arrived),
        num_preemptions=request.num_preemptions,
    )
