"""Mooncake JSONL, the de-facto standard (Qin et al., FAST'25): one request a line, one id for each block.

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [ids]}``. Aliases: ``created_time``,
``input_tokens``, ``output_tokens``. Optional: ``session_id``, ``block_size`` (512 by default), and
``delay`` or ``delay_ms`` in place of the timestamp: milliseconds after the request before it of the same session; how
long that one ran is not in the trace, so such a request arrives as early as it can.

Ids are numbers or strings. They are taken as they stand: a request may list fewer than its input fills (some recorders
name full blocks only: the tokens behind them are never found again) or more (blocks of the answer: they are cached with
the rest). A file without any ``hash_ids`` gives lengths only.
"""

from __future__ import annotations

import msgspec

from pagedkv.sim.collect import Collector
from pagedkv.sim.readers.base import Id, LineReader, first_given
from pagedkv.sim.source import BadRecord


class _Line(msgspec.Struct, gc=False):
    timestamp: float | None = None
    created_time: float | None = None
    delay: float | None = None
    delay_ms: float | None = None
    input_length: int | None = None
    input_tokens: int | None = None
    output_length: int | None = None
    output_tokens: int | None = None
    hash_ids: list[Id] | None = None
    session_id: Id | None = None
    block_size: int | None = None


_decode = msgspec.json.Decoder(_Line).decode


class MooncakeReader(LineReader):
    """One request a line, timestamps in milliseconds, 512 tokens a block."""

    name = "mooncake"
    default_block_tokens = 512
    ticks_per_second = 1000

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        super().__init__(collector, block_tokens)
        self._last_time: dict[Id | None, float] = {}
        self._has_delays = False
        self._is_first = True

    def add(self, text: bytes) -> None:
        """Take one line."""
        line = _decode(text)
        inputs = first_given("input_length", line.input_length, line.input_tokens)
        outputs = first_given("output_length", line.output_length, line.output_tokens)
        ids = line.hash_ids
        if not self._is_first and (ids is not None) != self.has_content:
            raise BadRecord("hash_ids is missing" if ids is None else "hash_ids here, but not in the lines before")
        time = self._time(line)
        self._file_says(line.block_size)
        self._collector.add(time, inputs, outputs, line.session_id, ids or ())
        self._last_time[line.session_id] = time
        if self._is_first:
            self._is_first, self.has_content = False, ids is not None

    def _time(self, line: _Line) -> float:
        time = line.timestamp if line.timestamp is not None else line.created_time
        if time is not None:
            return time
        delay = first_given("timestamp", line.delay, line.delay_ms)
        self._collector.in_order = False  # every session counts for itself
        return self._last_time.get(line.session_id, 0.0) + delay
