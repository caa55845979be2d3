"""Azure LLM inference CSV (Patel et al., ISCA'24; Stojkovic et al., HPCA'25): lengths only, ISO timestamps.

``TIMESTAMP,ContextTokens,GeneratedTokens``. A timestamp without a zone is UTC; digits beyond the microsecond are
dropped.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pagedkv.sim.readers.base import CsvReader, as_count
from pagedkv.sim.source import BadRecord

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class AzureReader(CsvReader):
    """Lengths only, timestamps in ISO 8601."""

    name = "azure"
    required = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def add_fields(self, fields: list[str]) -> None:
        """Take one request."""
        time, inputs, outputs = fields
        self._collector.add(_seconds(time), as_count("ContextTokens", inputs), as_count("GeneratedTokens", outputs))


def _seconds(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadRecord(f"TIMESTAMP: expected an ISO 8601 date and time, got {text[:40]!r}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - EPOCH).total_seconds()
