"""When the adaptive strategy learns, and which order rules: asked at the end of every request."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pagedkv.control.learner import rank_again
from pagedkv.control.learning_records import (
    ACCESSES,
    AGES,
    CENSORED,
    CLASSES,
    CLOCK,
    LEAD,
    LESSONS,
    NEXT_DUEL,
    NEXT_LESSON,
    RELEASES,
    REQUEST_LEAD,
    REQUESTS,
    REUSED,
    ROOM,
    RULES,
    SEEN,
    STORES,
    VARIANCE,
    WAITING,
    Learner,
)
from pagedkv.control.lifetimes import choose, expect
from pagedkv.control.reclaim import rank_leaves
from pagedkv.control.reuse import age_bucket
from pagedkv.control.rules import ADAPTIVE
from pagedkv.control.state import State
from pagedkv.jit import borrowed, called, inlined

# Lessons come every half capacity of stored blocks, duels are judged every half capacity of accesses.
PARTS = 2
SHORTEST_PERIOD = 2048

# Statistics lose a twentieth with each lesson; nothing is learned before the cache is full but for a sixteenth.
MEMORY = 0.95
FULL = 16

# The learned order takes over when its shadow leads by so many standard deviations, and by so much of the accesses; it
# loses when it is behind. A lead fades, and counts for little more than what takes over, and for at most a share of a
# shadow: when the traffic changes, what was won before is soon used up.
AHEAD = 2.0
BEHIND = 0.5
CLEARLY = 0.002
FADING = 1 / 9  # per capacity of accesses
MOST_DEVIATIONS = 2.25
MOST_LEAD = 0.2


@inlined
def end_of_request(state: State) -> None:
    """Let the adaptive strategy learn and judge when it is time; then all cached leaves are ranked anew."""
    counters = state.counters[0]
    if counters.rule == ADAPTIVE:
        learner = state.learner
        learner.sums[REQUESTS] += 1.0
        learner.sums[VARIANCE] += learner.sums[REQUEST_LEAD] * learner.sums[REQUEST_LEAD]
        learner.sums[REQUEST_LEAD] = 0.0
        if (
            learner.numbers[CLOCK] >= learner.numbers[NEXT_LESSON]
            or learner.numbers[ACCESSES] >= learner.numbers[NEXT_DUEL]
        ):
            blank = counters.free_top + counters.num_blocks - counters.fresh
            if _advance(state.learner, state.notes, counters.num_blocks, blank, counters.num_blocks - counters.used):
                rank_leaves(state)


@called
def _advance(learner: Learner, notes: npt.NDArray[np.void], num_blocks: int, blank: int, room: int) -> bool:
    """Learn, judge, or both; tells whether the order of the cached blocks changed."""
    learner, notes = borrowed(learner), borrowed(notes)
    period = max(SHORTEST_PERIOD, num_blocks // PARTS)
    before, learned = learner.numbers[RULES], False
    if learner.numbers[CLOCK] >= learner.numbers[NEXT_LESSON]:
        learner.numbers[NEXT_LESSON] = learner.numbers[CLOCK] + period
        learned = blank <= num_blocks // FULL
    if learned:
        _count_waiting(learner, notes)
        expect(learner)
        choose(learner, max(1, room))
        rank_again(learner)
        _fade(learner)
        learner.numbers[LESSONS] += 1
    if learner.numbers[ACCESSES] >= learner.numbers[NEXT_DUEL]:
        learner.numbers[NEXT_DUEL] = learner.numbers[ACCESSES] + period
        if learner.numbers[LESSONS] > 0:
            _judge(learner, period / num_blocks)
    return learner.numbers[RULES] != before or (learned and learner.numbers[RULES] != 0)


@inlined
def _count_waiting(learner: Learner, notes: npt.NDArray[np.void]) -> None:
    """Count the cached blocks and the ghosts by class and age."""
    for c in range(CLASSES):
        for b in range(AGES):
            learner.tables[WAITING, c, b] = 0.0
    for i in range(len(notes)):
        if notes[i].kind != 0:
            learner.tables[WAITING, notes[i].kind - 1, age_bucket(learner.numbers[CLOCK] - notes[i].let_go)] += 1.0


@inlined
def _fade(learner: Learner) -> None:
    for c in range(CLASSES):
        learner.released[c] *= MEMORY
        for b in range(AGES):
            learner.tables[REUSED, c, b] *= MEMORY
            learner.tables[CENSORED, c, b] *= MEMORY
    learner.sums[STORES] *= MEMORY
    learner.sums[RELEASES] *= MEMORY
    learner.sums[REQUESTS] *= MEMORY


@inlined
def _judge(learner: Learner, elapsed: float) -> None:
    """Let the order rule whose shadow had more hits lately."""
    deviation = learner.sums[VARIANCE] ** 0.5
    if learner.sums[LEAD] > CLEARLY * learner.sums[SEEN] + AHEAD * deviation:
        learner.numbers[RULES] = 1
    elif learner.sums[LEAD] < -BEHIND * deviation:
        learner.numbers[RULES] = 0
    kept = 1.0 / (1.0 + FADING * elapsed)
    most = CLEARLY * learner.sums[SEEN] + MOST_DEVIATIONS * deviation
    most = min(most, MOST_LEAD * learner.numbers[ROOM])
    learner.sums[SEEN] *= kept
    learner.sums[VARIANCE] *= kept * kept
    learner.sums[LEAD] = min(most, max(-most, learner.sums[LEAD] * kept))
