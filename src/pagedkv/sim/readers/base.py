"""Base classes of the trace readers: whole files, and one request a line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from pagedkv.sim.collect import Collector
from pagedkv.sim.source import BAD_RECORD, BadRecord, Source, reason_of

Id = int | str
Value = TypeVar("Value", int, float)


class Reader(ABC):
    """Reads one format into a collector; `block_tokens` as the caller states it counts more than what the file says."""

    name: ClassVar[str]
    default_block_tokens: ClassVar[int] = 16
    in_order: ClassVar[bool] = True
    """Whether the requests of a file are expected in the order of their arrival."""
    ticks_per_second: ClassVar[int] = 1
    """The unit of the timestamps."""

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        self._collector = collector
        self._block_tokens = block_tokens
        self._is_stated = block_tokens is not None
        self.has_content = True  # whether the format, or this file, names the blocks of a request

    @property
    def block_tokens(self) -> int:
        """Tokens per block: as stated, as the file says, or as is usual for the format."""
        return self._block_tokens or self.default_block_tokens

    def _file_says(self, block_tokens: int | None) -> None:
        """Note the block size that a record gives; all records must agree."""
        if block_tokens is None or self._is_stated:
            return
        if not 0 < block_tokens < 2**31:
            raise BadRecord(f"block size: expected 1 … 2**31 - 1, got {block_tokens}")
        if self._block_tokens not in (None, block_tokens):
            raise BadRecord(f"blocks of {block_tokens} tokens, but of {self._block_tokens} before")
        self._block_tokens = block_tokens

    @abstractmethod
    def read(self, source: Source) -> None:
        """Read a whole file; broken records go to ``source.bad``."""


class LineReader(Reader):
    """Reads a format with one request a line."""

    @abstractmethod
    def add(self, text: bytes) -> None:
        """Take one line; raises one of `BAD_RECORD` and keeps nothing of its request then."""

    def read(self, source: Source) -> None:
        """Read line by line; no more than one line is held."""
        add = self.add
        for number, text in source.lines():
            try:
                add(text)
            except BAD_RECORD as error:
                source.bad(number, reason_of(error))


def first_given(name: str, *values: Value | None) -> Value:
    """Return the first value that is not None: a field and its aliases."""
    for value in values:
        if value is not None:
            return value
    raise BadRecord(f"{name} is missing")
