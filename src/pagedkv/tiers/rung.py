"""One tier of a ladder: how fast it is, whether it answers, what it has and what it has done."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, replace

from pagedkv.tiers.book_tier import BookTier, TierStats
from pagedkv.tiers.known import KnownTexts
from pagedkv.tiers.tier import Tier

logger = logging.getLogger("pagedkv")

REFUSALS_UNTIL_TRIED = 32
"""A tier that was too slow so often in a row is tried again, as its rate may be another one by now."""

LEAST_REST, LONGEST_REST = 1.0, 30.0
"""Seconds that a tier is left alone that let somebody wait in vain, doubled with each time that follows."""

_MEMORY = 0.8  # what a rate remembers of the past at each measurement


class Rate:
    """Amounts over seconds, as measured of late. Any thread may use it."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0
        self._lock = threading.Lock()

    def note(self, amount: float, seconds: float) -> None:
        """Add a measurement."""
        with self._lock:
            self._amount = _MEMORY * self._amount + amount
            self._seconds = _MEMORY * self._seconds + seconds

    @property
    def per_second(self) -> float | None:
        """The rate; None as long as nothing was measured."""
        with self._lock:
            return self._amount / self._seconds if self._seconds > 0 and self._amount > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFigures:
    """What a tier has done for one pool.

    Attributes
    ----------
    medium : str
    blocks, total_blocks : int
        That it holds, and has room for; 0 where it does not say.
    hits : int
        Texts that got something from it.
    loads, stores : int
        Blocks that came from it and were right; blocks that were handed to it and are there now.
    corrupt : int
        Blocks that were not what was stored, where it counts them.
    late, gated, failed, dropped : int
        Texts that did not wait any longer for it; that were computed, as this is faster; calls that it did not answer
        in time or but by an error; texts that were not stored because too much was on its way.
    read_bytes, written_bytes : int
    read_seconds, write_seconds : float
        From each call to its end.
    """

    medium: str
    blocks: int = 0
    total_blocks: int = 0
    hits: int = 0
    loads: int = 0
    stores: int = 0
    corrupt: int = 0
    late: int = 0
    gated: int = 0
    failed: int = 0
    dropped: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0


class Rung:
    """One tier of a ladder, its rate and its counters. Any thread may use it.

    Parameters
    ----------
    tier : Tier

    Attributes
    ----------
    num_storing : int
        Stores under way.
    is_far : bool
        Whether it does not say at once what it has.
    known : KnownTexts
        What it is known to have if it does not.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier, self.rate = tier, Rate()
        self.num_storing, self.is_far, self.known = 0, False, KnownTexts()
        self._figures = TierFigures(medium=tier.medium)
        self._refusals = 0
        self._stalls, self._back_at = 0, 0.0
        self._needs_trial = self._is_tried = False
        self._last_match = self._last_load = -math.inf
        self._lock = threading.Lock()

    def count(self, **changes: float) -> None:
        """Add to counters."""
        with self._lock:
            sums = {name: getattr(self._figures, name) + change for name, change in changes.items()}
            self._figures = replace(self._figures, **sums)

    @property
    def figures(self) -> TierFigures:
        """What it has done."""
        tier, figures = self.tier, self._figures
        stats = getattr(tier, "stats", None)
        if isinstance(stats, TierStats):
            figures = replace(figures, corrupt=stats.corrupt, failed=figures.failed + stats.unanswered)
        if not isinstance(tier, BookTier):
            return figures
        books = tier.books
        used = books.total_blocks - books.free_block_count + books.cached_block_count
        return replace(figures, blocks=used, total_blocks=books.total_blocks)

    def is_worth(self, num_bytes: int, compute_seconds: float | None) -> bool:
        """Tell whether to load so much is sooner than to compute it; what was not measured yet is tried."""
        rate = self.rate.per_second
        if rate is None or compute_seconds is None or num_bytes / rate < compute_seconds:
            self._refusals = 0
            return True
        self._refusals += 1
        if self._refusals >= REFUSALS_UNTIL_TRIED:
            self._refusals = 0
            return True
        self.count(gated=1)
        return False

    # Whether it answers.

    @property
    def is_resting(self) -> bool:
        """Whether it is left alone, as it let somebody wait in vain."""
        return time.monotonic() < self._back_at

    @property
    def is_available(self) -> bool:
        """Whether there is any use in calling it, as far as it says."""
        return bool(getattr(self.tier, "is_available", True))

    def may_be_asked(self) -> bool:
        """Tell whether it is to be asked what it has; after a rest one asks, and the others need not wait for that."""
        with self._lock:
            now = time.monotonic()
            if now < self._back_at or not self.is_available:
                return False
            if self._needs_trial:
                self._is_tried, self._back_at = True, now + self._rest()
            return True

    def has_matched(self, seconds: float) -> None:
        """Note that it has said what it has, so many seconds after it was asked."""
        with self._lock:
            if seconds < LEAST_REST:
                self._last_match = time.monotonic()
                if self._is_tried:
                    self._needs_trial, self._is_tried, self._back_at = False, False, 0.0

    def has_loaded(self) -> None:
        """Note that something has come from it."""
        with self._lock:
            self._last_load = time.monotonic()
            was_stalled, self._stalls = self._stalls > 0, 0
        if was_stalled:
            logger.info("the tier %s answers again", self.tier.medium)

    def no_match(self, since: float) -> None:
        """Note that somebody goes on who has waited for what it has; it is left alone if it told nobody since then."""
        self.count(late=1)
        self._stall(since, self._last_match)

    def no_load(self, since: float) -> None:
        """Note that somebody goes on without a load; the tier is left alone if nothing came from it since then."""
        self.count(late=1)
        self._stall(since, self._last_load)

    def _stall(self, since: float, last: float) -> None:
        if last >= since:
            return
        with self._lock:
            self._stalls += 1
            self._needs_trial, self._is_tried, self._back_at = True, False, time.monotonic() + self._rest()
            is_first = self._stalls == 1
        if is_first:
            logger.warning("the tier %s does not answer in time, what it has is computed instead", self.tier.medium)

    def _rest(self) -> float:
        return min(LONGEST_REST, LEAST_REST * 2.0 ** min(self._stalls - 1, 20))
