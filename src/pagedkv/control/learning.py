"""What the adaptive strategy begins with, and what it forgets with the content of the cache.

``State.notes`` holds a note per block of the pool and behind those the ghosts, blocks that were given up lately, in
sets of four. ``State.learner`` is all that was learned. Both are empty while another strategy is in force.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import with_policy
from pagedkv.control.learning_records import (
    ENTRIES,
    FREE_ENTRY,
    GHOST_SET,
    GHOSTS_PER_BLOCK,
    HEAP_SIZE,
    LRU_SIZE,
    NEWEST,
    NEXT_DUEL,
    NEXT_LESSON,
    NOTE,
    OLDEST,
    ROOM,
    SAMPLE_MASK,
    SHADOW_ROOM,
    new_learner,
)
from pagedkv.control.state import State, power_of_two


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
