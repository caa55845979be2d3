"""One batch of KV cache events as bytes, and in a file.

A file is a stream of msgpack ``bin`` values, each holding one batch: the header of the ``bin`` is the frame, and any
msgpack library reads the file.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import msgspec

__all__ = ["BIN_32", "MAX_BATCH_BYTES", "append_event_batch", "batch_bytes"]

MAX_BATCH_BYTES = 32 * 2**20
BIN_32 = 0xC6
_encoder = msgspec.msgpack.Encoder()


def batch_bytes(batch: Any) -> bytes:
    """Return a batch as it is published: bytes as they are, anything else as msgpack."""
    return bytes(batch) if isinstance(batch, bytes | bytearray | memoryview) else _encoder.encode(batch)


def append_event_batch(file: BinaryIO, batch: Any) -> None:
    """Append one batch of events, in one write.

    Parameters
    ----------
    file : binary file, open for writing
    batch : bytes or object
        The payload as it was published, or what msgspec encodes: ``[ts, events, data_parallel_rank]``.

    Raises
    ------
    ValueError
        The batch is larger than `MAX_BATCH_BYTES`, which readers refuse; nothing was written.
    """
    payload = batch_bytes(batch)
    if len(payload) > MAX_BATCH_BYTES:
        raise ValueError(f"a batch takes at most {MAX_BATCH_BYTES} bytes, got {len(payload)}")
    file.write(struct.pack(">BI", BIN_32, len(payload)) + payload)
