"""Two shadow caches over a hashed sample of the content: one gives up by recency, the other by learned expiry.

Both see the same accesses. When the learned order is significantly ahead, it rules the real cache, and recency as soon
as it is behind: that bounds the loss on traffic which cannot be learned. Sampling by hash takes all accesses of a block
or none, so a small shadow behaves as the large cache does (Waldspurger et al., "Efficient MRC construction with
SHARDS", FAST 2015); contests between policies are those of set dueling (Qureshi et al., "Adaptive insertion policies
for high performance caching", ISCA 2007). Shadows know no prefixes: of blocks let go together the deepest goes first.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import HEADER, with_policy
from pagedkv.control.state import (
    ACCESSES,
    AGES,
    CENSORED,
    CLASSES,
    CLOCK,
    ENTRIES,
    FREE_ENTRY,
    GHOST_SET,
    GHOSTS_PER_BLOCK,
    HAZARD,
    HEADS,
    HEAP,
    HEAP_SIZE,
    HITS,
    IS_IN_LRU,
    KIND,
    LEAD,
    LET_GO,
    LONG,
    LRU_SIZE,
    NEWER,
    NEWEST,
    NEXT,
    NEXT_DUEL,
    NEXT_LESSON,
    NOTE,
    OLDER,
    OLDEST,
    PATH,
    PLACE,
    RANK,
    RELEASES,
    REQUEST_LEAD,
    REQUESTS,
    REUSED,
    ROOM,
    RULES,
    SAMPLE_MASK,
    SEEN,
    SHADOW_HEADS,
    SHADOW_ROOM,
    SHARE,
    SHORT,
    SPACE,
    STORES,
    TRIAL,
    WAITING,
    Learner,
    State,
    new_learner,
    power_of_two,
)
from pagedkv.jit import borrowed, called, inlined

# What the adaptive strategy begins with, and what it forgets with the content of the cache.
#
# ``State.notes`` holds a note per block of the pool and behind those the ghosts, blocks that were given up lately, in
# sets of four. ``State.learner`` is all that was learned. Both are empty while another strategy is in force.


def with_learner(state: State) -> State:
    """Return the state with a path and a note for each block, ghosts, and a learner that knows nothing yet."""
    num_blocks = len(state.blocks)
    ghosts = GHOST_SET * max(1, GHOSTS_PER_BLOCK * num_blocks // GHOST_SET)
    sampled = power_of_two(max(1, 2 * num_blocks // SHADOW_ROOM) + 1) // 2  # one block of so many
    learner = new_learner(True)
    learner.numbers[SAMPLE_MASK] = sampled - 1
    learner.numbers[ROOM] = max(1, num_blocks // sampled)
    learner.numbers[[NEXT_LESSON, NEXT_DUEL]] = num_blocks
    return with_policy(state, paths=True)._replace(notes=np.zeros(num_blocks + ghosts, NOTE), learner=learner)


def forget_content(state: State) -> None:
    """Forget all blocks, ghosts and shadows, but not what was learned from them."""
    if len(state.notes):
        state.notes[:] = 0
        state.learner.shadows[:] = 0
        state.learner.numbers[[ENTRIES, FREE_ENTRY, OLDEST, NEWEST, LRU_SIZE, HEAP_SIZE]] = 0


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


_DEPTH_BITS = 12
_DEEPEST = (1 << _DEPTH_BITS) - 1


@called
def contend(learner: Learner, path: int, kind: int, depth: int) -> None:
    """Let both shadows see an access to a sampled block, and count who had it. O(log of their size)."""
    learner = borrowed(learner)
    head = (path >> 20) & (SHADOW_HEADS - 1)
    entry = learner.shadows[HEADS, head] - 1
    while entry >= 0 and learner.shadows[PATH, entry] != path:
        entry = learner.shadows[NEXT, entry] - 1
    if entry < 0:
        entry = _new_entry(learner)
        learner.shadows[PATH, entry] = path
        learner.shadows[NEXT, entry] = learner.shadows[HEADS, head]
        learner.shadows[HEADS, head] = entry + 1
    lead = (1 if learner.shadows[PLACE, entry] != 0 else 0) - (1 if learner.shadows[IS_IN_LRU, entry] != 0 else 0)
    learner.sums[LEAD] += lead
    learner.sums[REQUEST_LEAD] += lead
    learner.sums[SEEN] += 1.0
    _touch_in_lru(learner, entry)
    learner.shadows[KIND, entry] = kind
    learner.shadows[LET_GO, entry] = learner.numbers[CLOCK]
    _touch_in_heap(learner, entry, _rank(learner, entry, min(depth, _DEEPEST)))


@inlined
def rank_again(learner: Learner) -> None:
    """Order the expiry shadow by new times to live."""
    for place in range(learner.numbers[HEAP_SIZE]):
        entry = learner.shadows[HEAP, place]
        depth = _DEEPEST - (learner.shadows[RANK, entry] & _DEEPEST)
        learner.shadows[RANK, entry] = _rank(learner, entry, depth)
    for place in range(learner.numbers[HEAP_SIZE] // 2 - 1, -1, -1):
        _sink(learner, learner.shadows[HEAP, place], place)


@inlined
def _rank(learner: Learner, entry: int, depth: int) -> int:
    expiry = expires_at(learner, learner.shadows[KIND, entry], learner.shadows[LET_GO, entry])
    return (expiry << _DEPTH_BITS) | (_DEEPEST - depth)


@inlined
def _new_entry(learner: Learner) -> int:
    entry = learner.numbers[FREE_ENTRY] - 1
    if entry >= 0:
        learner.numbers[FREE_ENTRY] = learner.shadows[NEXT, entry]
    else:
        entry = learner.numbers[ENTRIES]
        learner.numbers[ENTRIES] += 1
    return entry


@inlined
def _drop_if_unused(learner: Learner, entry: int) -> None:
    """Free an entry that is in neither shadow."""
    if learner.shadows[IS_IN_LRU, entry] != 0 or learner.shadows[PLACE, entry] != 0:
        return
    head = (learner.shadows[PATH, entry] >> 20) & (SHADOW_HEADS - 1)
    link = learner.shadows[HEADS, head] - 1
    if link == entry:
        learner.shadows[HEADS, head] = learner.shadows[NEXT, entry]
    else:
        while learner.shadows[NEXT, link] != entry + 1:
            link = learner.shadows[NEXT, link] - 1
        learner.shadows[NEXT, link] = learner.shadows[NEXT, entry]
    learner.shadows[NEXT, entry] = learner.numbers[FREE_ENTRY]
    learner.numbers[FREE_ENTRY] = entry + 1


@inlined
def _touch_in_lru(learner: Learner, entry: int) -> None:
    """Make the entry the newest of the list; the oldest of a full list goes."""
    if learner.shadows[IS_IN_LRU, entry] != 0:
        _unlink(learner, entry)
    elif learner.numbers[LRU_SIZE] == learner.numbers[ROOM]:
        oldest = learner.numbers[OLDEST] - 1
        _unlink(learner, oldest)
        learner.shadows[IS_IN_LRU, oldest] = 0
        _drop_if_unused(learner, oldest)
    else:
        learner.numbers[LRU_SIZE] += 1
    learner.shadows[IS_IN_LRU, entry] = 1
    learner.shadows[OLDER, entry] = learner.numbers[NEWEST]
    learner.shadows[NEWER, entry] = 0
    if learner.numbers[NEWEST] != 0:
        learner.shadows[NEWER, learner.numbers[NEWEST] - 1] = entry + 1
    else:
        learner.numbers[OLDEST] = entry + 1
    learner.numbers[NEWEST] = entry + 1


@inlined
def _unlink(learner: Learner, entry: int) -> None:
    older, newer = learner.shadows[OLDER, entry], learner.shadows[NEWER, entry]
    if older != 0:
        learner.shadows[NEWER, older - 1] = newer
    else:
        learner.numbers[OLDEST] = newer
    if newer != 0:
        learner.shadows[OLDER, newer - 1] = older
    else:
        learner.numbers[NEWEST] = older


@inlined
def _touch_in_heap(learner: Learner, entry: int, rank: int) -> None:
    """Give the entry a new rank; of a full heap the lowest goes in exchange for a new one."""
    learner.shadows[RANK, entry] = rank
    if learner.shadows[PLACE, entry] != 0:
        place = learner.shadows[PLACE, entry] - 1
    elif learner.numbers[HEAP_SIZE] < learner.numbers[ROOM]:
        place = learner.numbers[HEAP_SIZE]
        learner.numbers[HEAP_SIZE] += 1
    else:
        lowest = learner.shadows[HEAP, 0]
        learner.shadows[PLACE, lowest] = 0
        _drop_if_unused(learner, lowest)
        place = 0
    place = _rise(learner, entry, place)
    _sink(learner, entry, place)


@inlined
def _goes_before(learner: Learner, a: int, b: int) -> bool:
    first, second = learner.shadows[RANK, a], learner.shadows[RANK, b]
    return first < second or (first == second and learner.shadows[PATH, a] < learner.shadows[PATH, b])


@inlined
def _put(learner: Learner, entry: int, place: int) -> None:
    learner.shadows[HEAP, place] = entry
    learner.shadows[PLACE, entry] = place + 1


@inlined
def _rise(learner: Learner, entry: int, place: int) -> int:
    """Move the entry up as far as it goes; returns where it is to be put."""
    while place > 0:
        above = (place - 1) >> 1
        other = learner.shadows[HEAP, above]
        if not _goes_before(learner, entry, other):
            break
        _put(learner, other, place)
        place = above
    return place


@inlined
def _sink(learner: Learner, entry: int, place: int) -> None:
    size = learner.numbers[HEAP_SIZE]
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and _goes_before(learner, learner.shadows[HEAP, below + 1], learner.shadows[HEAP, below]):
            below += 1
        other = learner.shadows[HEAP, below]
        if not _goes_before(learner, other, entry):
            break
        _put(learner, other, place)
        place = below
    _put(learner, entry, place)


# What the adaptive strategy notes when a block is found, stored, let go and given up.
#
# From these notes it learns how long blocks of each class wait for their next use (`lifetimes`).

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
