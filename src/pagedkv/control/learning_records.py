"""The records of the adaptive strategy: a note on every block and ghost, and all that it has learned.

Time is counted in stored blocks, that is in misses: an age in this unit compares with the capacity, whatever the speed
of the traffic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# What is known of a block: how often it was used (1, 2, 3, 4, 5-7, 8+), and whether it was let go as a leaf.
CLASSES = 12

# Ages fall into buckets, four to an octave: the last begins at half a billion stored blocks.
AGES = 112

GHOSTS_PER_BLOCK = 3
GHOST_SET = 4

# A shadow cache has half to all of so many blocks, or all blocks of a smaller pool.
SHADOW_ROOM = 1024
SHADOW_HEADS = 4 * SHADOW_ROOM

NOTE = np.dtype(
    (
        np.record,
        [
            ("let_go", "i8"),  # when nobody used it any more, in stored blocks
            ("mark", "u4"),  # a part of its path
            ("uses", "u2"),  # before it was last given up, too
            ("kind", "u1"),  # 1 + its class while it is cached or a ghost, else 0
            ("is_sampled", "u1"),
        ],
    )
)

(
    CLOCK,  # blocks stored so far
    ACCESSES,  # blocks let go so far
    NEXT_LESSON,
    NEXT_DUEL,
    LESSONS,
    RULES,  # 1 while the learned order rules
    SHARE,  # of the requests whose blocks have the long times to live, out of SHARES
    SAMPLE_MASK,
    ROOM,  # of a shadow cache
    ENTRIES,
    FREE_ENTRY,
    OLDEST,
    NEWEST,
    LRU_SIZE,
    HEAP_SIZE,
    NUM_NUMBERS,
) = range(16)
"""Places in `Learner.numbers`."""

STORES, RELEASES, REQUESTS, LEAD, SEEN, REQUEST_LEAD, VARIANCE, NUM_SUMS = range(8)
"""Places in `Learner.sums`: of late, blocks stored, blocks let go, requests; the lead in hits of the learned order's
shadow, out of how many sampled accesses; the lead in this request, and the sum of the squares of that."""

REUSED, CENSORED, WAITING, HAZARD, HITS, SPACE, NUM_TABLES = range(7)
"""Tables by class and age: reuses, ghosts forgotten before one, blocks not reused so far; and what a lesson computes:
chances of a reuse (of all together in the row behind the last), what a block brings and takes up to each age.
"""

SHORT, LONG, TRIAL, NUM_LIVES = range(4)
"""Rows of times to live by class: one share of the requests has the long ones."""

PATH, RANK, LET_GO, OLDER, NEWER, NEXT, PLACE, IS_IN_LRU, KIND, HEADS, HEAP, NUM_ROWS = range(12)
"""Rows of `Learner.shadows`: by entry its path, rank, when it was let go, its neighbours in the list of the LRU shadow,
the next of its hash chain (or free entry), its place in the heap, whether it is in the list, its class; then heads and
heap."""


class Learner(NamedTuple):
    """All that the adaptive strategy has learned. References between entries are 1 + entry; 0 means none."""

    numbers: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    released: npt.NDArray[np.float64]  # blocks let go of late, by class
    tables: npt.NDArray[np.float64]
    lives: npt.NDArray[np.int64]
    shadows: npt.NDArray[np.int64]


def new_learner(exists: bool) -> Learner:
    """Return a learner that knows nothing, or the empty stand-in that other strategies need."""
    size = int(exists)
    return Learner(
        np.zeros(size * NUM_NUMBERS, np.int64),
        np.zeros(size * NUM_SUMS),
        np.zeros(size * CLASSES),
        np.zeros((size * NUM_TABLES, CLASSES + 1, AGES + 1)),
        np.zeros((size * NUM_LIVES, CLASSES), np.int64),
        np.zeros((size * NUM_ROWS, SHADOW_HEADS), np.int64),
    )
