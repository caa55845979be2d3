"""Snapshots as bytes: for the page, for ``/v1/cache/snapshot`` and for recorded files."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from pagedkv.engine.snapshot_types import KINDS, EngineSnapshot, PrefixRecord, RequestRecord
from pagedkv.engine.stats import EngineStats
from pagedkv.errors import InvalidOperation

__all__ = ["decode", "encode", "pack_columns"]

VERSION = 1
MAX_BLOCKS = 2**31
_COLUMNS = (("kinds", "u1"), ("ref_count", "<u2"), ("owner", "<i4"), ("depth", "<u2"), ("age", "<u4"))
_BYTES_PER_BLOCK = sum(np.dtype(kind).itemsize for _, kind in _COLUMNS)
_TABLE_ENTRY = np.dtype("<i4")


class _Frame(msgspec.Struct, kw_only=True):
    """What a snapshot is on the wire: the columns one behind the other, deflated."""

    version: int
    taken: float
    block_size: int
    strategy: str
    tick: int
    num_blocks: int
    columns: bytes
    requests: tuple[RequestRecord, ...]
    prefixes: tuple[PrefixRecord, ...]
    stats: EngineStats
    clock: tuple[tuple[int, float], ...] = ()


_encoder: Any = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Frame)


def pack_columns(snapshot: EngineSnapshot) -> bytes:
    """Return the arrays one behind the other, little-endian and deflated (zlib).

    They are kinds, ref_count, owner, depth and age, one entry a block, and then the tables.
    """
    parts = [getattr(snapshot, name).astype(kind, copy=False).tobytes() for name, kind in _COLUMNS]
    parts.append(snapshot.tables.astype(_TABLE_ENTRY, copy=False).tobytes())
    return zlib.compress(b"".join(parts), 1)


def encode(snapshot: EngineSnapshot) -> bytes:
    """Return a snapshot as one msgpack map."""
    return bytes(
        _encoder.encode(
            _Frame(
                version=VERSION,
                taken=snapshot.taken,
                block_size=snapshot.block_size,
                strategy=snapshot.strategy,
                tick=snapshot.tick,
                num_blocks=snapshot.total_blocks,
                columns=pack_columns(snapshot),
                requests=snapshot.requests,
                prefixes=snapshot.prefixes,
                stats=snapshot.stats,
                clock=snapshot.clock,
            )
        )
    )


def decode(data: bytes | memoryview) -> EngineSnapshot:
    """Read what `encode` wrote.

    Raises
    ------
    InvalidOperation
        If it is no snapshot, or one of a version that is not known.
    """
    try:
        frame = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidOperation(f"data expects an encoded snapshot: {error}") from None
    if frame.version != VERSION:
        raise InvalidOperation(f"data expects a snapshot of version {VERSION}, got version {frame.version}")
    arrays = _columns(frame)
    return EngineSnapshot(
        taken=frame.taken,
        block_size=frame.block_size,
        strategy=frame.strategy,
        tick=frame.tick,
        requests=frame.requests,
        prefixes=frame.prefixes,
        stats=frame.stats,
        clock=frame.clock,
        **arrays,
    )


def _columns(frame: _Frame) -> dict[str, Any]:
    entries = sum(record.blocks for record in frame.requests)
    if not 0 <= frame.num_blocks < MAX_BLOCKS or any(record.blocks < 0 for record in frame.requests):
        raise InvalidOperation(f"data expects 0 … {MAX_BLOCKS - 1} blocks, got {frame.num_blocks}")
    raw = _inflated(frame.columns, frame.num_blocks * _BYTES_PER_BLOCK + entries * _TABLE_ENTRY.itemsize)
    arrays, place = {}, 0
    for name, kind in _COLUMNS:
        arrays[name] = np.frombuffer(raw, kind, frame.num_blocks, place)
        place += arrays[name].nbytes
    arrays["tables"] = np.frombuffer(raw, _TABLE_ENTRY, entries, place)
    ranges = {"kinds": len(KINDS), "owner": len(frame.requests), "tables": frame.num_blocks}
    for name, end in ranges.items():
        if not _lies_below(arrays[name], end, -1 if name == "owner" else 0):
            raise InvalidOperation(f"data expects {name} below {end}")
    return arrays


def _inflated(packed: bytes, size: int) -> bytes:
    try:
        # Never more than the header promises: a few bytes can be deflated from gigabytes.
        raw = zlib.decompressobj().decompress(packed, size + 1)
    except zlib.error as error:
        raise InvalidOperation(f"data expects an encoded snapshot: {error}") from None
    if len(raw) != size:
        raise InvalidOperation(
            f"data expects columns of {size} bytes, got {len(raw)}{'' if len(raw) < size else ' or more'}"
        )
    return raw


def _lies_below(values: npt.NDArray[Any], end: int, least: int) -> bool:
    return not len(values) or (int(values.min()) >= least and int(values.max()) < end)
