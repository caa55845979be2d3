"""What one replay found: one cell of the table strategies × capacities."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pagedkv.sim.trace import Trace

__all__ = ["ReplayResult"]


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """The outcome of one replay.

    Attributes
    ----------
    strategy : str
        The name as it was asked for, ``"lru"`` or ``"optimal"`` say.
    blocks : int
        Capacity.
    requests, accesses : int
        Requests, and blocks that they touched.
    hit_blocks : int
        Blocks found: the longest cached prefix of every request.
    tokens, hit_tokens : int
        Input tokens, and those of them that lay in blocks found.
    reclaimed : int
        Cached blocks that were given up.
    seconds : float
        Of the replay alone, on one core.
    hits : int32 [requests]
        Blocks found by every request; empty where the method does not give them.
    preempted, refused : int
        Timed replay: running requests that had to give their blocks back, and requests larger than the pool.
    """

    strategy: str
    blocks: int
    requests: int
    accesses: int
    hit_blocks: int
    tokens: int
    hit_tokens: int
    reclaimed: int
    seconds: float
    hits: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    preempted: int = 0
    refused: int = 0

    @classmethod
    def of(
        cls, trace: Trace, strategy: str, blocks: int, hits: npt.NDArray[np.int32], *, reclaimed: int, seconds: float
    ) -> ReplayResult:
        """Return the outcome in which request i of `trace` found ``hits[i]`` blocks."""
        return cls(
            strategy=strategy,
            blocks=blocks,
            requests=trace.num_requests,
            accesses=trace.num_accesses,
            hit_blocks=int(hits.sum(dtype=np.int64)),
            tokens=trace.num_tokens,
            hit_tokens=trace.hit_tokens(hits),
            reclaimed=reclaimed,
            seconds=seconds,
            hits=hits,
        )

    @property
    def hit_ratio(self) -> float:
        """Blocks found over blocks touched; 0.0 for a trace without blocks."""
        return self.hit_blocks / self.accesses if self.accesses else 0.0

    @property
    def token_hit_ratio(self) -> float:
        """Input tokens found over input tokens; 0.0 for a trace without tokens."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0
