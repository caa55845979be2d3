"""Mooncake JSONL, the de-facto standard: one request a line, one id for each block of 512 tokens.

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [ids]}``, with the aliases
``created_time`` and ``delay_ms``, ``input_tokens``, ``output_tokens``; optional ``session_id`` and ``block_size``. Ids
are numbers or strings.
"""

from __future__ import annotations

import msgspec

from pagedkv.sim.collecting import Collector
from pagedkv.sim.source import BadRecord

__all__ = ["MooncakeReader"]

Id = int | str


class _Line(msgspec.Struct, gc=False):
    timestamp: float | None = None
    created_time: float | None = None
    delay_ms: float | None = None
    input_length: int | None = None
    input_tokens: int | None = None
    output_length: int | None = None
    output_tokens: int | None = None
    hash_ids: list[Id] | None = None
    session_id: Id | None = None
    block_size: int | None = None


class MooncakeReader:
    """Reads the lines of one file into a collector."""

    block_tokens = 512

    def __init__(self, collector: Collector, block_tokens: int | None) -> None:
        self._collector = collector
        self._decode = msgspec.json.Decoder(_Line).decode
        self._stated = block_tokens
        self._first: int | None = None
        self.has_content: bool | None = None

    def add(self, text: bytes) -> None:
        """Take one line; raises what `pagedkv.sim.source.BAD_RECORD` lists and changes nothing then."""
        line = self._decode(text)
        time = _either("timestamp", line.timestamp, line.created_time, line.delay_ms)
        inputs = _either("input_length", line.input_length, line.input_tokens)
        outputs = _either("output_length", line.output_length, line.output_tokens)
        if line.hash_ids is None:
            raise BadRecord("hash_ids is missing")
        self._collector.add(time / 1000.0, inputs, outputs, line.session_id, line.hash_ids)


def _either(name: str, *values: float | None) -> float:
    for value in values:
        if value is not None:
            return value
    raise BadRecord(f"{name} is missing")
