"""The order by turns: which of the sessions that wait will come back soonest.

A session of an agent that had to wait long for its turns will wait long again. What its blocks know of that is a gap, a
slow geometric mean of how long they waited; new blocks have the gap of the block before them, so of the deepest known
one on their path. Until a gap is over, a block is expected at its end; if it is not used then, it counts as waiting for
as long again as it does already. What is expected last goes first. That gaps tell more than ages is the idea of LIRS
(Jiang & Zhang, "LIRS: an efficient low inter-reference recency set replacement policy", SIGMETRICS 2002).

Gaps are those of the world outside, of people and of tools: they are as long whatever the cache and its traffic, so
they are predicted best in seconds. Without a clock, time is counted in used blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control.state import GROUPS
from pagedkv.jit import inlined

# Times are kept in 32 bits, in parts of a second: what waits for longer than three months counts as new.
PER_SECOND = 256
WORD = 0xFFFFFFFF
MOST_AGE = WORD >> 1

# A gap is kept as its logarithm, linear within an octave, of which it has 1,024 parts. The last turn is an eighth of a
# mean.
FINENESS = 10
PER_OCTAVE = 1 << FINENESS
SLOWNESS = 3

# Where nothing on the path is known, in a first turn, the gap is beyond all others.
BEYOND = 1 << 48
FIRST_TURNS = GROUPS - 1


@inlined
def waited(now: int, since: Any) -> Any:
    """Return how long something waits now."""
    age: Any = (now - np.int64(since)) & WORD
    return age if age <= MOST_AGE else 0


@inlined
def mean_gap(gap: int, before: Any) -> Any:
    """Return the code of the mean of a gap that just ended and of those before it; 0 is none."""
    # The bits of a float are its exponent and the parts of the octave.
    code: Any = (np.float64(max(gap, 1)).view(np.int64) >> (52 - FINENESS)) - (1023 << FINENESS) + 1
    return code if before == 0 else ((np.int64(before) << SLOWNESS) - before + code + 4) >> SLOWNESS


@inlined
def turn_score(now: int, since: Any, gap: Any) -> Any:
    """Return the score of a block that waits since then, and before its turns waited so long."""
    age = waited(now, since)
    if gap == 0:
        return -(BEYOND + age)
    return -max(age, length_of(np.int64(gap)) - age)


@inlined
def length_of(gap: Any) -> Any:
    """Return how long the gap of this code is."""
    code = gap - 1
    return ((PER_OCTAVE + (code & (PER_OCTAVE - 1))) << (code >> FINENESS)) >> FINENESS


@inlined
def gap_group(gap: Any) -> Any:
    """Return the group of a gap in a shadow cache: half octaves."""
    return FIRST_TURNS if gap == 0 else (np.int64(gap) - 1) >> (FINENESS - 1)


@inlined
def gaps_below(group: int) -> Any:
    """Return a length that no gap of a group reaches."""
    return length_of(((group + 1) << (FINENESS - 1)) + 1)
