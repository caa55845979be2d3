"""Learning how long cached blocks are worth keeping: the estimator of the adaptive strategy.

Three parts: notes on blocks and ghosts say after how long blocks of each class are used again; a lesson makes times to
live of that; and a duel of two small shadow caches, one that evicts by recency and one by the learned times, decides
which order rules the real cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control.ghosts import note_prefix_hash, with_prefix_hashes
from pagedkv.control.state import (
    AGES,
    CLASSES,
    GHOST_SET,
    GHOSTS_PER_BLOCK,
    MAIN,
    NOTE,
    SHADOW_HEADS,
    SHADOW_ROOM,
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
    learner = new_learner(True)
    totals = learner.totals[0]
    totals.sample_mask = sampled - 1
    totals.room = max(1, num_blocks // sampled)
    totals.next_lesson = totals.next_duel = num_blocks
    return with_prefix_hashes(state)._replace(notes=np.zeros(num_blocks + ghosts, NOTE), learner=learner)


def forget_notes(state: State) -> None:
    """Forget all blocks, ghosts and shadows, but not what was learned from them."""
    if len(state.notes):
        learner, totals = state.learner, state.learner.totals[0]
        for array in (state.notes, learner.shadows, learner.heads, learner.heap):
            array[:] = 0
        totals.entries = totals.free_entry = totals.oldest = totals.newest = totals.lru_size = totals.heap_size = 0


# How long a block of each class is worth keeping: times to live, learned from what was reused at what age.
#
# Per class, the chance of a reuse at each age follows from the reuses seen (of cached blocks and of ghosts) and from
# how many were at risk of one; blocks that still wait, and ghosts forgotten, are censored observations (Kaplan &
# Meier, "Nonparametric estimation from incomplete observations", 1958). From it follow the hits that a time to live
# promises and the space-time it takes; hits per space-time as the currency of eviction is that of LHD (Beckmann, Chen
# & Cidon, "LHD: improving cache hit rate by maximizing hit density", NSDI 2018). One price for space-time, a Lagrange
# multiplier, makes the expected occupancy equal to the room. It may jump there: so a share of the requests lives
# longer.
#
# All sums run in a fixed order and nothing but + - * / and the square root is used: the same on every machine.

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
def expires_at(learner: Learner, kind: int, released: int) -> int:
    """Return when a block expires; the blocks of a request, released together, share the draw for a long life."""
    is_long = ((released * _MIX) >> 24) & (SHARES - 1) < learner.totals[0].share
    return released + (learner.classes[kind].long if is_long else learner.classes[kind].short)


@inlined
def first_age(bucket: int) -> int:
    """Return the lowest age of a bucket."""
    return bucket if bucket < 8 else (4 + (bucket & 3)) << ((bucket >> 2) - 1)


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


# Two shadow caches over a hashed sample of the content: one evicts by recency, the other by learned expiry.
#
# Both see the same accesses. When the learned order is significantly ahead, it rules the real cache, and recency as
# soon as it is behind: that bounds the loss on traffic which cannot be learned. Sampling by hash takes all accesses of
# a block or none, so a small shadow behaves as the large cache does (Waldspurger et al., "Efficient MRC construction
# with SHARDS", FAST 2015); contests between policies are those of set dueling (Qureshi et al., "Adaptive insertion
# policies for high performance caching", ISCA 2007). Shadows know no prefixes: of blocks released together the deepest
# is evicted first.

_DEPTH_BITS = 12
_DEEPEST = (1 << _DEPTH_BITS) - 1


@called
def contend(learner: Learner, prefix_hash: int, kind: int, depth: int) -> None:
    """Let both shadows see an access to a sampled block, and count who had it. O(log of their size)."""
    totals = learner.totals[0]
    head = _head_of(prefix_hash)
    entry = learner.heads[head] - 1
    while entry >= 0 and learner.shadows[entry].prefix_hash != prefix_hash:
        entry = learner.shadows[entry].next - 1
    if entry < 0:
        entry = _new_entry(learner)
        learner.shadows[entry].prefix_hash = prefix_hash
        learner.shadows[entry].next = learner.heads[head]
        learner.heads[head] = entry + 1
    shadow = learner.shadows[entry]
    lead = (1 if shadow.heap_pos != 0 else 0) - (1 if shadow.is_in_lru != 0 else 0)
    totals.lead += lead
    totals.request_lead += lead
    totals.seen += 1.0
    _touch_in_lru(learner, entry)
    shadow.kind = kind
    shadow.released = totals.clock
    _touch_in_heap(learner, entry, _rank(learner, entry, min(depth, _DEEPEST)))


@inlined
def rank_again(learner: Learner) -> None:
    """Order the expiry shadow by new times to live."""
    size = learner.totals[0].heap_size
    for place in range(size):
        entry = learner.heap[place]
        depth = _DEEPEST - (learner.shadows[entry].rank & _DEEPEST)
        learner.shadows[entry].rank = _rank(learner, entry, depth)
    for place in range(size // 2 - 1, -1, -1):
        _sink(learner, learner.heap[place], place)


@inlined
def _rank(learner: Learner, entry: int, depth: int) -> int:
    shadow = learner.shadows[entry]
    return (expires_at(learner, shadow.kind, shadow.released) << _DEPTH_BITS) | (_DEEPEST - depth)


@inlined
def _head_of(prefix_hash: int) -> int:
    return (prefix_hash >> 20) & (SHADOW_HEADS - 1)


@inlined
def _new_entry(learner: Learner) -> int:
    totals = learner.totals[0]
    entry = totals.free_entry - 1
    if entry >= 0:
        totals.free_entry = learner.shadows[entry].next
    else:
        entry = totals.entries
        totals.entries += 1
    return entry


@inlined
def _drop_if_unused(learner: Learner, entry: int) -> None:
    """Free an entry that is in neither shadow."""
    shadow, totals = learner.shadows[entry], learner.totals[0]
    if shadow.is_in_lru != 0 or shadow.heap_pos != 0:
        return
    head = _head_of(shadow.prefix_hash)
    link = learner.heads[head] - 1
    if link == entry:
        learner.heads[head] = shadow.next
    else:
        while learner.shadows[link].next != entry + 1:
            link = learner.shadows[link].next - 1
        learner.shadows[link].next = shadow.next
    shadow.next = totals.free_entry
    totals.free_entry = entry + 1


@inlined
def _touch_in_lru(learner: Learner, entry: int) -> None:
    """Make the entry the newest of the list; the oldest of a full list goes."""
    shadow, totals = learner.shadows[entry], learner.totals[0]
    if shadow.is_in_lru != 0:
        _unlink(learner, entry)
    elif totals.lru_size == totals.room:
        oldest = totals.oldest - 1
        _unlink(learner, oldest)
        learner.shadows[oldest].is_in_lru = 0
        _drop_if_unused(learner, oldest)
    else:
        totals.lru_size += 1
    shadow.is_in_lru = 1
    shadow.older = totals.newest
    shadow.newer = 0
    if totals.newest != 0:
        learner.shadows[totals.newest - 1].newer = entry + 1
    else:
        totals.oldest = entry + 1
    totals.newest = entry + 1


@inlined
def _unlink(learner: Learner, entry: int) -> None:
    older, newer = learner.shadows[entry].older, learner.shadows[entry].newer
    if older != 0:
        learner.shadows[older - 1].newer = newer
    else:
        learner.totals[0].oldest = newer
    if newer != 0:
        learner.shadows[newer - 1].older = older
    else:
        learner.totals[0].newest = older


@inlined
def _touch_in_heap(learner: Learner, entry: int, rank: int) -> None:
    """Give the entry a new rank; of a full heap the lowest goes in exchange for a new one."""
    shadow, totals = learner.shadows[entry], learner.totals[0]
    shadow.rank = rank
    if shadow.heap_pos != 0:
        place = shadow.heap_pos - 1
    elif totals.heap_size < totals.room:
        place = totals.heap_size
        totals.heap_size += 1
    else:
        lowest = learner.heap[0]
        learner.shadows[lowest].heap_pos = 0
        _drop_if_unused(learner, lowest)
        place = 0
    place = _rise(learner, entry, place)
    _sink(learner, entry, place)


@inlined
def _goes_before(learner: Learner, a: int, b: int) -> bool:
    first, second = learner.shadows[a], learner.shadows[b]
    return first.rank < second.rank or (first.rank == second.rank and first.prefix_hash < second.prefix_hash)


@inlined
def _put(learner: Learner, entry: int, place: int) -> None:
    learner.heap[place] = entry
    learner.shadows[entry].heap_pos = place + 1


@inlined
def _rise(learner: Learner, entry: int, place: int) -> int:
    """Move the entry up as far as it goes; returns where it is to be put."""
    while place > 0:
        above = (place - 1) >> 1
        other = learner.heap[above]
        if not _goes_before(learner, entry, other):
            break
        _put(learner, other, place)
        place = above
    return place


@inlined
def _sink(learner: Learner, entry: int, place: int) -> None:
    size = learner.totals[0].heap_size
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and _goes_before(learner, learner.heap[below + 1], learner.heap[below]):
            below += 1
        other = learner.heap[below]
        if not _goes_before(learner, other, entry):
            break
        _put(learner, other, place)
        place = below
    _put(learner, entry, place)


# Notes on blocks: the kernels of the adaptive strategy, called when a block is stored, found, released and evicted.

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
    """Return the class of a block that is released after so many uses."""
    rank = uses - 1 if uses <= 4 else (4 if uses <= 7 else 5)
    return 2 * rank + (1 if is_leaf else 0)


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
    note.kind = 0
    note.uses = min(np.int64(note.uses) + 1, MOST_USES)
    return 0


@pointed
def note_store(state: State, block: int) -> int:
    """Begin the note on a block that becomes findable; one that comes back is known by its ghost."""
    note, totals = state.notes[block], state.learner.totals[0]
    prefix_hash = note_prefix_hash(state, block)
    note.mark = (prefix_hash >> 1) & _WORD
    note.is_sampled = ((prefix_hash >> 8) & totals.sample_mask) == 0
    note.kind = 0
    note.uses = 1
    first = _ghost_set(state, prefix_hash)
    for i in range(first, first + GHOST_SET):
        ghost = state.notes[i]
        if ghost.kind != 0 and ghost.mark == note.mark:
            note.uses = min(np.int64(ghost.uses) + 1, MOST_USES)
            _age_of(state, i).reused += 1.0
            ghost.kind = 0
            break
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
        contend(state.learner, state.prefix_hashes[block], kind, record.depth)
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
    note.kind = 0
    return 0


@pointed
def expiry_of(state: State, block: int) -> int:
    """Return the score of a cached block: when it expires, or since when it waits where plain recency rules."""
    note = state.notes[block]
    if state.learner.totals[0].rules == 0:
        return note.released
    return expires_at(state.learner, note.kind - 1, note.released)


@inlined
def _ghost_set(state: State, prefix_hash: int) -> int:
    num_blocks = state.counters[0].num_blocks
    sets = (len(state.notes) - num_blocks) // GHOST_SET
    return num_blocks + GHOST_SET * ((((prefix_hash >> 32) & _WORD) * sets) >> 32)


# Lessons and duels: asked for at the end of every request.

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
def end_request(state: State) -> bool:
    """Learn and judge when it is time; tells whether the order of the cached blocks changed."""
    counters, totals = state.counters[0], state.learner.totals[0]
    totals.requests += 1.0
    totals.variance += totals.request_lead * totals.request_lead
    totals.request_lead = 0.0
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
        rank_again(learner)
        _fade(learner)
        totals.lessons += 1
    if totals.accesses >= totals.next_duel:
        totals.next_duel = totals.accesses + period
        if totals.lessons > 0:
            _judge(learner, period / num_blocks)
    return totals.rules != before or (learned and totals.rules != 0)


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


@inlined
def _judge(learner: Learner, elapsed: float) -> None:
    """Let the order rule whose shadow had more hits lately."""
    totals = learner.totals[0]
    deviation = totals.variance**0.5
    if totals.lead > CLEARLY * totals.seen + AHEAD * deviation:
        totals.rules = 1
    elif totals.lead < -BEHIND * deviation:
        totals.rules = 0
    kept = 1.0 / (1.0 + FADING * elapsed)
    most = CLEARLY * totals.seen + MOST_DEVIATIONS * deviation
    most = min(most, MOST_LEAD * totals.room)
    totals.seen *= kept
    totals.variance *= kept * kept
    totals.lead = min(most, max(-most, totals.lead * kept))
