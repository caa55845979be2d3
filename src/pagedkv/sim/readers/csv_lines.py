"""Lengths from CSV files: columns are found by the names in the first line."""

from __future__ import annotations

import csv
from abc import abstractmethod
from typing import ClassVar

from pagedkv.sim.collect import Collector
from pagedkv.sim.readers.base import LineReader
from pagedkv.sim.source import BadRecord

__all__ = ["CsvReader", "as_count", "as_number"]


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
        raise BadRecord(f"{name} must be a number, got {text[:40]!r}") from None


def as_count(name: str, text: str) -> int:
    """Return the whole number that a field holds; ``"12.0"`` is one."""
    try:
        return int(text)
    except ValueError:
        number = as_number(name, text)
    if not number.is_integer():
        raise BadRecord(f"{name} must be a whole number, got {text[:40]!r}")
    return int(number)
