"""How long a block of each class is worth keeping: times to live, learned from what was reused at what age.

Per class, the chance of a reuse at each age follows from the reuses seen (of cached blocks and of ghosts) and from how
many were at risk of one; blocks that still wait, and ghosts forgotten, are censored observations (Kaplan & Meier,
"Nonparametric estimation from incomplete observations", 1958). From it follow the hits that a time to live promises
and the space-time it takes; hits per space-time as the currency of eviction is that of LHD (Beckmann, Chen &
Cidon, "LHD: improving cache hit rate by maximizing hit density", NSDI 2018). One price for space-time, a Lagrange
multiplier, makes the expected occupancy equal to the room. It may jump there: so a share of the requests lives longer.

All sums run in a fixed order and nothing but + - * / and the square root is used: the same on every machine.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.learning_records import (
    AGES,
    CENSORED,
    CLASSES,
    HAZARD,
    HITS,
    LONG,
    RELEASES,
    REQUESTS,
    REUSED,
    SHARE,
    SHORT,
    SPACE,
    STORES,
    TRIAL,
    WAITING,
    Learner,
)
from pagedkv.jit import inlined

# A class leans on the class with one use less as if that were so many observations, the first on all together, and
# those on "no reuse". In requests: the blocks of one are let go and found together, so they are hardly independent.
PRIOR_REQUESTS = 10.0
DOUBT_REQUESTS = 2.5

# The price is halved between two bounds until they are this close.
CLOSE = 1.0005
SMALLEST_PRICE = 1e-12
MOST_STEPS = 64

_MIX = np.int64(-7046029254386353131)  # odd, with well mixed bits (the golden ratio)
SHARES = 1 << 16


@inlined
def expires_at(learner: Learner, kind: int, let_go: int) -> int:
    """Return when a block expires; the blocks of a request, let go at the same time, share the draw for a long life."""
    is_long = ((let_go * _MIX) >> 24) & (SHARES - 1) < learner.numbers[SHARE]
    return let_go + (learner.lives[LONG, kind] if is_long else learner.lives[SHORT, kind])


@inlined
def first_age(bucket: int) -> int:
    """Return the lowest age of a bucket."""
    return bucket if bucket < 8 else (4 + (bucket & 3)) << ((bucket >> 2) - 1)


@inlined
def expect(learner: Learner) -> None:
    """Compute what one release of each class brings and takes, if the block lives up to the end of each bucket."""
    request = learner.sums[RELEASES] / learner.sums[REQUESTS]
    at_risk = 0.0
    for b in range(AGES - 1, -1, -1):
        events, left = 0.0, 0.0
        for c in range(CLASSES):
            events += learner.tables[REUSED, c, b]
            left += learner.tables[CENSORED, c, b] + learner.tables[WAITING, c, b]
        at_risk += events + left
        learner.tables[HAZARD, CLASSES, b] = events / (at_risk - 0.5 * left + DOUBT_REQUESTS * request)
    weight = PRIOR_REQUESTS * request
    for c in range(CLASSES):
        lean_on = CLASSES if c < 2 else c - 2
        at_risk = 0.0
        for b in range(AGES - 1, -1, -1):
            left = learner.tables[CENSORED, c, b] + learner.tables[WAITING, c, b]
            at_risk += learner.tables[REUSED, c, b] + left
            events = learner.tables[REUSED, c, b] + weight * learner.tables[HAZARD, lean_on, b]
            learner.tables[HAZARD, c, b] = events / (at_risk - 0.5 * left + weight)
        alive, hits, space = 1.0, 0.0, 0.0
        for b in range(AGES):
            reused = alive * learner.tables[HAZARD, c, b]
            hits += reused
            space += (alive - 0.5 * reused) * (first_age(b + 1) - first_age(b))
            alive -= reused
            learner.tables[HITS, c, b + 1] = hits
            learner.tables[SPACE, c, b + 1] = space


@inlined
def _try_price(learner: Learner, price: float) -> float:
    """Choose each class's best time to live at this price of space-time; returns the expected occupancy."""
    occupied = 0.0
    for c in range(CLASSES):
        best, most = 0, 0.0
        for b in range(1, AGES + 1):
            value = learner.tables[HITS, c, b] - price * learner.tables[SPACE, c, b]
            if value > most:
                best, most = b, value
        learner.lives[TRIAL, c] = first_age(best)
        occupied += learner.released[c] / learner.sums[STORES] * learner.tables[SPACE, c, best]
    return occupied


@inlined
def choose(learner: Learner, room: int) -> None:
    """Find the price at which `room` blocks are just full; between its two sides the requests are shared out."""
    low, high, price = 0.0, 0.0, 1.0
    fewest, most = 0.0, 0.0
    for _ in range(MOST_STEPS):
        occupied = _try_price(learner, price)
        fits = occupied <= room or high == 0.0
        if fits:
            high, fewest = price, occupied
        else:
            low, most = price, occupied
        for c in range(CLASSES):
            if fits:
                learner.lives[SHORT, c] = learner.lives[TRIAL, c]
            if not fits or low == 0.0:
                learner.lives[LONG, c] = learner.lives[TRIAL, c]
        if high < SMALLEST_PRICE or high < low * CLOSE:
            break
        price = (low * high) ** 0.5 if low > 0.0 else high / 8
    share = (room - fewest) / (most - fewest) if most > fewest else 0.0
    learner.numbers[SHARE] = int(SHARES * min(1.0, max(0.0, share)))
