"""What holds the hit ratio back: the capacity, the strategy, or that there is nothing to reuse."""

from __future__ import annotations

from pagedkv.sim.plan_types import Level, Memory, Size, Verdict

__all__ = ["format_bytes", "judge", "nothing_to_reuse"]

NOTHING = 0.1
"""Below this attainable hit ratio a cache of any size saves less than a tenth of the prefill."""
_LARGE_GAP = 0.1
"""Share of the target from which on what LRU misses beside the optimum is the first thing to look at."""


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


def judge(attainable: float, target: float, at_target: Level, sizes: Memory | tuple[Size, Size, Size]) -> Verdict:
    """Judge one size: the given memory, or LRU, best and optimum at the smallest size where the optimum does it.

    Where the target is missed, the larger of two losses names the cause: what the optimum lacks too is a matter of
    capacity, what only LRU lacks one of the strategy.
    """
    if attainable < NOTHING:
        return nothing_to_reuse(attainable)
    given = isinstance(sizes, Memory)
    lru, best, optimum = (sizes.lru, sizes.best, sizes.optimum) if isinstance(sizes, Memory) else sizes
    to_capacity = max(0.0, target - optimum.share)
    to_strategy = max(0.0, min(target, optimum.share) - lru.share)
    gap = optimum.share - lru.share
    regained = (best.share - lru.share) / gap if gap > 0 else 0.0
    if given and lru.share >= target:
        kind = "enough"
    elif to_strategy > to_capacity and to_strategy >= _LARGE_GAP * target:
        kind = "strategy"
    else:
        kind = "capacity"
    text = _TEXTS[kind](target, at_target, given, lru, best, optimum, regained)
    return Verdict(kind, text, lru.blocks, lru.bytes, to_capacity, to_strategy, regained)


def _enough(target: float, level: Level, given: bool, lru: Size, best: Size, optimum: Size, regained: float) -> str:
    return (
        f"Enough: with {format_bytes(lru.bytes)} LRU finds {lru.share:.0%} of what can be found at all, and the target "
        f"is {target:.0%}. {format_bytes(level.lru.bytes)} would do."
    )


def _capacity(target: float, level: Level, given: bool, lru: Size, best: Size, optimum: Size, regained: float) -> str:
    at = format_bytes(lru.bytes)
    first = (
        f"Limited by capacity: with {at} even the optimum finds {optimum.share:.0%} of what can be found at all, LRU "
        f"{lru.share:.0%}."
        if given
        else f"Limited by capacity: below {at} no strategy finds {target:.0%} of what can be found at all, and LRU is "
        f"close to the best possible there ({lru.share:.0%})."
    )
    return f"{first} {_price(target, level)}"


def _strategy(target: float, level: Level, given: bool, lru: Size, best: Size, optimum: Size, regained: float) -> str:
    first = (
        f"Limited by the strategy: with {format_bytes(lru.bytes)} LRU finds {lru.share:.0%} of what can be found at "
        f"all, the optimum, which knows the future, {optimum.share:.0%}."
    )
    closed = (
        f"{best.strategy} closes {regained:.0%} of that gap."
        if best.strategy != "lru" and regained > 0
        else "None of the strategies compared closes any of that gap."
    )
    return f"{first} {closed} {_price(target, level)}"


def _price(target: float, level: Level) -> str:
    text = f"{target:.0%} takes {format_bytes(level.lru.bytes)} under LRU"
    if level.best.strategy != "lru":
        text += f", {format_bytes(level.best.bytes)} under {level.best.strategy}"
    return f"{text}."


_TEXTS = {"enough": _enough, "capacity": _capacity, "strategy": _strategy}
