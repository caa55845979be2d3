"""The engine's counters, frozen."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An immutable snapshot of the counters since the engine was made.

    Attributes
    ----------
    num_running, num_waiting : int
        Requests that hold blocks now, and those that hold none.
    num_preemptions : int
        How often a running text lost its blocks to another.
    finished_requests : int
        Requests that came to their end, aborted ones not counted.
    aborted_requests : int
    prompt_tokens : int
        Tokens of the prompts of all requests that were let in.
    generation_tokens : int
        Tokens generated.
    prefix_queries, prefix_hits : int
        Prompt tokens looked up in the cache when a request was first let in, and those found.
    draft_tokens, accepted_tokens : int
        Tokens guessed by prompt lookup, and those that turned out right.
    blocks_total, blocks_used, blocks_cached, blocks_free : int
        `blocks_free` counts what an allocation can have: cached blocks too.
    block_size : int
    evictions : int
        Sequences evicted by the cache itself.
    reclaimed : int
        Cached blocks given up for a new use.
    steps : int
        Forward passes.
    busy_seconds : float
        Wall time of all steps.
    forward_seconds, sampling_seconds : float
        Of these in the model, and in choosing tokens.
    bookkeeping_seconds : float
        The rest: scheduling, the cache's books, stops, text and outputs.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    finished_requests: int = 0
    aborted_requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    block_size: int = 0
    evictions: int = 0
    reclaimed: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0

    @property
    def bookkeeping_seconds(self) -> float:
        """Seconds of all steps outside of the model and the sampler."""
        return self.busy_seconds - self.forward_seconds - self.sampling_seconds
