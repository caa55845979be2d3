"""The engine at one moment, frozen: what the page, the terminal view and recorded files are drawn from."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.control.hot_prefixes import hottest_prefixes
from pagedkv.control.inspection import Inspection
from pagedkv.engine.stats import EngineStats
from pagedkv.errors import InvalidOperation

if TYPE_CHECKING:
    from pagedkv.engine.request import Request

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
    "decode",
    "encode",
    "pack_columns",
    "take_snapshot",
]

KINDS = ("free", "active", "shared", "cached", "pinned")
"""What a block is, by the number that stands for it in ``EngineSnapshot.kinds``."""
FREE, ACTIVE, SHARED, CACHED, PINNED = range(5)

VERSION = 1
NUM_PREFIXES = 12
MAX_BLOCKS = 2**31
_COLUMNS = (("kinds", "u1"), ("ref_count", "<u2"), ("owner", "<i4"), ("depth", "<u2"), ("age", "<u4"))


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
    prefixes : tuple of PrefixRecord
        The hottest first.
    stats : EngineStats
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
    requests: tuple[RequestRecord, ...] = ()
    prefixes: tuple[PrefixRecord, ...] = ()
    stats: EngineStats

    @property
    def total_blocks(self) -> int:
        """How many blocks the pool has."""
        return len(self.kinds)

    def counts(self) -> dict[str, int]:
        """Return how many blocks there are of each kind."""
        numbers = np.bincount(self.kinds, minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, numbers, strict=True))


def take_snapshot(cache: Inspection, requests: Iterable[Request], stats: EngineStats) -> EngineSnapshot:
    """Freeze a cache with the requests that use it, in time linear in the pool.

    Parameters
    ----------
    cache : BlockManager
    requests : iterable of Request
        Those under way.
    stats : EngineStats
    """
    now = time.monotonic()
    frozen = cache.snapshot()
    held = {int(info.seq_id): info.num_blocks for info in frozen.sequences}
    listed = sorted(((_record(r, held, now), r) for r in requests), key=lambda pair: pair[0].state != "running")
    place_of = {branch.seq_id: place for place, (_, request) in enumerate(listed) for branch in request.branches}
    # One entry more than there are sequences: the owner −1 of a block without one finds −1.
    places = np.array([place_of.get(int(info.seq_id), -1) for info in frozen.sequences] + [-1], np.int32)
    kinds = np.select(
        [frozen.pinned, frozen.ref_count > 1, frozen.ref_count == 1, frozen.cached], [PINNED, SHARED, ACTIVE, CACHED]
    ).astype(np.uint8)
    age = np.where(kinds == FREE, 0, np.clip(frozen.tick - frozen.last_access, 0, 2**32 - 1))
    prefixes = tuple(
        PrefixRecord(
            block_id=prefix.block_id,
            num_tokens=prefix.num_tokens,
            uses=prefix.uses,
            ref_count=prefix.ref_count,
            age=max(0, frozen.tick - prefix.last_access),
        )
        for prefix in hottest_prefixes(cache, NUM_PREFIXES)
    )
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
        requests=tuple(record for record, _ in listed),
        prefixes=prefixes,
        stats=stats,
    )


def _record(request: Request, held: dict[int, int], now: float) -> RequestRecord:
    blocks = [held[branch.seq_id] for branch in request.branches if branch.seq_id in held]
    return RequestRecord(
        request_id=request.request_id,
        state="running" if blocks else "waiting",
        prompt_tokens=request.num_prompt_tokens,
        output_tokens=sum(len(branch.output_ids) for branch in request.branches),
        cached_tokens=request.num_cached_tokens or 0,
        blocks=sum(blocks),
        priority=request.priority,
        age=max(0.0, now - request.arrived),
        num_preemptions=request.num_preemptions,
    )


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
    prefixes: tuple[PrefixRecord, ...]
    stats: EngineStats


_encoder: Any = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Frame)


def pack_columns(snapshot: EngineSnapshot) -> bytes:
    """Return the arrays one behind the other, little-endian and deflated (zlib): kinds, ref_count, owner, depth, age."""
    arrays = [getattr(snapshot, name).astype(kind, copy=False).tobytes() for name, kind in _COLUMNS]
    return zlib.compress(b"".join(arrays), 1)


def encode(snapshot: EngineSnapshot) -> bytes:
    """Return a snapshot as one msgpack map."""
    return bytes(
        _encoder.encode(
            _Frame(
                version=VERSION,
                taken=snapshot.taken,
                block_size=snapshot.block_size,
                strategy=snapshot.strategy,
                tick=snapshot.tick,
                num_blocks=snapshot.total_blocks,
                columns=pack_columns(snapshot),
                requests=snapshot.requests,
                prefixes=snapshot.prefixes,
                stats=snapshot.stats,
            )
        )
    )


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
        raise InvalidOperation(f"data expects an encoded snapshot: {error}") from None
    if frame.version != VERSION:
        raise InvalidOperation(f"data expects a snapshot of version {VERSION}, got version {frame.version}")
    arrays = _columns(frame)
    return EngineSnapshot(
        taken=frame.taken,
        block_size=frame.block_size,
        strategy=frame.strategy,
        tick=frame.tick,
        requests=frame.requests,
        prefixes=frame.prefixes,
        stats=frame.stats,
        **arrays,
    )


def _columns(frame: _Frame) -> dict[str, Any]:
    kinds = [np.dtype(kind) for _, kind in _COLUMNS]
    size = frame.num_blocks * sum(kind.itemsize for kind in kinds)
    if not 0 <= frame.num_blocks < MAX_BLOCKS:
        raise InvalidOperation(f"data expects 0 … {MAX_BLOCKS - 1} blocks, got {frame.num_blocks}")
    inflate = zlib.decompressobj()
    try:
        # Never more than the header promises: a few bytes can be deflated from gigabytes.
        raw = inflate.decompress(frame.columns, size + 1)
    except zlib.error as error:
        raise InvalidOperation(f"data expects an encoded snapshot: {error}") from None
    if len(raw) != size:
        raise InvalidOperation(f"data expects {size} bytes for {frame.num_blocks} blocks, got {len(raw)} or more")
    arrays, place = {}, 0
    for (name, _), kind in zip(_COLUMNS, kinds, strict=True):
        arrays[name] = np.frombuffer(raw, kind, frame.num_blocks, place)
        place += frame.num_blocks * kind.itemsize
    if frame.num_blocks and (arrays["kinds"].max() >= len(KINDS) or arrays["owner"].max() >= len(frame.requests)):
        raise InvalidOperation("data expects known kinds of blocks and owners that are among the requests")
    return arrays
