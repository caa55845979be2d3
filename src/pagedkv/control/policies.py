"""What the rules with a memory do when a block is stored and when it is about to be given up.

S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1. SIEVE: Zhang et al.,
"SIEVE is simpler than LRU", NSDI 2024, algorithm 1. GDSF: Cherkasova, HPL-98-69R1, 1998. All three are held to leaves
of the prefix trie here: the first leaf in their order goes.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import CLOCK, HAND, INFLATION, LAP, TICKS, note_path, recall, remember
from pagedkv.control.learner import expiry_of, note_give_up, note_hit, note_release, note_store
from pagedkv.control.reclaim import end_of_request, rescore
from pagedkv.control.state import MAIN, PROBATION, PolicyKernels, State
from pagedkv.jit import inlined, pointed

# Scores with a tie-break by recency: the ticks take the low 40 bits (a million accesses a second for 12 days).
RECENCY_BITS = 40
MOMENTS = (1 << RECENCY_BITS) - 1

# GDSF: a block deep in a prefix costs more to compute again, as attention reads all that precedes it. At this depth
# (in blocks) it costs twice as much as the first.
COST_OF_FIRST = 256

# S3-FIFO: two hits prove a block, three are the most that count.
PROOF = 2
MOST_HITS = 3


# A strategy in NumPy: it scores whole batches before the compiled call, and the score is kept with the block.


@pointed
def kept_score(state: State, block: int) -> int:
    """Return the score that the strategy gave `block` before."""
    return state.blocks[block].score


@pointed
def keep_path(state: State, block: int) -> int:
    """Keep the path of a block for the strategy's hooks to see."""
    note_path(state, block, state.blocks[block].parent)
    return MAIN


# Scores of a record alone. Each is the twin of a ``score_blocks`` in `strategies`; the contract tests hold them
# against each other.


@pointed
def score_by_frequency(state: State, block: int) -> int:
    """LFU."""
    record = state.blocks[block]
    return (np.int64(record.access_count) << RECENCY_BITS) + record.last_access


@pointed
def score_by_depth(state: State, block: int) -> int:
    """LongestFirst."""
    record = state.blocks[block]
    return (np.int64(-record.depth) << RECENCY_BITS) + record.last_access


@pointed
def score_by_priority(state: State, block: int) -> int:
    """Priority."""
    record = state.blocks[block]
    return (np.int64(record.priority) << RECENCY_BITS) + record.last_access


@pointed
def score_by_age(state: State, block: int) -> int:
    """FIFO."""
    return state.blocks[block].created


@pointed
def score_by_expiry(state: State, block: int) -> int:
    """TTL."""
    record = state.blocks[block]
    return record.last_access + state.policy[TICKS] * record.priority


# GDSF: Cherkasova, HPL-98-69R1, 1998.


@pointed
def score_by_cost(state: State, block: int) -> int:
    """Uses times cost, above the price of what was evicted last."""
    record = state.blocks[block]
    return state.policy[INFLATION] + record.access_count * (COST_OF_FIRST + np.int64(record.depth))


@pointed
def raise_price(state: State, block: int) -> int:
    """Note what `block` was worth, which is evicted."""
    state.policy[INFLATION] = state.blocks[block].score
    return 0


# The order of S3-FIFO and SIEVE: moments at which blocks were stored.


@inlined
def _next_moment(state: State) -> int:
    state.policy[CLOCK] += 1
    return state.policy[CLOCK]


# S3-FIFO.


@pointed
def s3fifo_on_store(state: State, block: int) -> int:
    """Let a newcomer wait on probation, unless it was evicted from there lately."""
    record = state.blocks[block]
    record.score = _next_moment(state)
    return PROBATION if recall(state, note_path(state, block, record.parent)) < 0 else MAIN


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


# SIEVE. A score is the lap of the hand in which it reaches the block, and the moment at which that was stored.


@pointed
def sieve_score(state: State, block: int) -> int:
    """Return when the hand reaches `block`: in this lap if it lies before it, else in the next."""
    moment = state.blocks[block].score & MOMENTS
    lap = state.policy[LAP] + (moment <= state.policy[HAND])
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
    state.policy[LAP] = record.score >> RECENCY_BITS
    state.policy[HAND] = record.score & MOMENTS
    if record.recent_hits == 0:
        return 0
    record.recent_hits = 0
    rescore(state, block, record.score + (np.int64(1) << RECENCY_BITS), MAIN)
    return 1


@pointed
def sieve_after_evict(state: State, next_block: int) -> int:
    """When the hand has passed the newest leaf, it goes back to the oldest."""
    lap = state.policy[LAP]
    if next_block < 0 or state.blocks[next_block].score >> RECENCY_BITS > lap:
        state.policy[LAP] = lap + 1
        state.policy[HAND] = 0
    return 0


# The adaptive strategy.


@pointed
def adaptive_score(state: State, block: int) -> int:
    """Return when `block` expires."""
    return expiry_of(state, block)


@pointed
def adaptive_on_store(state: State, block: int) -> int:
    """Begin a note on `block`."""
    note_store(state, block, note_path(state, block, state.blocks[block].parent))
    return MAIN


@pointed
def adaptive_on_hit(state: State, block: int) -> int:
    """Note a reuse."""
    note_hit(state, block)
    return 0


@pointed
def adaptive_on_release(state: State, block: int) -> int:
    """Note that `block` waits for a reuse."""
    note_release(state, block)
    return 0


@pointed
def adaptive_on_evict(state: State, block: int) -> int:
    """Remember `block` as a ghost."""
    note_give_up(state, block)
    return 0


RECENCY = PolicyKernels()
FREQUENCY = PolicyKernels(score_by_frequency)
DEPTH = PolicyKernels(score_by_depth)
PRIORITY = PolicyKernels(score_by_priority)
AGE = PolicyKernels(score_by_age)
EXPIRY = PolicyKernels(score_by_expiry)
COST = PolicyKernels(score_by_cost, on_evict=raise_price)
S3_FIFO = PolicyKernels(
    kept_score, on_store=s3fifo_on_store, second_chance=s3fifo_second_chance, on_evict=s3fifo_on_evict
)
SIEVE = PolicyKernels(
    sieve_score, on_store=sieve_on_store, second_chance=sieve_second_chance, after_evict=sieve_after_evict
)
ADAPTIVE = PolicyKernels(
    adaptive_score,
    on_store=adaptive_on_store,
    on_hit=adaptive_on_hit,
    on_release=adaptive_on_release,
    on_evict=adaptive_on_evict,
    on_request_end=end_of_request,
)
IN_NUMPY = PolicyKernels(kept_score)
IN_NUMPY_WITH_HOOKS = PolicyKernels(kept_score, on_store=keep_path)
