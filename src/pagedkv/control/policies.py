"""Eviction policies of cached blocks, compiled: what each built-in strategy does when something happens to a block.

A policy is a record of kernels (`PolicyKernels`), chosen once, when a cache is made. The memory of a policy lies with
the cache, so one strategy object may serve many caches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control import learner
from pagedkv.control.ghosts import note_prefix_hash, recall, remember
from pagedkv.control.reclaim import rank_leaves, rescore
from pagedkv.control.state import MAIN, PROBATION, PolicyKernels, State
from pagedkv.jit import formula, inlined, pointed

# Formulas: what a block is worth by its record. NumPy computes them for the columns of a view as well.

# Scores with a tie-break by recency: the ticks take the low 40 bits (a million accesses a second for 12 days).
RECENCY_BITS = 40
MOMENTS = (1 << RECENCY_BITS) - 1

# A block deep in a prefix costs more to compute again, as attention reads all that precedes it. At this depth (in
# blocks) it costs twice as much as the first.
COST_OF_FIRST = 256


@formula
def by_frequency(block: Any) -> Any:
    """Uses, then recency."""
    return (np.int64(block.access_count) << RECENCY_BITS) + block.last_access


@formula
def by_depth(block: Any) -> Any:
    """The deepest first, then recency."""
    return (np.int64(-block.depth) << RECENCY_BITS) + block.last_access


@formula
def by_priority(block: Any) -> Any:
    """Priority, then recency."""
    return (np.int64(block.priority) << RECENCY_BITS) + block.last_access


@formula
def by_expiry(block: Any, ticks: int) -> Any:
    """When a block expires that each step of priority keeps for so many ticks."""
    return block.last_access + ticks * np.int64(block.priority)


@formula
def by_cost(block: Any) -> Any:
    """Uses times the cost of computing the block again."""
    return block.access_count * (COST_OF_FIRST + np.int64(block.depth))


# Least recently used, the default, needs no kernel: see `PolicyKernels`.

LRU = PolicyKernels()


# Formulas alone.


@pointed
def lfu_score(state: State, block: int) -> int:
    """Score by frequency."""
    return by_frequency(state.blocks[block])


LFU = PolicyKernels(lfu_score)


@pointed
def longest_first_score(state: State, block: int) -> int:
    """Score by depth."""
    return by_depth(state.blocks[block])


LONGEST_FIRST = PolicyKernels(longest_first_score)


@pointed
def priority_score(state: State, block: int) -> int:
    """Score by priority."""
    return by_priority(state.blocks[block])


PRIORITY = PolicyKernels(priority_score)


@pointed
def ttl_score(state: State, block: int) -> int:
    """Score by expiry."""
    return by_expiry(state.blocks[block], state.memory[0].ticks)


TTL = PolicyKernels(ttl_score)


@pointed
def fifo_score(state: State, block: int) -> int:
    """Score by the tick at which the block was filled."""
    return state.blocks[block].created


FIFO = PolicyKernels(fifo_score)


# GDSF: Cherkasova, HPL-98-69R1, 1998.


@pointed
def gdsf_score(state: State, block: int) -> int:
    """Score by cost, above the price of what was evicted last."""
    return state.memory[0].inflation + by_cost(state.blocks[block])


@pointed
def gdsf_on_evict(state: State, block: int) -> int:
    """Raise the price to what `block` was worth."""
    state.memory[0].inflation = state.blocks[block].score
    return 0


GDSF = PolicyKernels(gdsf_score, on_evict=gdsf_on_evict)


# A strategy in NumPy: it scores whole batches before the compiled call, and the score is kept with the block.


@pointed
def kept_score(state: State, block: int) -> int:
    """Return the score that `block` has."""
    return state.blocks[block].score


@pointed
def keep_prefix_hash(state: State, block: int) -> int:
    """Keep the prefix hash of a block for the strategy's hooks to see."""
    note_prefix_hash(state, block)
    return MAIN


IN_NUMPY = PolicyKernels(kept_score)
IN_NUMPY_WITH_HOOKS = PolicyKernels(kept_score, on_store=keep_prefix_hash)


# S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1, over the leaves of
# the prefix trie. Scores are the moments at which blocks were stored. Two hits prove a block, three are the most that
# count.

PROOF = 2
MOST_HITS = 3


@inlined
def _next_moment(state: State) -> int:
    state.memory[0].clock += 1
    return state.memory[0].clock


@pointed
def s3fifo_on_store(state: State, block: int) -> int:
    """Let a newcomer wait on probation, unless it was evicted from there lately."""
    record = state.blocks[block]
    record.score = _next_moment(state)
    return MAIN if recall(state, note_prefix_hash(state, block)) else PROBATION


@pointed
def s3fifo_second_chance(state: State, block: int) -> int:
    """Promote a newcomer that proved itself; let a proven block that was hit since begin anew."""
    record = state.blocks[block]
    if record.indexed == 1 + PROBATION and record.recent_hits >= PROOF:
        record.recent_hits = 0
    elif record.indexed == 1 + MAIN and record.recent_hits > 0:
        record.recent_hits = min(record.recent_hits, MOST_HITS) - 1
    else:
        return 0
    rescore(state, block, _next_moment(state), MAIN)
    return 1


@pointed
def s3fifo_on_evict(state: State, block: int) -> int:
    """Remember a newcomer that is evicted."""
    if state.blocks[block].indexed == 1 + PROBATION:
        remember(state, block)
    return 0


S3FIFO = PolicyKernels(
    kept_score, on_store=s3fifo_on_store, second_chance=s3fifo_second_chance, on_evict=s3fifo_on_evict
)


# SIEVE: Zhang et al., "SIEVE is simpler than LRU", NSDI 2024, algorithm 1, over the leaves of the prefix trie. A score
# is the lap of the hand in which it reaches the block, and the moment at which that was stored.


@pointed
def sieve_score(state: State, block: int) -> int:
    """Return when the hand reaches `block`: in this lap if it lies before it, else in the next."""
    moment = state.blocks[block].score & MOMENTS
    lap = state.memory[0].lap + (moment <= state.memory[0].hand)
    return (lap << RECENCY_BITS) + moment


@pointed
def sieve_on_store(state: State, block: int) -> int:
    """Store the newest block behind all others."""
    state.blocks[block].score = _next_moment(state)
    return MAIN


@pointed
def sieve_second_chance(state: State, block: int) -> int:
    """Move the hand to `block`, and past it if it was hit."""
    record = state.blocks[block]
    state.memory[0].lap = record.score >> RECENCY_BITS
    state.memory[0].hand = record.score & MOMENTS
    if record.recent_hits == 0:
        return 0
    record.recent_hits = 0
    rescore(state, block, record.score + (np.int64(1) << RECENCY_BITS), MAIN)
    return 1


@pointed
def sieve_after_evict(state: State, next_block: int) -> int:
    """When the hand has passed the newest leaf, it goes back to the oldest."""
    lap = state.memory[0].lap
    if next_block < 0 or state.blocks[next_block].score >> RECENCY_BITS > lap:
        state.memory[0].lap = lap + 1
        state.memory[0].hand = 0
    return 0


SIEVE = PolicyKernels(
    sieve_score, on_store=sieve_on_store, second_chance=sieve_second_chance, after_evict=sieve_after_evict
)


# The adaptive strategy: `learner` has its other kernels.


@pointed
def adaptive_on_request_end(state: State, _: int) -> int:
    """Let it learn when it is time; then all cached leaves are ranked anew."""
    if learner.end_request(state):
        rank_leaves(state)
    return 0


ADAPTIVE = PolicyKernels(
    learner.adaptive_score,
    on_store=learner.note_store,
    on_hit=learner.note_hit,
    on_release=learner.note_release,
    on_evict=learner.note_evict,
    on_request_end=adaptive_on_request_end,
)
