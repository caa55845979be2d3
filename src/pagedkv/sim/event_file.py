"""KV cache events in a file: batches as engines publish them, one behind the other.

Written is a stream of msgpack ``bin`` values, each holding one batch: the header of the ``bin`` is the frame, and any
msgpack library reads the file. Read are these, batches that follow each other bare, and batches behind a length of four
bytes, big-endian, as far as they stay below 16 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from pagedkv.control.events import BIN_32, MAX_BATCH_BYTES, append_event_batch
from pagedkv.sim.msgpack_extent import INCOMPLETE, INVALID, extent
from pagedkv.sim.source import BadRecord

__all__ = ["MAX_BATCH_BYTES", "append_event_batch", "read_event_batches"]

BIN_8, BIN_16 = 0xC4, 0xC5
_BIN_FIELDS = {BIN_8: 1, BIN_16: 2, BIN_32: 4}
_LENGTH_FIELD = 4


def read_event_batches(pieces: Iterable[bytes]) -> Iterator[memoryview | BadRecord]:
    """Cut a stream into batches; every one is a complete msgpack value, and what is not is returned as an error.

    Parameters
    ----------
    pieces : iterable of bytes
        The file, cut anywhere.

    Yields
    ------
    memoryview or BadRecord
        Valid until the next one is asked for. After an error inside a frame the next frame follows; after an error in a
        bare stream nothing can follow.
    """
    pieces = iter(pieces)
    buffer, place, is_all = b"", 0, False
    while True:
        size, header = _next_size(memoryview(buffer)[place:])
        if size == INCOMPLETE:
            if is_all or len(buffer) - place > MAX_BATCH_BYTES:
                break
            # Twice as much each time, so that a long batch is not looked at again for every piece.
            more = _take(pieces, max(1, len(buffer) - place))
            buffer, place, is_all = buffer[place:] + more, 0, not more
            continue
        if size == INVALID:
            yield BadRecord("neither a batch nor a frame begins here")
            return
        payload = memoryview(buffer)[place + header : place + size]
        place += size
        yield _checked(payload, is_framed=header > 0)
    if len(buffer) - place > MAX_BATCH_BYTES:
        yield _too_long()
    elif place < len(buffer):
        yield BadRecord("the file ends within a batch")


def _checked(payload: memoryview, is_framed: bool) -> memoryview | BadRecord:
    if len(payload) > MAX_BATCH_BYTES:
        return _too_long()
    if is_framed and extent(np.frombuffer(payload, np.uint8)) != len(payload):
        return BadRecord("the frame does not hold one msgpack value")
    return payload


def _too_long() -> BadRecord:
    return BadRecord(f"longer than {MAX_BATCH_BYTES} bytes")


def _next_size(data: memoryview) -> tuple[int, int]:
    """Return (bytes of the next batch with its frame, bytes of the frame)."""
    if not data:
        return INCOMPLETE, 0
    if data[0] == 0:
        width, first = _LENGTH_FIELD, 0
    elif data[0] in _BIN_FIELDS:
        width, first = _BIN_FIELDS[data[0]], 1
    elif 0x80 <= data[0] <= 0x9F or 0xDC <= data[0] <= 0xDF:  # an array or a map
        return extent(np.frombuffer(data, np.uint8)), 0
    else:
        return INVALID, 0
    header = first + width
    if len(data) < header:
        return INCOMPLETE, 0
    size = header + int.from_bytes(data[first:header], "big")
    return (size if size <= len(data) else INCOMPLETE), header


def _take(pieces: Iterator[bytes], size: int) -> bytes:
    taken = bytearray()
    while len(taken) < size and (piece := next(pieces, None)) is not None:
        taken += piece
    return bytes(taken)
