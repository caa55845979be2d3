"""Which compiled rule serves a strategy, and what it needs to remember."""

from __future__ import annotations

from pagedkv.control import rules
from pagedkv.control.adaptive import Adaptive
from pagedkv.control.ghosts import TICKS, with_policy
from pagedkv.control.learning import with_learner
from pagedkv.control.policies import PROBATION_SHARE
from pagedkv.control.protocol import EvictionStrategy, hooks_of
from pagedkv.control.queue_strategies import GDSF, S3FIFO, SIEVE, TTL
from pagedkv.control.state import State
from pagedkv.control.strategies import FIFO, LFU, LRU, LongestFirst, Priority, StreamingLLM

_RULES: dict[type, int] = {
    LRU: rules.RECENCY,
    StreamingLLM: rules.RECENCY,
    LFU: rules.FREQUENCY,
    LongestFirst: rules.DEPTH,
    Priority: rules.PRIORITY,
    FIFO: rules.AGE,
    S3FIFO: rules.S3_FIFO,
    SIEVE: rules.SIEVE_RULE,
    GDSF: rules.COST,
    TTL: rules.EXPIRY,
    Adaptive: rules.ADAPTIVE,
}


def with_rule(state: State, strategy: EvictionStrategy) -> State:
    """Put the compiled rule of `strategy` in force; a user's own (subclasses of ours included) scores in NumPy."""
    rule = _RULES.get(type(strategy), rules.CUSTOM)
    state.counters[0].rule = rule
    num_blocks = len(state.blocks)
    if rule == rules.S3_FIFO:
        return with_policy(state, paths=True, ghosts=max(1, num_blocks - num_blocks // PROBATION_SHARE))
    if rule == rules.ADAPTIVE:
        return with_learner(state)
    if rule in (rules.SIEVE_RULE, rules.COST):
        return with_policy(state)
    if isinstance(strategy, TTL):
        state = with_policy(state)
        state.policy[TICKS] = strategy.ticks
        return state
    return with_policy(state, paths=True) if hooks_of(strategy) else state
