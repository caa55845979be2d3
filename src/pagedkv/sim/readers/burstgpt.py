"""BurstGPT CSV (Wang et al., KDD'25): lengths only, seconds, a session where the release has it.

``Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type``; the older release has
neither session nor elapsed time. Failed requests (no response tokens) are kept: they were asked.
"""

from __future__ import annotations

from pagedkv.sim.readers.base import CsvReader, as_count, as_number


class BurstGptReader(CsvReader):
    """Lengths only, timestamps in seconds."""

    name = "burstgpt"
    required = ("Timestamp", "Request tokens", "Response tokens")
    optional = ("Session ID",)

    def add_fields(self, fields: list[str]) -> None:
        """Take one request."""
        time, inputs, outputs, session = fields
        self._collector.add(
            as_number("Timestamp", time),
            as_count("Request tokens", inputs),
            as_count("Response tokens", outputs),
            session or None,
        )
