"""How fast requests are served, where a replay keeps time."""

from __future__ import annotations

from dataclasses import dataclass

from pagedkv.errors import InvalidOperation

__all__ = ["Timing"]


@dataclass(frozen=True)
class Timing:
    """How fast requests are served, for a replay in which each holds its blocks while it runs.

    Parameters
    ----------
    prefill_tokens_per_second, decode_tokens_per_second : float
        Of one request.
    """

    prefill_tokens_per_second: float = 10_000.0
    decode_tokens_per_second: float = 50.0

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise InvalidOperation(f"{name} expects a positive number, got {rate!r}")
