"""Where a value lies on an axis, and which values the axis names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "linear_ticks", "log_ticks", "ratio_ticks", "time_ticks"]

_TIMES = (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400)
_EVEN_TIMES = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True)
class Scale:
    """A straight map from values ``low … high`` to pixels ``start … stop``, of logarithms where `is_log`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; what lies outside of the scale is drawn at its end."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """Return round values from 0 on, the last at or above `high`: the axis ends there."""
    if not high > 1e-15:
        high = 1.0
    raw = high / most
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def ratio_ticks(high: float) -> list[float]:
    """Return ticks for a share: above `high` with some air, but never above 1."""
    return linear_ticks(min(1.0, high * 1.04))


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return 1-2-5 steps between `low` and `high`; only 1s, or every other power of ten, where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [factor * 10.0**power for power in powers for factor in factors] for factors in ((1, 2, 5), (1, 3), (1,))
    ]
    choices += [[10.0**power for power in powers if power % every == 0] for every in (2, 3, 6)]
    inside = [[tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] for ticks in choices]
    return next((ticks for ticks in inside if len(ticks) <= most), inside[-1])


def time_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return seconds, minutes, hours and days between `low` and `high` for a log axis."""
    return _thinned([tick for tick in _TIMES if low * 0.999 <= tick <= high * 1.001], most)


def even_time_ticks(high: float, most: int = 7) -> list[float]:
    """Return times from 0 to at most `high` in equal steps that a clock would have."""
    step = next((step for step in _EVEN_TIMES if high <= step * most), None)
    if step is None:
        step = 86400 * math.ceil(high / 86400 / most)
    return [float(step * i) for i in range(int(high / step) + 1)]


def _thinned(ticks: Sequence[float], most: int) -> list[float]:
    every = max(1, math.ceil(len(ticks) / most))
    return list(ticks[::every])
