"""CSV traces of lengths: Azure LLM inference and BurstGPT. Columns are found by the names in the first line."""

from __future__ import annotations

import csv
from abc import abstractmethod
from datetime import UTC, datetime
from typing import ClassVar

from pagedkv.sim.collect import Collector
from pagedkv.sim.readers.base import LineReader
from pagedkv.sim.source import BadRecord

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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


class AzureReader(CsvReader):
    """Azure LLM inference (Patel et al., ISCA'24; Stojkovic et al., HPCA'25): ISO timestamps, UTC without a zone.

    ``TIMESTAMP,ContextTokens,GeneratedTokens``. Digits beyond the microsecond are dropped.
    """

    name = "azure"
    required = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def add_fields(self, fields: list[str]) -> None:
        """Take one request."""
        time, inputs, outputs = fields
        self._collector.add(_seconds(time), _count("ContextTokens", inputs), _count("GeneratedTokens", outputs))


class BurstGptReader(CsvReader):
    """BurstGPT (Wang et al., KDD'25): timestamps in seconds, a session where the release has it.

    ``Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type``; the older release
    has neither session nor elapsed time. Failed requests (no response tokens) are kept: they were asked.
    """

    name = "burstgpt"
    required = ("Timestamp", "Request tokens", "Response tokens")
    optional = ("Session ID",)

    def add_fields(self, fields: list[str]) -> None:
        """Take one request."""
        time, inputs, outputs, session = fields
        self._collector.add(
            _number("Timestamp", time),
            _count("Request tokens", inputs),
            _count("Response tokens", outputs),
            session or None,
        )


def _split(text: bytes) -> list[str]:
    line = text.decode().rstrip("\r\n")
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise BadRecord(str(error)) from None


def _seconds(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadRecord(f"TIMESTAMP: expected an ISO 8601 date and time, got {text[:40]!r}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - EPOCH).total_seconds()


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadRecord(f"{name}: expected a number, got {text[:40]!r}") from None


def _count(name: str, text: str) -> int:
    """Return the whole number that a field holds; ``"12.0"`` is one."""
    try:
        return int(text)
    except ValueError:
        number = _number(name, text)
    if not number.is_integer():
        raise BadRecord(f"{name}: expected an int, got {text[:40]!r}")
    return int(number)
