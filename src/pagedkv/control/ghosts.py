"""What was given up lately: a bounded memory of paths, by which a strategy knows a block that comes back.

A path is a 64-bit hash of a block's content and of all that precedes it; it outlives the block. A collision costs a
misjudged priority, never a wrong hit. ``policy`` holds a header of scalars, then per block its path, then a ring of the
last paths given up with a hash table over it.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.state import State, power_of_two
from pagedkv.jit import inlined

CLOCK, LAP, HAND, INFLATION, TICKS, GIVEN_UP, CAPACITY, MASK, RING, LINKS, BUCKETS = range(11)
"""Places of the header; the last three say where those parts begin."""

HEADER = 16

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)


def with_policy(state: State, *, paths: bool = False, ghosts: int = 0) -> State:
    """Return the state with a header, a path for each block, and room to remember `ghosts` paths given up."""
    ring = HEADER + (len(state.blocks) if paths else 0)
    buckets = power_of_two(2 * ghosts) if ghosts else 0
    policy = np.zeros(ring + 2 * ghosts + buckets, np.int64)
    policy[[CAPACITY, MASK, RING, LINKS, BUCKETS]] = ghosts, buckets - 1, ring, ring + ghosts, ring + 2 * ghosts
    return state._replace(policy=policy)


def forget_ghosts(state: State) -> None:
    """Forget every path that was given up."""
    if len(state.policy) > 1 and state.policy[CAPACITY] > 0:
        state.policy[state.policy[RING] :] = 0
        state.policy[GIVEN_UP] = 0


@inlined
def note_path(state: State, block: int, parent: int) -> int:
    """Compute the path of `block`, which is about to hang under `parent`, and keep it with the block."""
    size = state.counters[0].block_size
    above = state.policy[HEADER + parent] if parent >= 0 else np.int64(state.roots[-1 - parent, 3])
    mixed = np.uint64(above)
    for i in range(block * size, (block + 1) * size):
        mixed = (mixed ^ np.uint64(state.contents[i])) * _STEP
        mixed ^= mixed >> _SHIFT
    mixed *= _FINISH
    path = np.int64((mixed ^ (mixed >> _SHIFT)) | np.uint64(1))  # 0 is an empty place of the ring
    state.policy[HEADER + block] = path
    return path


@inlined
def _bucket_of(state: State, path: int) -> int:
    return state.policy[BUCKETS] + ((path >> 8) & state.policy[MASK])


@inlined
def _unlink(state: State, place: int) -> None:
    """Take the entry at `place` of the ring out of the hash table."""
    policy = state.policy
    path = policy[policy[RING] + place]
    link = _bucket_of(state, path)
    while policy[link] != place + 1:
        link = policy[LINKS] + policy[link] - 1
    policy[link] = policy[policy[LINKS] + place]
    policy[policy[RING] + place] = 0


@inlined
def remember(state: State, block: int) -> None:
    """Note that `block` is given up; the oldest entry of a full memory goes."""
    policy = state.policy
    place = policy[GIVEN_UP] % policy[CAPACITY]
    policy[GIVEN_UP] += 1
    if policy[policy[RING] + place] != 0:
        _unlink(state, place)
    path = policy[HEADER + block]
    bucket = _bucket_of(state, path)
    policy[policy[RING] + place] = path
    policy[policy[LINKS] + place] = policy[bucket]
    policy[bucket] = place + 1


@inlined
def recall(state: State, path: int) -> int:
    """Forget `path` if it was given up lately; returns how many were given up since, or -1 if it is not remembered."""
    policy = state.policy
    link = policy[_bucket_of(state, path)]
    while link != 0:
        place = link - 1
        if policy[policy[RING] + place] == path:
            _unlink(state, place)
            return (policy[GIVEN_UP] - 1 - place) % policy[CAPACITY]
        link = policy[policy[LINKS] + place]
    return -1
