"""The capacities that a user asks for, as text: ``1000``, ``10k``, ``25%`` of the distinct blocks, ``auto``."""

from __future__ import annotations

import math
import re

from pagedkv.errors import InvalidOperation
from pagedkv.sim.replaying import MAX_BLOCKS

__all__ = ["parse_capacities", "spread_capacities"]

_NUMBER = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([kmg%]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_capacities(text: str, num_distinct: int) -> list[int]:
    """Return the capacities in the order they are named, each once.

    Parameters
    ----------
    text : str
        Separated by commas: blocks, with ``k``, ``m`` or ``g`` for thousands, millions, thousand millions; a
        percentage of the distinct blocks, rounded up; ``auto`` for eight sizes that double up to all distinct blocks.
    num_distinct : int
        Distinct blocks of the trace.

    Raises
    ------
    InvalidOperation
        If a capacity is none of these, or has no block at all.
    """
    capacities: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part.lower() == "auto":
            capacities += spread_capacities(num_distinct)
        else:
            capacities.append(_capacity(part, num_distinct))
    if not capacities:
        raise InvalidOperation(f"blocks expects capacities such as 1000,10k,25% or auto, got {text!r}")
    return list(dict.fromkeys(capacities))


def spread_capacities(num_distinct: int, count: int = 8) -> list[int]:
    """Return up to `count` capacities, each twice the one before, the last one all distinct blocks."""
    return sorted({max(1, math.ceil(num_distinct / 2**halvings)) for halvings in range(count)})


def _capacity(part: str, num_distinct: int) -> int:
    match = _NUMBER.fullmatch(part)
    if match is None:
        raise InvalidOperation(f"blocks expects capacities such as 1000,10k,25% or auto, got {part!r}")
    number, unit = float(match[1].replace("_", "")), match[2].lower()
    blocks = number / 100 * num_distinct if unit == "%" else number * _UNITS[unit]
    whole = math.ceil(round(blocks, 6)) if unit == "%" else round(blocks, 6)
    if whole != int(whole) or not 1 <= whole <= MAX_BLOCKS:
        reason = "a cache without a block finds nothing" if not whole else f"expected whole blocks, 1 … {MAX_BLOCKS}"
        raise InvalidOperation(f"blocks: {reason}, got {part!r}")
    return int(whole)
