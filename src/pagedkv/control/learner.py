"""Two shadow caches over a hashed sample of the content: one gives up by recency, the other by learned expiry.

Both see the same accesses. When the learned order is significantly ahead, it rules the real cache, and recency as soon
as it is behind: that bounds the loss on traffic which cannot be learned. Sampling by hash takes all accesses of a block
or none, so a small shadow behaves as the large cache does (Waldspurger et al., "Efficient MRC construction with
SHARDS", FAST 2015); contests between policies are those of set dueling (Qureshi et al., "Adaptive insertion policies
for high performance caching", ISCA 2007). Shadows know no prefixes: of blocks let go together the deepest goes first.
"""

from __future__ import annotations

from pagedkv.control.learning_records import (
    CLOCK,
    ENTRIES,
    FREE_ENTRY,
    HEADS,
    HEAP,
    HEAP_SIZE,
    IS_IN_LRU,
    KIND,
    LEAD,
    LET_GO,
    LRU_SIZE,
    NEWER,
    NEWEST,
    NEXT,
    OLDER,
    OLDEST,
    PATH,
    PLACE,
    RANK,
    REQUEST_LEAD,
    ROOM,
    SEEN,
    SHADOW_HEADS,
    Learner,
)
from pagedkv.control.lifetimes import expires_at
from pagedkv.jit import borrowed, called, inlined

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
