"""What the adaptive strategy notes when a block is found, stored, let go and given up.

From these notes it learns how long blocks of each class wait for their next use (`lifetimes`).
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import HEADER
from pagedkv.control.learner import contend
from pagedkv.control.learning_records import (
    ACCESSES,
    AGES,
    CENSORED,
    CLOCK,
    GHOST_SET,
    RELEASES,
    REUSED,
    RULES,
    SAMPLE_MASK,
    STORES,
)
from pagedkv.control.lifetimes import expires_at
from pagedkv.control.state import State
from pagedkv.jit import inlined

MOST_USES = 60_000
_WORD = np.int64(0xFFFFFFFF)


@inlined
def age_bucket(age: int) -> int:
    """Return the bucket of an age: exact below 8, then four to an octave."""
    if age < 8:
        return max(age, 0)
    octave = 1
    while age >= 8:
        age >>= 1
        octave += 1
    return min(4 * octave + age - 4, AGES - 1)


@inlined
def class_of(uses: int, is_leaf: bool) -> int:
    """Return the class of a block that is let go after so many uses."""
    rank = uses - 1 if uses <= 4 else (4 if uses <= 7 else 5)
    return 2 * rank + (1 if is_leaf else 0)


@inlined
def note_hit(state: State, block: int) -> None:
    """A cached block is used again."""
    note, learner = state.notes[block], state.learner
    learner.tables[REUSED, note.kind - 1, age_bucket(learner.numbers[CLOCK] - note.let_go)] += 1.0
    note.kind = 0
    note.uses = min(note.uses + 1, MOST_USES)


@inlined
def note_store(state: State, block: int, path: int) -> None:
    """A block becomes findable; one that comes back is known by its ghost."""
    note, learner = state.notes[block], state.learner
    note.mark = (path >> 1) & _WORD
    note.is_sampled = ((path >> 8) & learner.numbers[SAMPLE_MASK]) == 0
    note.kind = 0
    note.uses = 1
    first = _ghost_set(state, path)
    for i in range(first, first + GHOST_SET):
        ghost = state.notes[i]
        if ghost.kind != 0 and ghost.mark == note.mark:
            note.uses = min(ghost.uses + 1, MOST_USES)
            learner.tables[REUSED, ghost.kind - 1, age_bucket(learner.numbers[CLOCK] - ghost.let_go)] += 1.0
            ghost.kind = 0
            break
    learner.numbers[CLOCK] += 1
    learner.sums[STORES] += 1.0


@inlined
def note_release(state: State, block: int) -> None:
    """Nobody uses the block any more: it waits as a cached one. The blocks of a request are let go tail first."""
    note, learner, record = state.notes[block], state.learner, state.blocks[block]
    kind = class_of(note.uses, record.num_children == 0)
    note.kind = 1 + kind
    note.let_go = learner.numbers[CLOCK]
    learner.released[kind] += 1.0
    learner.numbers[ACCESSES] += 1
    learner.sums[RELEASES] += 1.0
    if note.is_sampled != 0:
        contend(state.learner, state.policy[HEADER + block], kind, record.depth)


@inlined
def note_give_up(state: State, block: int) -> None:
    """A cached block goes; its note becomes a ghost in place of the oldest of its set."""
    first = _ghost_set(state, state.policy[HEADER + block])
    chosen = first
    for i in range(first, first + GHOST_SET):
        if state.notes[i].kind == 0:
            chosen = i
            break
        if state.notes[i].let_go < state.notes[chosen].let_go:
            chosen = i
    note, ghost, learner = state.notes[block], state.notes[chosen], state.learner
    if ghost.kind != 0:
        learner.tables[CENSORED, ghost.kind - 1, age_bucket(learner.numbers[CLOCK] - ghost.let_go)] += 1.0
    ghost.let_go = note.let_go
    ghost.mark = note.mark
    ghost.uses = note.uses
    ghost.kind = note.kind
    note.kind = 0


@inlined
def expiry_of(state: State, block: int) -> int:
    """Return the score of a cached block: when it expires, or since when it waits where plain recency rules."""
    note, learner = state.notes[block], state.learner
    if learner.numbers[RULES] == 0:
        return note.let_go
    return expires_at(state.learner, note.kind - 1, note.let_go)


@inlined
def _ghost_set(state: State, path: int) -> int:
    num_blocks = state.counters[0].num_blocks
    sets = (len(state.notes) - num_blocks) // GHOST_SET
    return num_blocks + GHOST_SET * ((((path >> 32) & _WORD) * sets) >> 32)
