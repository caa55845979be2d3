"""Numbers, bytes, percentages and durations as text for people."""

from __future__ import annotations

import math

_MINUS = "\u2212"
_UNITS = (
    (60, 1, "min", "s", 3600.0),
    (3600, 60, "h", "min", 86400.0),
    (86400, 3600, "d", "h", math.inf),
)


def count(value: float) -> str:
    """Return every digit, in groups of three: 12,031."""
    return f"{round(value):,}"


def counted(value: int, what: str) -> str:
    """Return a number and its noun: 1 replica, 2 replicas."""
    return f"{count(value)} {what}{'' if value == 1 else 's'}"


def money(value: float) -> str:
    """Return a price, two digits behind the point and more only for small change: 7.40, 0.0125."""
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.3g}"


def round_count(value: float) -> str:
    """Return about three digits: 12,031 stays, 183,166 is 183 k."""
    return count(value) if abs(value) < 20_000 else short(value)


def short(value: float, *, giga: str = "G") -> str:
    """Return three digits and a unit: 1.5 k, 20 k, 144 M, 2.3 G; `giga` is ``"B"`` where billions are counted."""
    units = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "k"))
    for limit, unit in units:
        if abs(value) >= limit * 0.9995:
            return f"{digits(value / limit)} {unit}"
    return digits(value)


def flops(value: float) -> str:
    """Return floating-point operations: 0 FLOP, 1.5 TFLOP."""
    shown = short(value)
    return f"{shown}FLOP" if " " in shown else f"{shown} FLOP"


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
    """Return a time in one unit with two digits: 2.1 min; for estimates."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= size * 0.995:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return duration(seconds)


def format_bytes(num_bytes: float) -> str:
    """Return bytes in binary units: 512 MiB, 2.5 GiB, 1.2 TiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power * 0.9995:
            return f"{digits(num_bytes / 1024**power)} {unit}"
    return f"{digits(num_bytes)} B"


def duration(seconds: float) -> str:
    """Return a time in one or two units: 350 ms, 12 s, 1 min 30 s, 2 h 5 min."""
    if seconds < 0.9995:
        return f"{digits(seconds * 1e3)} ms" if seconds else "0 s"
    if seconds < 59.95:
        return f"{digits(seconds)} s"
    large, small, large_unit, small_unit = next(unit for unit in _UNITS if seconds < unit[4] - unit[1] / 2)[:4]
    whole, rest = divmod(round(seconds / small), large // small)
    return f"{whole:,} {large_unit}" + (f" {rest} {small_unit}" if rest else "")


def digits(value: float) -> str:
    """Return three significant digits and every digit before the point: 0.25, 12.5, 12,031."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
