"""TickClock: when the ticks of a cache were, so that ages can be told in seconds."""

from __future__ import annotations

__all__ = ["TickClock"]

SECONDS_APART = 0.25
MOST_POINTS = 128


class TickClock:
    """Keeps a few points of time, dense of late and ever sparser long ago: what lies between is interpolated."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []

    def mark(self, tick: int, now: float) -> None:
        """Note the tick that a cache has reached.

        Parameters
        ----------
        tick : int
            Not before the one that was noted last.
        now : float
            Seconds of ``time.monotonic``.
        """
        points = self._points
        # The newest point is always kept, or a cache that rests would seem to have been used right now.
        if len(points) > 1 and now - points[-2][1] < SECONDS_APART:
            points[-1] = (tick, now)
            return
        points.append((tick, now))
        if len(points) > MOST_POINTS:
            del points[1 : MOST_POINTS // 2 : 2]

    def ago(self, now: float) -> tuple[tuple[int, float], ...]:
        """Return (tick, seconds since then) of each point, the oldest first."""
        return tuple((tick, round(max(0.0, now - then), 3)) for tick, then in self._points)
