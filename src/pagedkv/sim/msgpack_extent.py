"""Where a msgpack value ends, found without decoding it: what a stream of values needs to be cut, and to be trusted.

A header may promise billions of elements; here every element must be there before anything is decoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.jit import compiled

__all__ = ["INCOMPLETE", "INVALID", "extent"]

INCOMPLETE, INVALID = -1, -2
NEVER_USED = 0xC1

Array = npt.NDArray[Any]

# Of every first byte: how wide the length field behind it is, and what one unit of that length stands for. Where there
# is no field, the length is part of the first byte.
_WIDTH = np.zeros(256, np.int64)
_FIXED = np.zeros(256, np.int64)  # the length where there is no field; bytes that follow anyway where there is one
_BYTES = np.zeros(256, np.int64)  # bytes a unit
_VALUES = np.zeros(256, np.int64)  # values a unit


def _fill() -> None:
    for first in range(256):
        if 0x80 <= first < 0xA0:  # short maps and arrays
            _FIXED[first], _VALUES[first] = first & 15, 2 if first < 0x90 else 1
        elif 0xA0 <= first < 0xC0:  # short strings
            _FIXED[first], _BYTES[first] = first & 31, 1
    for first, size in zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True):  # numbers
        _FIXED[first], _BYTES[first] = size, 1
    for first, size in zip(range(0xD4, 0xD9), (2, 3, 5, 9, 17), strict=True):  # extensions of a fixed size
        _FIXED[first], _BYTES[first] = size, 1
    for begin in (0xC4, 0xC7, 0xD9):  # bin, ext, str
        for first, width in zip(range(begin, begin + 3), (1, 2, 4), strict=True):
            _WIDTH[first], _BYTES[first], _FIXED[first] = width, 1, int(begin == 0xC7)
    for begin, values in ((0xDC, 1), (0xDE, 2)):  # arrays, maps
        for first, width in zip(range(begin, begin + 2), (2, 4), strict=True):
            _WIDTH[first], _VALUES[first] = width, values


_fill()


@compiled
def _extent(data: Array, width: Array, fixed: Array, size: Array, values: Array) -> int:
    place = 0
    waiting = 1
    while waiting > 0:
        if place >= len(data):
            return INCOMPLETE
        first = data[place]
        if first == NEVER_USED:
            return INVALID
        place += 1
        length = fixed[first]
        if width[first] > 0:
            if place + width[first] > len(data):
                return INCOMPLETE
            field = np.int64(0)
            for _ in range(width[first]):
                field = field * 256 + np.int64(data[place])
                place += 1
            length += field
        place += length * size[first]
        waiting += length * values[first] - 1
        if waiting > len(data) - place:  # a value takes a byte at least
            return INCOMPLETE
    return place


def extent(data: npt.NDArray[np.uint8]) -> int:
    """Return how many bytes the first msgpack value takes, or `INCOMPLETE`, or `INVALID` for what no value begins with.

    Parameters
    ----------
    data : uint8 [num_bytes]
    """
    return int(_extent(data, _WIDTH, _FIXED, _BYTES, _VALUES))
