"""The order by turns: which of the sessions that wait will come back soonest.

A session of an agent that had to wait long for its turns will wait long again, and longer after a long answer. What its
blocks know of that is a gap, a slow geometric mean of how long they waited; new blocks have the gap of the block before
them, so of the deepest known one on their path. From it and from how many tokens the last turn wrote follows how long
the next pause is expected to be, by a regression that learns from every turn (recursive least squares with forgetting:
Haykin, "Adaptive Filter Theory", 5th ed., ch. 10). Until that is over, a block is expected at its end; if it is not
used then, it counts as waiting for as long again as it does already. What is expected last goes first. That gaps tell
more than ages is the idea of LIRS (Jiang & Zhang, "LIRS: an efficient low inter-reference recency set replacement
policy", SIGMETRICS 2002).

Gaps are those of the world outside, of people and of tools: they are as long whatever the cache and its traffic, so
they are predicted best in seconds. Without a clock, time is counted in used blocks. Where nobody tells that, or how
many tokens turns write, the gap itself is expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control.state import GROUPS, KNOWN, Learner, State
from pagedkv.jit import called, inlined

# Times are kept in 32 bits, in parts of a second: what waits for longer than three months counts as new.
PER_SECOND = 256
WORD = 0xFFFFFFFF
MOST_AGE = WORD >> 1

# A length is kept as its logarithm, linear within an octave, of which it has 1,024 parts. The last turn is an eighth of
# a mean.
FINENESS = 10
PER_OCTAVE = 1 << FINENESS
SLOWNESS = 3
MOST_CODE = 29.0 * PER_OCTAVE

# Where nothing on the path is known, in a first turn, the gap is beyond all others.
BEYOND = 1 << 48
FIRST_TURNS = GROUPS - 1


@inlined
def waited(now: int, since: Any) -> Any:
    """Return how long something waits now."""
    age: Any = (now - np.int64(since)) & WORD
    return age if age <= MOST_AGE else 0


@inlined
def code_of(length: int) -> Any:
    """Return the code of a length of at least 1; 0 is none."""
    # The bits of a float are its exponent and the parts of the octave.
    return (np.float64(length).view(np.int64) >> (52 - FINENESS)) - (1023 << FINENESS) + 1


@inlined
def length_of(code: Any) -> Any:
    """Return the length of a code."""
    code = np.int64(code) - 1
    return ((PER_OCTAVE + (code & (PER_OCTAVE - 1))) << (code >> FINENESS)) >> FINENESS


@inlined
def tell_output(state: State, tokens: int) -> None:
    """Say how many tokens the turn wrote whose blocks are released next; 0 if that is not known."""
    if len(state.learner.totals) > 0:
        totals = state.learner.totals[0]
        totals.output = code_of(tokens) if tokens > 0 else 0
        totals.expects = 0


@inlined
def mean_gap(gap: int, before: Any) -> Any:
    """Return the code of the mean of a gap that just ended and of those before it."""
    code = code_of(max(gap, 1))
    return code if before == 0 else ((np.int64(before) << SLOWNESS) - before + code + 4) >> SLOWNESS


@inlined
def expected_end(now: int, since: Any, expected: Any) -> Any:
    """Return until when a block is expected to wait that waits since then."""
    begin = now - waited(now, since)
    return BEYOND - begin if expected == 0 else begin + length_of(expected)


@inlined
def turn_score(now: int, since: Any, expected: Any) -> Any:
    """Return the score of a block that waits since then and is expected to wait so long."""
    age = waited(now, since)
    if expected == 0:
        return -(BEYOND + age)
    return -max(age, length_of(expected) - age)


@inlined
def group_of(expected: Any) -> Any:
    """Return the group of what is expected in a shadow cache: half octaves."""
    return FIRST_TURNS if expected == 0 else (np.int64(expected) - 1) >> (FINENESS - 1)


@inlined
def lengths_below(group: int) -> Any:
    """Return a length that none of a group reaches."""
    return length_of(((group + 1) << (FINENESS - 1)) + 1)


# The regression, in octaves: a pause is expected from a constant, the gap, how many tokens the turn wrote, and whether
# it was the first. A little more than that is expected: who comes back when it was expected should not count as late.

FIRST_FACTORS = (12.0, 0.5, 0.0, 0.0)
FIRST_DOUBT = 50.0
MOST_DOUBT = KNOWN * FIRST_DOUBT
KEPT = 0.9995  # of what was learned before, with each pause
FEWEST_PAUSES = 30
USUAL_GAP = 12.0
USUAL_OUTPUT = 8.0
MORE = 0.19264507794239588  # log2(8 / 7)


@inlined
def _known(gap: Any, output: Any) -> tuple[float, float, float, float]:
    """Return the numbers from which a pause is expected."""
    is_first = gap == 0
    slow = 0.0 if is_first else (np.float64(gap) - 1.0) / PER_OCTAVE - USUAL_GAP
    return 1.0, slow, (np.float64(output) - 1.0) / PER_OCTAVE - USUAL_OUTPUT, 1.0 if is_first else 0.0


@inlined
def expected_wait(learner: Learner, gap: Any) -> Any:
    """Return the code of how long a block of this gap is expected to wait after the turn that releases it."""
    totals = learner.totals[0]
    if totals.expects != 1 + np.int64(gap):  # most blocks of a session have one gap
        totals.expects, totals.expected = 1 + np.int64(gap), _expected_wait(learner, int(gap))
    return totals.expected


@called
def _expected_wait(learner: Learner, gap: int) -> int:
    totals = learner.totals[0]
    if totals.is_told == 0 or totals.output == 0 or totals.pauses < FEWEST_PAUSES:
        return gap
    known, octaves = _known(gap, totals.output), MORE
    for i in range(KNOWN):
        octaves += learner.factors[i] * known[i]
    return int(min(max(octaves * PER_OCTAVE, 0.0), MOST_CODE)) + 1


@inlined
def end_pause(learner: Learner, pause: int, gap: Any, output: Any) -> None:
    """Note how long a block waited that the present request uses; the last one is learned from when that ends."""
    totals = learner.totals[0]
    totals.is_over = totals.is_told != 0 and output != 0
    totals.pause, totals.pause_gap, totals.pause_output = pause, gap, output


@called
def learn_pause(learner: Learner) -> None:
    """Learn from the pause that the present request ended."""
    totals, factors, doubts = learner.totals[0], learner.factors, learner.doubts
    totals.is_over = 0
    if totals.pauses == 0:
        for i in range(KNOWN):
            factors[i] = FIRST_FACTORS[i]
            doubts[i * KNOWN + i] = FIRST_DOUBT
    totals.pauses += 1
    known = _known(totals.pause_gap, totals.pause_output)
    error = (np.float64(code_of(max(totals.pause, 1))) - 1.0) / PER_OCTAVE
    doubt = 0.0
    for i in range(KNOWN):
        doubt += doubts[i * KNOWN + i]
    # What the pauses of late do not tell apart is not forgotten, or the doubt would grow without bound.
    kept = KEPT if doubt < MOST_DOUBT else 1.0
    certain, gains = kept, learner.gains
    for i in range(KNOWN):
        error -= factors[i] * known[i]
        gains[i] = 0.0
        for j in range(KNOWN):
            gains[i] += doubts[i * KNOWN + j] * known[j]
        certain += gains[i] * known[i]
    step, more = 1.0 / certain, 1.0 / kept
    for i in range(KNOWN):
        factors[i] += gains[i] * step * error
        for j in range(KNOWN):
            doubts[i * KNOWN + j] = (doubts[i * KNOWN + j] - gains[i] * gains[j] * step) * more
