"""Numbers, bytes, percentages and durations as text for people."""

from __future__ import annotations

import math

_NBSP = "\u00a0"
_MINUS = "\u2212"
_UNITS = (
    (60, 1, "min", "s", 3600.0),
    (3600, 60, "h", "min", 86400.0),
    (86400, 3600, "d", "h", math.inf),
)


def count(value: float) -> str:
    """Return every digit, in groups of three: 12,031."""
    return f"{round(value):,}"


def round_count(value: float) -> str:
    """Return about three digits: 12,031 stays, 183,166 is 183 k."""
    return count(value) if abs(value) < 20_000 else short(value)


def short(value: float) -> str:
    """Return three digits and a unit: 1.5 k, 20 k, 144 M, 2.3 G."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_digits(value / limit)}{_NBSP}{unit}"
    return _digits(value)


def percent(ratio: float) -> str:
    """Return a ratio with one decimal: 31.4%; close to but not quite all or nothing is never rounded to it."""
    shown = f"{100 * ratio:.1f}"
    if shown == "100.0" and ratio < 1:
        return ">99.9%"
    if shown == "0.0" and ratio > 0:
        return "<0.1%"
    return f"{'100' if shown == '100.0' else '0' if shown == '0.0' else shown}%"


def share(ratio: float) -> str:
    """Return a share that somebody chose as they wrote it: 90%, 99.5%."""
    return f"{100 * ratio:.6g}%"


def points(difference: float) -> str:
    """Return a difference of two ratios in percentage points, signed: +1.3."""
    shown = f"{100 * abs(difference):.1f}"
    if shown == "0.0":
        return "±0.0" if difference == 0 else "+0.0" if difference > 0 else f"{_MINUS}0.0"
    return ("+" if difference > 0 else _MINUS) + shown


def rough_duration(seconds: float) -> str:
    """Return a time in one unit with two digits: 2.1 min; for what is not known better."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= size * 0.995:
            value = seconds / size
            return f"{value:.1f}{_NBSP}{unit}" if value < 9.95 else f"{value:.0f}{_NBSP}{unit}"
    return duration(seconds)


def gib(num_bytes: float) -> str:
    """Return bytes in binary units: 512 MiB, 2.5 GiB, 1.2 TiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power * 0.9995:
            return f"{_digits(num_bytes / 1024**power)}{_NBSP}{unit}"
    return f"{_digits(num_bytes)}{_NBSP}B"


def format_bytes(count: float) -> str:
    """Return bytes in binary units, ``"12.5 GiB"`` say."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    if unit == "B":
        return f"{count:.0f} B"
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}" if count >= 10 else f"{count:.2f} {unit}"


def duration(seconds: float) -> str:
    """Return a time in one or two units: 350 ms, 12 s, 1 min 30 s, 2 h 5 min."""
    if seconds < 0.9995:
        return f"{_digits(seconds * 1e3)}{_NBSP}ms" if seconds else f"0{_NBSP}s"
    if seconds < 59.95:
        return f"{_digits(seconds)}{_NBSP}s"
    large, small, large_unit, small_unit = next(unit for unit in _UNITS if seconds < unit[4] - unit[1] / 2)[:4]
    whole, rest = divmod(round(seconds / small), large // small)
    return f"{whole:,}{_NBSP}{large_unit}" + (f" {rest}{_NBSP}{small_unit}" if rest else "")


def _digits(value: float) -> str:
    """Return three significant digits without zeros at the end."""
    size = abs(value)
    shown = f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown
