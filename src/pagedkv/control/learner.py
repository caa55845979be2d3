"""The adaptive strategy: notes on blocks and ghosts, lessons from them, and an order that a duel has chosen.

Notes say after how long blocks of each class are used again; a lesson makes times to live of that (`lifetimes`); and
duels of small shadow caches (`shadows`) decide what rules the real cache: recency, the learned times, or the gaps
between the turns of a session.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from pagedkv.control.ghosts import note_prefix_hash, with_prefix_hashes
from pagedkv.control.lifetimes import age_bucket, choose, class_of, expect, expires_at
from pagedkv.control.shadows import MOST_GAP, contend, draw_again, end_round, judge, turn_score
from pagedkv.control.state import (
    AGES,
    CLASSES,
    EXPIRY,
    GHOST_SET,
    GHOSTS_PER_BLOCK,
    MAIN,
    NOTE,
    RECENCY,
    SHADOW_ROOM,
    TURNS,
    Learner,
    State,
    new_learner,
    power_of_two,
)
from pagedkv.jit import called, inlined, pointed

# What the adaptive strategy begins with, and what it forgets with the content of the cache.
#
# ``State.notes`` holds a note per block of the pool and behind those the ghosts, blocks that were evicted lately, in
# sets of four. ``State.learner`` is all that was learned. Both are empty while another strategy is in force.


def with_learner(state: State) -> State:
    """Return the state with a prefix hash and a note for each block, ghosts, and a learner that knows nothing yet."""
    num_blocks = len(state.blocks)
    ghosts = GHOST_SET * max(1, GHOSTS_PER_BLOCK * num_blocks // GHOST_SET)
    sampled = power_of_two(max(1, 2 * num_blocks // SHADOW_ROOM) + 1) // 2  # one block of so many
    learner = new_learner(num_blocks + ghosts, exists=True)
    totals = learner.totals[0]
    totals.sample_mask = sampled - 1
    totals.room = max(1, num_blocks // sampled)
    totals.next_lesson = totals.next_duel = num_blocks
    return with_prefix_hashes(state)._replace(notes=np.zeros(num_blocks + ghosts, NOTE), learner=learner)


def forget_notes(state: State) -> None:
    """Forget all blocks and ghosts, but not what was learned from them."""
    state.notes[:] = 0
    state.learner.gaps[:] = 0


# Notes on blocks: the kernels of the adaptive strategy, called when a block is stored, found, released and evicted.

MOST_USES = 60_000
_WORD = np.int64(0xFFFFFFFF)


@inlined
def _age_of(state: State, place: int) -> Any:
    """Return the statistics of the class and the present age of the note at `place`."""
    note, learner = state.notes[place], state.learner
    return learner.ages[note.kind - 1, age_bucket(learner.totals[0].clock - note.released)]


@inlined
def _gap_since(state: State, released: int, before: np.int32) -> int:
    """Return the gap that just ended, or the geometric mean of it and of what stood there before."""
    gap = min(max(state.learner.totals[0].clock - released, 1), MOST_GAP)
    return gap if before == 0 else int(sqrt(gap * float(before)))


@pointed
def note_hit(state: State, block: int) -> int:
    """Note that a cached block is used again."""
    note = state.notes[block]
    _age_of(state, block).reused += 1.0
    state.learner.gaps[block] = _gap_since(state, note.released, state.learner.gaps[block])
    note.kind = 0
    note.uses = min(np.int64(note.uses) + 1, MOST_USES)
    return 0


@pointed
def note_store(state: State, block: int) -> int:
    """Begin the note on a block that becomes findable; one that comes back is known by its ghost."""
    note, totals, parent = state.notes[block], state.learner.totals[0], state.blocks[block].parent
    prefix_hash = note_prefix_hash(state, block)
    note.mark = (prefix_hash >> 1) & _WORD
    note.is_sampled = ((prefix_hash >> 8) & totals.sample_mask) == 0
    note.kind = 0
    note.uses = 1
    gap = state.learner.gaps[parent] if parent >= 0 else np.int32(0)
    first = _ghost_set(state, prefix_hash)
    for i in range(first, first + GHOST_SET):
        ghost = state.notes[i]
        if ghost.kind != 0 and ghost.mark == note.mark:
            note.uses = min(np.int64(ghost.uses) + 1, MOST_USES)
            _age_of(state, i).reused += 1.0
            gap = np.int32(_gap_since(state, ghost.released, state.learner.gaps[i]))
            ghost.kind = 0
            break
    state.learner.gaps[block] = gap
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
    state.learner.classes[kind].released += 1.0
    totals.accesses += 1
    totals.releases += 1.0
    if note.is_sampled != 0:
        contend(state.learner, state.prefix_hashes[block], kind, state.learner.gaps[block])
    return 0


@pointed
def note_evict(state: State, block: int) -> int:
    """Make the note on an evicted block a ghost, in place of the oldest of its set."""
    first = _ghost_set(state, state.prefix_hashes[block])
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
    state.learner.gaps[chosen] = state.learner.gaps[block]
    note.kind = 0
    return 0


@pointed
def adaptive_score(state: State, block: int) -> int:
    """Return the score of a cached block: since when it waits, when it expires, or what its turns say."""
    note, rules = state.notes[block], state.learner.totals[0].rules
    if rules == RECENCY:
        return note.released
    if rules == TURNS:
        return turn_score(state.learner.totals[0].ranked, note.released, state.learner.gaps[block])
    return expires_at(state.learner, note.kind - 1, note.released)


@inlined
def _ghost_set(state: State, prefix_hash: int) -> int:
    num_blocks = state.counters[0].num_blocks
    sets = (len(state.notes) - num_blocks) // GHOST_SET
    return num_blocks + GHOST_SET * ((((prefix_hash >> 32) & _WORD) * sets) >> 32)


# Lessons and duels: asked for at the end of every request.

# Lessons come every half capacity of stored blocks, duels are judged every half capacity of accesses. While turns rule,
# blocks are ranked by their ages of now so many times per capacity of stored blocks.
PARTS = 2
SHORTEST_PERIOD = 2048
RANKINGS = 8

# Statistics lose a twentieth with each lesson; nothing is learned before the cache is full but for a sixteenth.
MEMORY = 0.95
FULL = 16


@inlined
def end_request(state: State) -> bool:
    """Learn and judge when it is time; tells whether the order of the cached blocks changed."""
    counters, totals = state.counters[0], state.learner.totals[0]
    totals.requests += 1.0
    end_round(state.learner)
    ages = totals.rules == TURNS and totals.clock - totals.ranked > counters.num_blocks // RANKINGS
    if totals.clock < totals.next_lesson and totals.accesses < totals.next_duel and not ages:
        return False
    totals.ranked = totals.clock
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
            judge(learner, period / num_blocks)
    return totals.rules != before or totals.rules == TURNS or (learned and totals.rules == EXPIRY)


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
