"""What the rules with a memory do when a block is stored and when it is about to be given up.

S3-FIFO: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1. SIEVE: Zhang et al.,
"SIEVE is simpler than LRU", NSDI 2024, algorithm 1. GDSF: Cherkasova, HPL-98-69R1, 1998. All three are held to leaves
of the prefix trie here: the first leaf in their order goes.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import CLOCK, HAND, HEADER, INFLATION, LAP, TICKS, note_path, recall, remember
from pagedkv.control.learner import expiry_of, note_give_up, note_store
from pagedkv.control.state import MAIN, PROBATION, State
from pagedkv.jit import compiled

# The built-in strategies' scores of a block as one compiled function, so that no loop leaves compiled code for them.
#
# Each rule is the twin of a ``score_blocks`` in `strategies`; the contract tests hold them against each other. A
# block is scored when it becomes reclaimable. The rule ``CUSTOM`` stands for a strategy in NumPy: it scores whole
# batches before the compiled call, and the score is kept with the block.

CUSTOM, RECENCY, FREQUENCY, DEPTH, PRIORITY, AGE, EXPIRY, S3_FIFO, SIEVE_RULE, COST, ADAPTIVE = range(11)

# Scores with a tie-break by recency: the ticks take the low 40 bits (a million accesses a second for 12 days).
RECENCY_BITS = 40
MOMENTS = (1 << RECENCY_BITS) - 1

# GDSF: a block deep in a prefix costs more to compute again, as attention reads all that precedes it. At this depth
# (in blocks) it costs twice as much as the first.
COST_OF_FIRST = 256


@compiled
def score_by_rule(state: State, block: int) -> int:
    """Return how much `block` is worth keeping by the rule in force."""
    record = state.blocks[block]
    rule = state.counters[0].rule
    if rule == RECENCY:
        return record.last_access
    if rule == FREQUENCY:
        return (np.int64(record.access_count) << RECENCY_BITS) + record.last_access
    if rule == DEPTH:
        return (np.int64(-record.depth) << RECENCY_BITS) + record.last_access
    if rule == PRIORITY:
        return (np.int64(record.priority) << RECENCY_BITS) + record.last_access
    if rule == EXPIRY:
        return record.last_access + state.policy[TICKS] * record.priority
    if rule == COST:
        return state.policy[INFLATION] + record.access_count * (COST_OF_FIRST + np.int64(record.depth))
    if rule == AGE:
        return record.created
    if rule == SIEVE_RULE:
        moment = record.score & MOMENTS
        lap = state.policy[LAP] + (moment <= state.policy[HAND])
        return (lap << RECENCY_BITS) + moment
    if rule == ADAPTIVE:
        return expiry_of(state, block)
    return record.score


# S3-FIFO: a tenth of the cache is for newcomers, two hits prove a block, three are the most that count.
PROBATION_SHARE = 10
PROOF = 2
MOST_HITS = 3


@compiled
def _next_moment(state: State) -> int:
    state.policy[CLOCK] += 1
    return state.policy[CLOCK]


@compiled
def queue_at_store(state: State, block: int, parent: int) -> int:
    """Return the queue of a block that becomes findable under `parent`, and let the rule note it."""
    rule = state.counters[0].rule
    if rule == S3_FIFO:
        state.blocks[block].score = _next_moment(state)
        return PROBATION if recall(state, note_path(state, block, parent)) < 0 else MAIN
    if rule == SIEVE_RULE:
        state.blocks[block].score = _next_moment(state)
    elif rule == ADAPTIVE:
        note_store(state, block, note_path(state, block, parent))
    elif rule == CUSTOM and len(state.policy) > HEADER:
        note_path(state, block, parent)
    return MAIN


@compiled
def prefers_probation(state: State) -> bool:
    """Tell whether a newcomer is to be given up rather than a proven block."""
    counters = state.counters[0]
    return counters.probation >= max(1, counters.num_blocks // PROBATION_SHARE)


@compiled
def gets_second_chance(state: State, block: int) -> tuple[bool, int, int]:
    """Decide whether a block that comes first is kept once more, with which score and in which queue."""
    rule, record = state.counters[0].rule, state.blocks[block]
    if rule == S3_FIFO:
        if record.indexed == 1 + PROBATION and record.recent_hits >= PROOF:
            record.recent_hits = 0
            return True, _next_moment(state), MAIN
        if record.indexed == 1 + MAIN and record.recent_hits > 0:
            record.recent_hits = min(record.recent_hits, MOST_HITS) - 1
            return True, _next_moment(state), MAIN
    if rule == SIEVE_RULE:
        state.policy[LAP] = record.score >> RECENCY_BITS
        state.policy[HAND] = record.score & MOMENTS
        if record.recent_hits > 0:
            record.recent_hits = 0
            return True, record.score + (np.int64(1) << RECENCY_BITS), MAIN
    return False, 0, MAIN


@compiled
def start_over(state: State, next_block: int) -> None:
    """SIEVE: when the hand has passed the newest leaf, it goes back to the oldest."""
    if state.counters[0].rule == SIEVE_RULE:
        lap = state.policy[LAP]
        if next_block < 0 or state.blocks[next_block].score >> RECENCY_BITS > lap:
            state.policy[LAP] = lap + 1
            state.policy[HAND] = 0


@compiled
def let_go(state: State, block: int) -> None:
    """Let the rule know that `block` is given up."""
    rule = state.counters[0].rule
    if rule == S3_FIFO:
        if state.blocks[block].indexed == 1 + PROBATION:
            remember(state, block)
    elif rule == ADAPTIVE:
        note_give_up(state, block)
    elif rule == COST:
        state.policy[INFLATION] = state.blocks[block].score
