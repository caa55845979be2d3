"""Hits against capacity, as a step function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pagedkv.errors import InvalidOperation
from pagedkv.sim.trace import Trace

__all__ = ["HitCurve", "knee", "require_content"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HitCurve:
    """How many hits a cache of so many blocks has; between two points the count is that of the lower one.

    Attributes
    ----------
    blocks : int64 [points]
        Capacities, ascending; the first is 0.
    hit_blocks, hit_tokens : int64 [points], or float64 where they are estimates
        Blocks found, and input tokens in them. The last point is what a cache without a limit finds.
    accesses, tokens : int
        Blocks touched, and input tokens, of the whole trace.
    """

    blocks: npt.NDArray[np.int64]
    hit_blocks: npt.NDArray[Any]
    hit_tokens: npt.NDArray[Any]
    accesses: int
    tokens: int

    @property
    def hit_ratio(self) -> Floats:
        """Blocks found over blocks touched, float64 [points]."""
        return np.asarray(self.hit_blocks / max(1, self.accesses), np.float64)

    @property
    def token_hit_ratio(self) -> Floats:
        """Input tokens found over input tokens, float64 [points]."""
        return np.asarray(self.hit_tokens / max(1, self.tokens), np.float64)

    @property
    def attainable(self) -> float:
        """The block hit ratio of a cache without a limit."""
        return float(self.hit_ratio[-1])

    @property
    def token_attainable(self) -> float:
        """The token hit ratio of a cache without a limit."""
        return float(self.token_hit_ratio[-1])

    @overload
    def at(self, blocks: int, *, tokens: bool = False) -> float: ...
    @overload
    def at(self, blocks: npt.NDArray[Any], *, tokens: bool = False) -> Floats: ...
    def at(self, blocks: int | npt.NDArray[Any], *, tokens: bool = False) -> float | Floats:
        """Return the hit ratio of a cache of so many blocks, any number from 0; `tokens` for the token hit ratio."""
        if np.any(np.asarray(blocks) < 0):
            raise InvalidOperation(f"blocks expects capacities from 0, got {blocks}")
        places = np.searchsorted(self.blocks, blocks, side="right") - 1
        hits, whole = (self.hit_tokens, self.tokens) if tokens else (self.hit_blocks, self.accesses)
        ratios = np.asarray(hits[places] / max(1, whole), np.float64)
        return float(ratios) if np.ndim(blocks) == 0 else ratios

    def blocks_for(self, hit_ratio: float, *, tokens: bool = False) -> int | None:
        """Return the fewest blocks that reach this hit ratio, or None where none do; `tokens` for the token ratio."""
        if not hit_ratio >= 0:
            raise InvalidOperation(f"hit_ratio expects a number from 0, got {hit_ratio!r}")
        ratios = self.token_hit_ratio if tokens else self.hit_ratio
        place = int(np.searchsorted(ratios, hit_ratio))
        return int(self.blocks[place]) if place < len(self.blocks) else None


def knee(curve: HitCurve, *, tokens: bool = False) -> int:
    """Return the capacity beyond which doubling the memory pays off less than before: the knee of the curve.

    It is the point farthest above the chord from the first capacity with hits to the last that gains any, capacity on
    a logarithmic scale (the maximum of the difference curve of Satopää et al. 2011, "Finding a 'Kneedle' in a
    haystack", section III, without its smoothing and its sensitivity, so that nothing has to be chosen). A curve that
    never rises above its chord has no knee: its last capacity is returned. 0 for a curve without hits.
    """
    hits = np.asarray(curve.hit_tokens if tokens else curve.hit_blocks, np.float64)
    rising = np.flatnonzero(np.diff(hits, prepend=0.0) > 0)
    if not len(rising):
        return 0
    capacity, gain = curve.blocks[rising], hits[rising]
    if len(rising) == 1:
        return int(capacity[0])
    reach = np.log(capacity)
    across = (reach - reach[0]) / (reach[-1] - reach[0])
    above = (gain - gain[0]) / (gain[-1] - gain[0]) - across
    return int(capacity[len(above) - 1 - np.argmax(above[::-1])])


def require_content(trace: Trace) -> None:
    """Refuse a trace of lengths only.

    Raises
    ------
    InvalidOperation
    """
    if not trace.has_content:
        raise InvalidOperation(f"trace {trace.name!r} ({trace.format}) carries lengths only: hits need content ids")
