"""Rates and their course, from one snapshot to the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedkv.engine.snapshot_types import EngineSnapshot
    from pagedkv.engine.stats import EngineStats

__all__ = ["Figures", "History"]

POINTS = 240
RATE_SECONDS = 2.0
HIT_SECONDS = 30.0


@dataclass(frozen=True)
class Figures:
    """What the tiles show.

    Attributes
    ----------
    usage, hit_rate : float
        Fractions.
    running, waiting : int
        Requests.
    tokens_per_second, reclaimed_per_second : float
        Over the last two seconds or so.
    preemptions : int
    """

    usage: float
    running: int
    waiting: int
    hit_rate: float
    tokens_per_second: float
    reclaimed_per_second: float
    preemptions: int


class History:
    """The snapshots' counters, as far back as the figures need."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, EngineStats]] = deque()
        self.figures: deque[Figures] = deque(maxlen=POINTS)

    def add(self, snapshot: EngineSnapshot) -> Figures:
        """Take a snapshot and return the figures; one from before the last begins a new history."""
        if self._seen and snapshot.taken < self._seen[-1][0]:
            self._seen.clear()
            self.figures.clear()
        self._seen.append((snapshot.taken, snapshot.stats))
        while len(self._seen) > 2 and snapshot.taken - self._seen[1][0] >= HIT_SECONDS:
            self._seen.popleft()
        figures = self._figures(snapshot)
        self.figures.append(figures)
        return figures

    def course(self, name: str) -> list[float]:
        """Return a figure over time, the newest last."""
        return [float(getattr(figures, name)) for figures in self.figures]

    def _figures(self, snapshot: EngineSnapshot) -> Figures:
        stats = snapshot.stats
        then, before = self._since(RATE_SECONDS)
        seconds = max(snapshot.taken - then, 1e-9)
        return Figures(
            usage=stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
            running=stats.num_running,
            waiting=stats.num_waiting,
            hit_rate=self._hit_rate(stats),
            tokens_per_second=max(0, stats.generation_tokens - before.generation_tokens) / seconds,
            reclaimed_per_second=max(0, stats.reclaimed - before.reclaimed) / seconds,
            preemptions=stats.num_preemptions,
        )

    def _hit_rate(self, stats: EngineStats) -> float:
        _, before = self._since(HIT_SECONDS)
        asked = stats.prefix_queries - before.prefix_queries
        if asked > 0:
            return (stats.prefix_hits - before.prefix_hits) / asked
        return stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0

    def _since(self, seconds: float) -> tuple[float, EngineStats]:
        """Return the newest counters that are at least so old, or the oldest there are."""
        now = self._seen[-1][0]
        return next((entry for entry in reversed(self._seen) if now - entry[0] >= seconds), self._seen[0])
