"""Checks of arguments: whole numbers, numbers, sizes, choices, flags. Each fails with ``name: expected …, got …``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable

from pagedkv.errors import bad_argument

MAX_INT = 2**62
"""The highest int where no other limit is stated: sums of a few still fit into 64 bits."""

_LONGEST = 80
_UNITS = {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgtp", start=1)}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgtp", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]i?b)\s*", re.IGNORECASE)


def require_int(name: str, value: object, low: int = 0, high: int = MAX_INT) -> int:
    """Return `value` as an int in ``low … high``; any integer type will do, a bool or a float will not."""
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, bool):
        raise bad_argument(name, "an int", shown(value))
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise bad_argument(name, "an int", shown(value)) from None
    if not low <= number <= high:
        limits = f"of at least {low}" if high == MAX_INT and number < low else f"in {low} … {high}"
        raise bad_argument(name, f"an int {limits}", shown(number))
    return number


def require_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:
    """Return `value` as a finite float in ``low … high``; text, a bool or NaN will not do.

    With `above`, `low` itself is too low.
    """
    if isinstance(value, (bool, str, bytes, bytearray)):
        raise bad_argument(name, "a number", shown(value))
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise bad_argument(name, "a number", shown(value)) from None
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (above and number == low):
        raise bad_argument(name, f"a {_limits(low, high, above)}", shown(value))
    return number


def _limits(low: float, high: float, above: bool) -> str:
    if above:
        return f"number above {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
    if low == -math.inf:
        return "finite number" if high == math.inf else f"number of at most {high:g}"
    return f"number of at least {low:g}" if high == math.inf else f"number in {low:g} … {high:g}"


def require_size(name: str, value: object) -> int:
    """Return the bytes that an int says, or text: ``"40GiB"`` (2³⁰) and ``"80GB"`` (10⁹); at least 1."""
    if not isinstance(value, str):
        return require_int(name, value, 1)
    match = _SIZE.fullmatch(value)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match and len(match[1]) < 20 else 0
    if not 0 < size < MAX_INT:
        raise bad_argument(name, "a size such as 40GiB or 80GB", shown(value))
    return size


def require_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise bad_argument(name, f"one of {', '.join(choices)}", shown(value))
    return value


def require_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise bad_argument(name, "a bool", shown(value))
    return value


def shown(value: object) -> str:
    """Return the repr of what came, cut to a length that fits a message."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, or a repr that fails
        return f"{type(value).__name__} without a short text"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
