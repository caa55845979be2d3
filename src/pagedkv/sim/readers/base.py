"""Base classes of the trace readers: whole files, one request a line, CSV."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from pagedkv.sim.collect import Collector
from pagedkv.sim.source import BAD_RECORD, BadRecord, Source, reason_of

Id = int | str
Value = TypeVar("Value", int, float)


class Reader(ABC):
    """Reads one format into a collector.

    Parameters
    ----------
    collector : Collector
    block_tokens : int, optional
        Tokens per block as the caller states them; what the file says does not count then.

    Attributes
    ----------
    has_content : bool
        Whether the format, or this file, names the blocks of a request.
    """

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
        self.has_content = True

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


# Lengths from CSV files: columns are found by the names in the first line.


class CsvReader(LineReader):
    """Reads a CSV file that carries lengths only, one request a line; quoted fields do not span lines."""

    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, collector: Collector, block_tokens: int | None = None) -> None:
        super().__init__(collector, block_tokens)
        self.has_content = False
        self._places: list[int] | None = None
        self._width = 0

    def add(self, text: bytes) -> None:
        """Take one line: the names of the columns, then the requests."""
        fields = _split(text)
        if self._places is None:
            self._places = self._find(fields)
            self._width = len(fields)
        elif len(fields) != self._width:
            raise BadRecord(f"expected {self._width} fields, got {len(fields)}")
        else:
            self.add_fields([fields[place] if place >= 0 else "" for place in self._places])

    @abstractmethod
    def add_fields(self, fields: list[str]) -> None:
        """Take the required and then the optional fields of a line, those that are not there as ``""``."""

    def _find(self, names: list[str]) -> list[int]:
        names = [name.strip().lower() for name in names]
        missing = [name for name in self.required if name.lower() not in names]
        if missing:
            raise BadRecord(f"the first line must name the columns; missing: {', '.join(missing)}")
        wanted = [name.lower() for name in (*self.required, *self.optional)]
        return [names.index(name) if name in names else -1 for name in wanted]


def _split(text: bytes) -> list[str]:
    line = text.decode().rstrip("\r\n")
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise BadRecord(str(error)) from None


def as_number(name: str, text: str) -> float:
    """Return the number that a field holds."""
    try:
        return float(text)
    except ValueError:
        raise BadRecord(f"{name}: expected a number, got {text[:40]!r}") from None


def as_count(name: str, text: str) -> int:
    """Return the whole number that a field holds; ``"12.0"`` is one."""
    try:
        return int(text)
    except ValueError:
        number = as_number(name, text)
    if not number.is_integer():
        raise BadRecord(f"{name}: expected an int, got {text[:40]!r}")
    return int(number)
