"""Ghosts: the prefix hashes of blocks evicted lately, by which S3-FIFO knows a block that comes back.

A prefix hash covers a block's content and all that precedes it, in 64 bits; it outlives the block. A collision costs a
misjudged priority, never a wrong hit. The last ones evicted are kept in a ring with a hash table over it.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.prefix import hash_tokens
from pagedkv.control.state import GHOST, State, power_of_two
from pagedkv.jit import inlined


def with_prefix_hashes(state: State, ghosts: int = 0) -> State:
    """Return the state with a prefix hash for each block, and room to remember so many evicted ones."""
    heads = power_of_two(2 * ghosts) if ghosts else 0
    return state._replace(
        prefix_hashes=np.zeros(len(state.blocks), np.int64),
        ghosts=np.zeros(ghosts, GHOST),
        ghost_heads=np.zeros(heads, np.int64),
    )


def forget_ghosts(state: State) -> None:
    """Forget every block that was evicted."""
    state.ghosts[:] = 0
    state.ghost_heads[:] = 0
    state.memory[0].evicted = 0


@inlined
def note_prefix_hash(state: State, block: int) -> int:
    """Compute the prefix hash of `block` from that of its parent, and keep it with the block."""
    size, parent = state.counters[0].block_size, state.blocks[block].parent
    above = state.prefix_hashes[parent] if parent >= 0 else np.int64(state.roots[-1 - parent, 3])
    mixed = hash_tokens(np.uint64(above), state.contents, block * size, size)
    prefix_hash = np.int64((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1))  # 0 is an empty place of the ring
    state.prefix_hashes[block] = prefix_hash
    return prefix_hash


@inlined
def _head_of(state: State, prefix_hash: int) -> int:
    return (prefix_hash >> 8) & (len(state.ghost_heads) - 1)


@inlined
def _unlink(state: State, place: int) -> None:
    """Take the ghost at `place` of the ring out of the hash table."""
    ghost = state.ghosts[place]
    head = _head_of(state, ghost.prefix_hash)
    link = state.ghost_heads[head] - 1
    if link == place:
        state.ghost_heads[head] = ghost.next
    else:
        while state.ghosts[link].next != place + 1:
            link = state.ghosts[link].next - 1
        state.ghosts[link].next = ghost.next
    ghost.prefix_hash = 0


@inlined
def remember(state: State, block: int) -> None:
    """Note that `block` is evicted; the oldest ghost of a full ring goes."""
    place = state.memory[0].evicted % len(state.ghosts)
    state.memory[0].evicted += 1
    ghost = state.ghosts[place]
    if ghost.prefix_hash != 0:
        _unlink(state, place)
    ghost.prefix_hash = state.prefix_hashes[block]
    head = _head_of(state, ghost.prefix_hash)
    ghost.next = state.ghost_heads[head]
    state.ghost_heads[head] = place + 1


@inlined
def recall(state: State, prefix_hash: int) -> bool:
    """Tell whether this block was evicted lately, and forget its ghost."""
    link = state.ghost_heads[_head_of(state, prefix_hash)]
    while link != 0:
        if state.ghosts[link - 1].prefix_hash == prefix_hash:
            _unlink(state, link - 1)
            return True
        link = state.ghosts[link - 1].next
    return False
