"""The engine at one moment, frozen: what the page, the terminal view and recorded files are drawn from."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pagedkv.control.manager import Inspection, hottest_prefixes
from pagedkv.engine.snapshot_types import (
    ACTIVE,
    CACHED,
    FREE,
    KINDS,
    PINNED,
    SHARED,
    EngineSnapshot,
    PrefixRecord,
    RequestRecord,
)
from pagedkv.engine.snapshot_wire import decode, encode, pack_columns
from pagedkv.engine.stats import EngineStats
from pagedkv.engine.tick_clock import TickClock

if TYPE_CHECKING:
    from pagedkv.engine.request import Request

__all__ = [
    "ACTIVE",
    "CACHED",
    "FREE",
    "KINDS",
    "NUM_PREFIXES",
    "PINNED",
    "SHARED",
    "EngineSnapshot",
    "PrefixRecord",
    "RequestRecord",
    "decode",
    "encode",
    "hottest_prefixes",
    "pack_columns",
    "take_snapshot",
]

NUM_PREFIXES = 12


def take_snapshot(
    cache: Inspection, requests: Iterable[Request], stats: EngineStats, clock: TickClock | None = None
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
    held = {int(info.seq_id): info._table for info in frozen.sequences}
    listed = [(_tables(request, held), request) for request in requests]
    listed.sort(key=lambda pair: not pair[0])
    place_of = {branch.seq_id: place for place, (_, request) in enumerate(listed) for branch in request.branches}
    # One entry more than there are sequences: the owner −1 of a block without one finds −1.
    places = np.array([place_of.get(int(info.seq_id), -1) for info in frozen.sequences] + [-1], np.int32)
    pinned = frozen.pinned.copy()
    for info in frozen.sequences:
        if info.pinned:
            pinned[info._table] = True  # as long as it lives it keeps all of its blocks
    kinds = np.select(
        [pinned, frozen.ref_count > 1, frozen.ref_count == 1, frozen.cached], [PINNED, SHARED, ACTIVE, CACHED]
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
        tables=np.concatenate([np.empty(0, np.int32), *(table for tables, _ in listed for table in tables)]),
        requests=tuple(_record(request, sum(map(len, tables)), now) for tables, request in listed),
        prefixes=prefixes,
        stats=stats,
        clock=clock.ago(now) if clock is not None else (),
        cost=time.monotonic() - now,
    )


def _tables(request: Request, held: dict[int, npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int32]]:
    return [held[branch.seq_id] for branch in request.branches if branch.seq_id in held]


def _record(request: Request, blocks: int, now: float) -> RequestRecord:
    return RequestRecord(
        request_id=request.request_id,
        state="running" if blocks else "waiting",
        prompt_tokens=request.num_prompt_tokens,
        output_tokens=sum(len(branch.output_ids) for branch in request.branches),
        cached_tokens=request.num_cached_tokens or 0,
        blocks=blocks,
        priority=request.priority,
        age=max(0.0, now - request.arrived),
        num_preemptions=request.num_preemptions,
    )
