"""Counters and snapshots of several engines as those of one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pagedkv.control.types import HotPrefix
from pagedkv.engine import EngineSnapshot, EngineStats, TierFigures
from pagedkv.engine.snapshot import RequestRecord, decode, encode
from pagedkv.replicas.totals import MILLISECONDS, total_snapshot, total_stats


def test_counters_are_added_up_and_those_of_tiers_one_by_one() -> None:
    tiers = TierFigures(medium="CPU", hits=2), TierFigures(medium="DISK", read_seconds=0.5)
    one = EngineStats(prompt_tokens=3, block_size=16, blocks_total=8, busy_seconds=1.5, tiers=tiers)
    total = total_stats([one, replace(one, prompt_tokens=4)])
    assert (total.prompt_tokens, total.block_size, total.blocks_total, total.busy_seconds) == (7, 16, 16, 3.0)
    assert [(tier.medium, tier.hits, tier.read_seconds) for tier in total.tiers] == [("CPU", 4, 0.0), ("DISK", 0, 1.0)]
    assert total_stats([]) == EngineStats()


def snapshot(tick: int, clock: tuple[tuple[int, float], ...]) -> EngineSnapshot:
    """Four blocks, of which a request holds the first and the third, and the second was used 10 ticks ago."""
    return EngineSnapshot(
        taken=1000.0 + tick,
        block_size=16,
        strategy="lru",
        tick=tick,
        kinds=np.array([1, 3, 1, 0], np.uint8),
        ref_count=np.array([1, 0, 1, 0], np.uint16),
        owner=np.array([0, -1, 0, -1], np.int32),
        depth=np.array([0, 0, 1, 0], np.uint16),
        age=np.array([0, 10, 0, 0], np.uint32),
        tables=np.array([0, 2], np.int32),
        requests=(RequestRecord(request_id="r", state="running", prompt_tokens=20, blocks=2),),
        prefixes=(HotPrefix(1, 16, 5, 0, 10),),
        stats=EngineStats(blocks_total=4),
        clock=clock,
    )


def test_pools_stand_one_behind_the_other_and_ages_on_one_clock() -> None:
    slow, fast = snapshot(100, ((0, 50.0), (100, 0.0))), snapshot(20, ((0, 2.0), (20, 0.0)))
    total = decode(encode(total_snapshot({"a": slow, "b": fast})))
    assert total.kinds.tolist() == [1, 3, 1, 0] * 2 and total.depth.tolist() == [0, 0, 1, 0] * 2
    assert total.owner.tolist() == [0, -1, 0, -1, 1, -1, 1, -1]
    assert [total.blocks_of(place).tolist() for place in (0, 1)] == [[0, 2], [4, 6]]
    assert [record.request_id for record in total.requests] == ["a/r", "b/r"]
    assert total.stats.blocks_total == 8 and total.taken == 1100.0 and total.tick == MILLISECONDS
    assert [prefix.block_id for prefix in total.prefixes] == [1, 5]
    assert [round(total.seconds_since(age) or 0, 2) for age in total.age[[1, 5]].tolist()] == [5.0, 1.0]
    assert [round(total.seconds_since(prefix.age) or 0, 2) for prefix in total.prefixes] == [5.0, 1.0]
