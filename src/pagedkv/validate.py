"""Checks of arguments: whole numbers, numbers, sizes, choices, flags. Each fails with ``name: expected …, got …``."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable
from typing import TypeVar

from pagedkv.errors import bad_argument

Choice = TypeVar("Choice", bound=str)

MAX_INT = 2**62
"""The highest int where no other limit is stated: sums of a few still fit into 64 bits."""

_LONGEST = 80
_UNITS = {f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgtp", start=1)}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgtp", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]i?b)\s*", re.IGNORECASE)


def require_int(name: str, value: object, low: int = 0, high: int = MAX_INT, hint: str = "") -> int:
    """Return `value` as an int in ``low … high``; any integer type will do, a bool or a float will not.

    A `hint` says what to do with one that is out of range.
    """
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, bool):
        raise bad_argument(name, "an int", shown(value), f"write {value:d}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise bad_argument(name, "an int", shown(value), _whole_number_for(value)) from None
    if not low <= number <= high:
        limits = f"of at least {low}" if high == MAX_INT and number < low else f"in {low} … {high}"
        nearest = f"{low} is the least" if number < low else f"{high} is the most"
        raise bad_argument(name, f"an int {limits}", shown(number), hint or nearest)
    return number


def _whole_number_for(value: object) -> str:
    """Return what to write for something that is no int."""
    if value is None:
        return "give a number"
    if isinstance(value, str):
        return f"write {value.strip()}, without quotes" if value.strip().lstrip("-").isdecimal() else "give a number"
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return "give one number"
    return f"write {int(number)}" if number.is_integer() else "round it first"


def require_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:
    """Return `value` as a finite float in ``low … high``; text, a bool or NaN will not do.

    With `above`, `low` itself is too low.
    """
    if isinstance(value, (bool, str, bytes, bytearray)):
        raise bad_argument(name, "a number", shown(value), number_for(value))
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise bad_argument(name, "a number", shown(value), "give one number") from None
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (above and number == low):
        raise bad_argument(name, f"a {_limits(low, high, above)}", shown(value), _nearest(number, low, high))
    return number


def number_for(value: object) -> str:
    """Return what to write for something that is no number."""
    text = value.strip() if isinstance(value, str) else ""
    if text.endswith("%") and (number := _float_of(text[:-1])) is not None:
        return f"write {number / 100:g}"
    return f"write {text}, without quotes" if _float_of(text) is not None else "give one number"


def _float_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _nearest(number: float, low: float, high: float) -> str:
    """Return which limit a number misses."""
    if not math.isfinite(number):
        return "the computation before it went wrong" if number != number else "give a finite one"
    return f"{high:g} is the most" if number > high else f"it begins at {low:g}"


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
        units = "units are KB, MB, GB, TB and KiB, MiB, GiB, TiB"
        raise bad_argument(name, "a size such as 40GiB or 80GB", shown(value), units)
    return size


def require_choice(name: str, value: object, choices: Iterable[Choice]) -> Choice:
    """Return `value` if it is one of `choices`."""
    choices = tuple(choices)
    for choice in choices:
        if isinstance(value, str) and value == choice:
            return choice
    raise bad_argument(name, f"one of {', '.join(choices)}", shown(value), likely(value, choices))


def likely(value: object, choices: Iterable[str]) -> str:
    """Return which of `choices` may have been meant."""
    by_key = {_plain(choice): choice for choice in choices}
    close = difflib.get_close_matches(_plain(value), by_key, n=1, cutoff=0.6) if isinstance(value, str) else []
    return f"did you mean {by_key[close[0]]!r}?" if close else f"{next(iter(by_key.values()))!r} for instance"


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def require_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise bad_argument(name, "a bool", shown(value), "write True or False")
    return value


def shown(value: object) -> str:
    """Return the repr of what came, cut to a length that fits a message."""
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, or a repr that fails
        return f"{type(value).__name__} without a short text"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
