"""The built-in strategies' scores of a block as one compiled function, so that no loop leaves compiled code for them.

Each rule is the twin of a ``score_blocks`` in `strategies`; the contract tests hold them against each other. A block
is scored when it becomes reclaimable. The rule ``CUSTOM`` stands for a strategy in NumPy: it scores whole batches
before the compiled call, and the score is kept with the block.
"""

from __future__ import annotations

import numpy as np

from pagedkv.control.ghosts import HAND, INFLATION, LAP, TICKS
from pagedkv.control.reuse import expiry_of
from pagedkv.control.state import State
from pagedkv.jit import compiled

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
