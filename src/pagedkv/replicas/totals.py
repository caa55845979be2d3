"""Counters and snapshots of many engines, put together as those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt

from pagedkv.engine import EngineSizes, EngineSnapshot, EngineStats, TierFigures
from pagedkv.engine.snapshot import RequestRecord

MILLISECONDS = 2**31
"""The tick of a snapshot of many: their clocks differ, so ages are in milliseconds before it."""


def total_stats(each: Sequence[EngineStats]) -> EngineStats:
    """Return the sums; of tiers those that stand at the same place."""
    if not each:
        return EngineStats()
    summed = {name: sum(getattr(stats, name) for stats in each) for name in _names(EngineStats) - {"tiers"}}
    tiers = tuple(_total_tier(rungs) for rungs in zip(*(stats.tiers for stats in each), strict=True))
    return EngineStats(**summed | {"block_size": each[0].block_size, "tiers": tiers})


def _total_tier(rungs: Sequence[TierFigures]) -> TierFigures:
    summed = {name: sum(getattr(rung, name) for rung in rungs) for name in _names(TierFigures) - {"medium"}}
    return replace(rungs[0], **summed)


def _names(kind: type[EngineStats | TierFigures]) -> set[str]:
    return {each.name for each in fields(kind)}


def total_sizes(sizes: EngineSizes, replicas: int) -> EngineSizes:
    """Return the sizes of so many engines of the same kind."""
    return replace(sizes, total_blocks=replicas * sizes.total_blocks, max_num_seqs=replicas * sizes.max_num_seqs)


def total_snapshot(each: Mapping[str, EngineSnapshot]) -> EngineSnapshot:
    """Return one pool that holds the blocks of all, one replica's behind the other's; ages are in milliseconds.

    Parameters
    ----------
    each : mapping
        Replicas to their snapshots, at least one.
    """
    snapshots = list(each.values())
    requests: list[RequestRecord] = []
    owners, tables = [], []
    firsts = np.cumsum([0] + [snapshot.total_blocks for snapshot in snapshots]).tolist()
    for (name, snapshot), first_block in zip(each.items(), firsts, strict=False):
        owners.append(np.where(snapshot.owner < 0, -1, snapshot.owner + len(requests)).astype(np.int32))
        tables.append((snapshot.tables + first_block).astype(np.int32))
        requests += [replace(record, request_id=f"{name}/{record.request_id}") for record in snapshot.requests]
    prefixes = [
        replace(prefix, block_id=prefix.block_id + first_block, age=int(_milliseconds(snapshot, prefix.age)))
        for snapshot, first_block in zip(snapshots, firsts, strict=False)
        for prefix in snapshot.prefixes
    ]
    return replace(
        snapshots[0],
        taken=max(snapshot.taken for snapshot in snapshots),
        tick=MILLISECONDS,
        kinds=np.concatenate([snapshot.kinds for snapshot in snapshots]),
        ref_count=np.concatenate([snapshot.ref_count for snapshot in snapshots]),
        owner=np.concatenate(owners),
        depth=np.concatenate([snapshot.depth for snapshot in snapshots]),
        age=np.concatenate([_milliseconds(snapshot, snapshot.age).astype(np.uint32) for snapshot in snapshots]),
        tables=np.concatenate(tables),
        requests=tuple(requests),
        prefixes=tuple(sorted(prefixes, key=lambda prefix: -prefix.num_tokens * prefix.uses)),
        stats=total_stats([snapshot.stats for snapshot in snapshots]),
        clock=((0, MILLISECONDS / 1000), (MILLISECONDS, 0.0)),
        cost=max(snapshot.cost for snapshot in snapshots),
    )


def _milliseconds(snapshot: EngineSnapshot, age: npt.NDArray[np.uint32] | int) -> npt.NDArray[np.float64]:
    """Return ages in ticks as milliseconds; those of a time that was not noted stay what they are."""
    if not snapshot.clock:
        return np.asarray(age, np.float64)
    ticks, seconds = zip(*snapshot.clock, strict=True)
    then = snapshot.tick - np.asarray(age, np.float64)
    found: npt.NDArray[np.float64] = np.minimum(np.interp(then, ticks, seconds) * 1000, MILLISECONDS)
    return found
