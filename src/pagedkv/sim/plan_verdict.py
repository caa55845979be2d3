"""What holds the hit ratio back: the capacity, the strategy, or that there is nothing to reuse."""

from __future__ import annotations

from pagedkv.sim.plan_types import Level, Memory, Size, Verdict

__all__ = ["format_bytes", "judge", "judge_memory", "nothing_to_reuse"]

NOTHING = 0.1
"""Below this attainable hit ratio a cache of any size saves less than a tenth of the prefill."""
_LARGE_FACTOR = 2
"""Where LRU needs this many times the optimum's capacity, looking at the strategy comes before buying memory."""


def format_bytes(count: float) -> str:
    """Return bytes in binary units, ``"12.5 GiB"`` say."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}" if count >= 10 else f"{count:.2f} {unit}"


def nothing_to_reuse(attainable: float) -> Verdict:
    """Judge traffic that hardly repeats itself."""
    found = f"finds only {attainable:.1%} of the blocks" if attainable else "finds nothing"
    text = (
        f"Nothing to reuse: even a cache without a limit {found}. Neither memory nor another strategy changes that; "
        "prompts have to share their beginnings first."
    )
    return Verdict("nothing", text, 0, 0, 0.0, 0.0, 0.0)


def judge(attainable: float, target: float, level: Level, sizes: tuple[Size, Size, Size]) -> Verdict:
    """Judge traffic for which no memory was given: by what LRU needs for the target, and what the optimum does.

    Parameters
    ----------
    attainable, target : float
    level : Level
        Of the target.
    sizes : tuple of Size
        LRU, the best strategy and the optimum at the optimum's capacity.
    """
    if attainable < NOTHING:
        return nothing_to_reuse(attainable)
    lru, best, optimum = sizes
    regained = _regained(lru, best, optimum)
    needs = f"{target:.0%} of what can be found at all takes {format_bytes(level.lru.bytes)} under LRU"
    least = format_bytes(level.optimum.bytes)
    if level.lru.blocks >= _LARGE_FACTOR * level.optimum.blocks:
        kind, text = "strategy", f"Limited by the strategy: {needs}, and {least} if the future were known."
    else:
        kind, text = "capacity", f"Limited by capacity: {needs}, and still {least} if the future were known."
    text = f"{text} {_others(level, best, regained)}"
    return Verdict(kind, text, optimum.blocks, optimum.bytes, *_losses(target, lru, optimum), regained)


def judge_memory(attainable: float, target: float, level: Level, memory: Memory) -> Verdict:
    """Judge a memory size: where LRU misses the target there, the larger of two losses names the cause.

    What the optimum lacks too is a matter of capacity; what only LRU lacks is one of the strategy.
    """
    if attainable < NOTHING:
        return nothing_to_reuse(attainable)
    lru, best, optimum = memory.lru, memory.best, memory.optimum
    to_capacity, to_strategy = _losses(target, lru, optimum)
    regained = _regained(lru, best, optimum)
    found = f"with {format_bytes(memory.bytes)} LRU finds {lru.share:.0%} of what can be found at all"
    if lru.share >= target:
        kind, text = "enough", f"Enough: {found}, and {format_bytes(level.lru.bytes)} would do for {target:.0%}."
    else:
        kind = "strategy" if to_strategy > to_capacity else "capacity"
        cause = "the strategy" if kind == "strategy" else "capacity"
        text = f"Limited by {cause}: {found}, and {optimum.share:.0%} would be found if the future were known. "
        text += f"{_closed(best, regained)} {target:.0%} takes {format_bytes(level.lru.bytes)} under LRU."
    return Verdict(kind, text, lru.blocks, memory.bytes, to_capacity, to_strategy, regained)


def _losses(target: float, lru: Size, optimum: Size) -> tuple[float, float]:
    return max(0.0, target - optimum.share), max(0.0, min(target, optimum.share) - lru.share)


def _regained(lru: Size, best: Size, optimum: Size) -> float:
    gap = optimum.share - lru.share
    return min(1.0, (best.share - lru.share) / gap) if gap > 0 else 0.0


def _closed(best: Size, regained: float) -> str:
    if regained < 0.005:
        return "None of the strategies compared finds more than LRU there."
    return f"{best.strategy} closes {regained:.0%} of that gap."


def _others(level: Level, best: Size, regained: float) -> str:
    if level.best.strategy != "lru":
        return f"{level.best.strategy} takes {format_bytes(level.best.bytes)}."
    if regained < 0.005:
        return "None of the strategies compared does better than LRU."
    at = format_bytes(best.bytes)
    return f"No strategy compared takes less than LRU; with {at}, {best.strategy} closes {regained:.0%} of the gap."
