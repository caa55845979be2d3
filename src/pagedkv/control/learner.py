"""The adaptive strategy: notes on blocks and ghosts, lessons from them, and an order that a duel has chosen.

Notes say after how long blocks of each class are used again; a lesson makes times to live of that (`lifetimes`); and
duels of small shadow caches (`shadows`) decide what rules the real cache: recency, the learned times, or the gaps
between the turns of a session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pagedkv.control.ghosts import note_prefix_hash, with_prefix_hashes
from pagedkv.control.lifetimes import age_bucket, choose, class_of, expect, expires_at
from pagedkv.control.shadows import contend, draw_again, end_round, judge
from pagedkv.control.state import (
    AGES,
    CLASSES,
    EXPECTED,
    EXPIRY,
    GHOST_SET,
    GHOSTS_PER_BLOCK,
    MAIN,
    NOTE,
    SHADOW_ROOM,
    TURNS,
    Learner,
    State,
    new_learner,
    power_of_two,
)
from pagedkv.control.turns import PER_SECOND, WORD, end_pause, expected_wait, learn_pause, mean_gap, waited
from pagedkv.errors import bad_argument
from pagedkv.jit import called, inlined, pointed
from pagedkv.validate import shown

# What the adaptive strategy begins with, and what it forgets with the content of the cache.
#
# ``State.notes`` holds a note per block of the pool and behind those the ghosts, blocks that were evicted lately, in
# sets of four. ``State.learner`` is all that was learned. Both are empty while another strategy is in force.


def with_learner(state: State) -> State:
    """Return the state with a prefix hash and a note for each block, ghosts, and a learner that knows nothing yet."""
    num_blocks = len(state.blocks)
    sets = max(1, GHOSTS_PER_BLOCK * num_blocks // GHOST_SET)
    sampled = power_of_two(max(1, 2 * num_blocks // SHADOW_ROOM) + 1) // 2  # one block of so many
    learner = new_learner(num_blocks, exists=True, ghost_sets=sets)
    totals = learner.totals[0]
    totals.sample_mask = sampled - 1
    totals.room = max(1, num_blocks // sampled)
    totals.next_lesson = totals.next_duel = num_blocks
    notes, expected = np.zeros(num_blocks + GHOST_SET * sets, NOTE), np.zeros(num_blocks, EXPECTED)
    return with_prefix_hashes(state)._replace(notes=notes, expected=expected, learner=learner)


def forget_notes(state: State) -> None:
    """Forget all blocks and ghosts, but not what was learned from them."""
    state.notes[:] = 0
    state.expected[:] = 0
    state.learner.waits[:] = 0
    state.learner.gaps[:] = 0


@inlined
def tell_time(state: State, seconds: float) -> None:
    """Say what time it is; from now on turns are timed in seconds."""
    if goes_by_time(state):
        totals = state.learner.totals[0]
        totals.time = int(seconds * PER_SECOND)
        totals.is_told = 1
        state.learner.picks[TURNS].end = 0  # ages have grown, and scores with them


@inlined
def goes_by_time(state: State) -> bool:
    """Tell whether the strategy in force asks what time it is."""
    return len(state.learner.totals) > 0


def asked_clock(state: State, clock: Callable[[], float] | None) -> Callable[[], float] | None:
    """Return the clock if the strategy in force asks it; refuse what is none."""
    if clock is not None and not callable(clock):
        raise bad_argument("clock", "a function that returns seconds", shown(clock))
    return clock if goes_by_time(state) else None


# Notes on blocks: the kernels of the adaptive strategy, called when a block is stored, found, released and evicted.

MOST_USES = 255


@inlined
def _age_of(state: State, place: int) -> Any:
    """Return the statistics of the class and the present age of the note at `place`."""
    note, learner = state.notes[place], state.learner
    return learner.ages[note.kind - 1, age_bucket(learner.totals[0].clock - note.released)]


@pointed
def note_hit(state: State, block: int) -> int:
    """Note that a cached block is used again."""
    note = state.notes[block]
    _age_of(state, block).reused += 1.0
    wait = state.learner.waits[block]
    note.gap = _after_pause(state.learner, wait.time, note.gap, wait.output)
    note.kind = 0
    note.uses = min(np.int64(note.uses) + 1, MOST_USES)
    return 0


@inlined
def _after_pause(learner: Learner, since: Any, gap: Any, output: Any) -> Any:
    """Return the gap of a block that waited until now, and note the end of its pause."""
    pause = waited(learner.totals[0].time, since)
    end_pause(learner, pause, gap, output)
    return mean_gap(pause, gap)


@pointed
def note_store(state: State, block: int) -> int:
    """Begin the note on a block that becomes findable; one that comes back is known by its ghost."""
    note, totals, parent = state.notes[block], state.learner.totals[0], state.blocks[block].parent
    prefix_hash = note_prefix_hash(state, block)
    note.mark = (prefix_hash >> 1) & WORD
    note.kind = 0
    note.uses = 1
    note.gap = state.notes[parent].gap if parent >= 0 else 0
    ghosts = _ghost_set(state, prefix_hash)
    first = len(state.blocks) + GHOST_SET * ghosts
    for i in range(first, first + GHOST_SET):
        ghost = state.notes[i]
        if ghost.kind != 0 and ghost.mark == note.mark:
            note.uses = min(np.int64(ghost.uses) + 1, MOST_USES)
            _age_of(state, i).reused += 1.0
            ghost.kind = 0
            break
    if parent < 0 or parent + 1 != totals.newest:  # else it was asked for a block before this one
        known = state.learner.gaps[ghosts]
        if known.is_known != 0 and known.mark == note.mark:
            note.gap = _after_pause(state.learner, known.time, known.gap, known.output)
            known.is_known = 0
    totals.newest = block + 1
    totals.clock += 1
    totals.stores += 1.0
    return MAIN


@pointed
def note_release(state: State, block: int) -> int:
    """Note that a block has no user any more and waits as a cached one. Those of a request come tail first."""
    note, totals, record = state.notes[block], state.learner.totals[0], state.blocks[block]
    kind = class_of(note.uses, record.num_children == 0)
    note.kind = 1 + kind
    note.released = totals.clock
    wait = state.learner.waits[block]
    wait.time = totals.time & WORD
    wait.output = totals.output
    wait.expected = expected_wait(state.learner, note.gap)
    state.learner.classes[kind].released += 1.0
    totals.accesses += 1
    totals.releases += 1.0
    prefix_hash = state.prefix_hashes[block]
    if (prefix_hash >> 8) & totals.sample_mask == 0:
        contend(state.learner, prefix_hash, kind, wait.expected)
    return 0


@pointed
def note_evict(state: State, block: int) -> int:
    """Make the note on an evicted block a ghost, in place of the oldest of its set."""
    ghosts = _ghost_set(state, state.prefix_hashes[block])
    first = len(state.blocks) + GHOST_SET * ghosts
    chosen = first
    for i in range(first, first + GHOST_SET):
        if state.notes[i].kind == 0:
            chosen = i
            break
        if state.notes[i].released < state.notes[chosen].released:
            chosen = i
    note, ghost = state.notes[block], state.notes[chosen]
    if ghost.kind != 0:
        _age_of(state, chosen).censored += 1.0
    ghost.released = note.released
    ghost.mark = note.mark
    ghost.uses = note.uses
    ghost.kind = note.kind
    if _has_gap_of_its_own(state, block):
        known = state.learner.gaps[ghosts]
        known.mark = note.mark
        known.time = state.learner.waits[block].time
        known.gap = note.gap
        known.output = state.learner.waits[block].output
        known.is_known = 1
    note.kind = 0
    return 0


@inlined
def _has_gap_of_its_own(state: State, block: int) -> bool:
    """Tell whether the gap of a block cannot be learned from that of the block before it."""
    parent, waits = state.blocks[block].parent, state.learner.waits
    return parent < 0 or waits[parent].time != waits[block].time or state.notes[parent].gap != state.notes[block].gap


@pointed
def adaptive_score(state: State, block: int) -> int:
    """Return the score of a cached block: when it expires, or since when it waits; turns have an order beside that."""
    note = state.notes[block]
    if state.learner.totals[0].rules == EXPIRY:
        return expires_at(state.learner, note.kind - 1, note.released)
    return note.released


@inlined
def _ghost_set(state: State, prefix_hash: int) -> int:
    """Return the number of the set of ghosts that a block belongs to."""
    return (((prefix_hash >> 32) & WORD) * len(state.learner.gaps)) >> 32


# Lessons and duels: asked for at the end of every request.

# Lessons come every half capacity of stored blocks, duels are judged every half capacity of accesses.
PARTS = 2
SHORTEST_PERIOD = 2048

# Statistics lose a twentieth with each lesson; nothing is learned before the cache is full but for a sixteenth.
MEMORY = 0.95
FULL = 16


@inlined
def end_request(state: State) -> bool:
    """Learn and judge when it is time; tells whether the order of the cached blocks changed."""
    counters, totals = state.counters[0], state.learner.totals[0]
    totals.requests += 1.0
    end_round(state.learner)
    if totals.is_over:
        learn_pause(state.learner)
    if totals.is_told == 0:
        totals.time = totals.accesses
    if totals.clock < totals.next_lesson and totals.accesses < totals.next_duel:
        return False
    blank = counters.free_top + counters.num_blocks - counters.fresh
    return _advance(state, blank, counters.num_blocks - counters.used)


@called
def _advance(state: State, blank: int, room: int) -> bool:
    """Learn, judge, or both; tells whether the order of the cached blocks changed."""
    num_blocks, learner, totals = state.counters[0].num_blocks, state.learner, state.learner.totals[0]
    period = max(SHORTEST_PERIOD, num_blocks // PARTS)
    before, learned = totals.rules, False
    if totals.clock >= totals.next_lesson:
        totals.next_lesson = totals.clock + period
        learned = blank <= num_blocks // FULL
    if learned:
        _count_waiting(state)
        expect(learner)
        choose(learner, max(1, room))
        draw_again(learner)
        _fade(learner)
        totals.lessons += 1
    if totals.accesses >= totals.next_duel:
        totals.next_duel = totals.accesses + period
        if totals.lessons > 0:
            judge(learner, period, num_blocks)
    return totals.rules != before or (learned and totals.rules == EXPIRY)


@inlined
def _count_waiting(state: State) -> None:
    """Count the cached blocks and the ghosts by class and age."""
    for c in range(CLASSES):
        for b in range(AGES):
            state.learner.ages[c, b].waiting = 0.0
    for i in range(len(state.notes)):
        if state.notes[i].kind != 0:
            _age_of(state, i).waiting += 1.0


@inlined
def _fade(learner: Learner) -> None:
    totals = learner.totals[0]
    for c in range(CLASSES):
        learner.classes[c].released *= MEMORY
        for b in range(AGES):
            learner.ages[c, b].reused *= MEMORY
            learner.ages[c, b].censored *= MEMORY
    totals.stores *= MEMORY
    totals.releases *= MEMORY
    totals.requests *= MEMORY
