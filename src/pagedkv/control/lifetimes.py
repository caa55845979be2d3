"""How long a cached block is worth keeping: times to live, learned from what was reused at what age.

Per class, the chance of a reuse at each age follows from the reuses seen (of cached blocks and of ghosts) and from
how many were at risk of one; blocks that still wait, and ghosts forgotten, are censored observations (Kaplan &
Meier, "Nonparametric estimation from incomplete observations", 1958). From it follow the hits that a time to live
promises and the space-time it takes; hits per space-time as the currency of eviction is that of LHD (Beckmann, Chen
& Cidon, "LHD: improving cache hit rate by maximizing hit density", NSDI 2018). One price for space-time, a Lagrange
multiplier, makes the expected occupancy equal to the room. It may jump there: so a share of the requests lives
longer.

All sums run in a fixed order and nothing but + - * / and the square root is used: the same on every machine.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.state import AGES, CLASSES, Learner
from pagedkv.jit import inlined

# A class leans on the class with one use less as if that were so many observations, the first on all together, and
# those on "no reuse". In requests: the blocks of one are released and found together, so they are hardly independent.
PRIOR_REQUESTS = 10.0
DOUBT_REQUESTS = 2.5

# The price is halved between two bounds until they are this close.
CLOSE = 1.0005
SMALLEST_PRICE = 1e-12
MOST_STEPS = 64

_MIX = np.int64(-7046029254386353131)  # odd, with well mixed bits (the golden ratio)
SHARES = 1 << 16


@inlined
def draws_long(learner: Learner, released: int) -> bool:
    """Tell whether the blocks of a request, released together, live long: one draw for all of them."""
    return ((released * _MIX) >> 24) & (SHARES - 1) < learner.totals[0].share


@inlined
def expires_at(learner: Learner, kind: int, released: int) -> int:
    """Return when a block expires."""
    lives = learner.classes[kind]
    return released + (lives.long if draws_long(learner, released) else lives.short)


@inlined
def first_age(bucket: int) -> int:
    """Return the lowest age of a bucket."""
    return bucket if bucket < 8 else (4 + (bucket & 3)) << ((bucket >> 2) - 1)


@inlined
def age_bucket(age: int) -> int:
    """Return the bucket of an age: exact below 8, then four to an octave."""
    if age < 8:
        return max(age, 0)
    # The bits of a float are its exponent, the quarter of the octave, and what is finer.
    return min((np.float64(age).view(np.int64) >> 50) - (1024 << 2), AGES - 1)


@inlined
def class_of(uses: int, is_leaf: bool) -> int:
    """Return the class of a block that is released after so many uses."""
    rank = uses - 1 if uses <= 4 else (4 if uses <= 7 else 5)
    return 2 * rank + (1 if is_leaf else 0)


@inlined
def expect(learner: Learner) -> None:
    """Compute what one release of each class brings and takes, if the block lives up to the end of each bucket."""
    ages = learner.ages
    request = learner.totals[0].releases / learner.totals[0].requests
    at_risk = 0.0
    for b in range(AGES - 1, -1, -1):
        events, left = 0.0, 0.0
        for c in range(CLASSES):
            events += ages[c, b].reused
            left += ages[c, b].censored + ages[c, b].waiting
        at_risk += events + left
        ages[CLASSES, b].hazard = events / (at_risk - 0.5 * left + DOUBT_REQUESTS * request)
    weight = PRIOR_REQUESTS * request
    for c in range(CLASSES):
        lean_on = CLASSES if c < 2 else c - 2
        at_risk = 0.0
        for b in range(AGES - 1, -1, -1):
            age = ages[c, b]
            left = age.censored + age.waiting
            at_risk += age.reused + left
            events = age.reused + weight * ages[lean_on, b].hazard
            age.hazard = events / (at_risk - 0.5 * left + weight)
        alive, hits, space = 1.0, 0.0, 0.0
        for b in range(AGES):
            reused = alive * ages[c, b].hazard
            hits += reused
            space += (alive - 0.5 * reused) * (first_age(b + 1) - first_age(b))
            alive -= reused
            ages[c, b + 1].hits = hits
            ages[c, b + 1].space = space


@inlined
def _try_price(learner: Learner, price: float) -> float:
    """Choose each class's best time to live at this price of space-time; returns the expected occupancy."""
    occupied = 0.0
    for c in range(CLASSES):
        best, most = 0, 0.0
        for b in range(1, AGES + 1):
            value = learner.ages[c, b].hits - price * learner.ages[c, b].space
            if value > most:
                best, most = b, value
        learner.classes[c].trial = first_age(best)
        occupied += learner.classes[c].released / learner.totals[0].stores * learner.ages[c, best].space
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
                learner.classes[c].short = learner.classes[c].trial
            if not fits or low == 0.0:
                learner.classes[c].long = learner.classes[c].trial
        if high < SMALLEST_PRICE or high < low * CLOSE:
            break
        price = (low * high) ** 0.5 if low > 0.0 else high / 8
    share = (room - fewest) / (most - fewest) if most > fewest else 0.0
    learner.totals[0].share = int(SHARES * min(1.0, max(0.0, share)))
