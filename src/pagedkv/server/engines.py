"""What the server asks of an engine: of one in its own process, or of many behind one object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pagedkv.engine import EngineSizes, EngineSnapshot, EngineStats, RequestOutput, SamplingParams, Structured
from pagedkv.engine.snapshot import PinnedPrefix
from pagedkv.typing import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ServedEngine(Protocol):
    """What a server can serve; the calls are those of :class:`pagedkv.engine.AsyncEngine`, which is one."""

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""

    @property
    def sizes(self) -> EngineSizes:
        """Of the pool, the model and the batch."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of the model."""

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session_id: str | None = None,
        tenant: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Stream the outputs of a request; it is aborted when the iterator is closed."""

    def compile(self, structured: Structured) -> None:
        """Make ready what texts are to follow."""

    def stats(self) -> EngineStats:
        """Return the counters; never waits."""

    def snapshot(self) -> EngineSnapshot:
        """Return pool, requests and counters; may wait."""

    async def clear_prefix_cache(self) -> int:
        """Forget all prefixes; returns how many blocks became free."""

    async def pin(self, token_ids: Sequence[int], *, cache_salt: str = "") -> PinnedPrefix:
        """Keep the leading blocks of a text that are in the pool."""

    async def unpin(self, handle: int) -> None:
        """Take a pin back."""

    def block_records(self, block_ids: Ints) -> npt.NDArray[np.void]:
        """Return copies of the records of some blocks; never waits."""

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop."""


@dataclass(frozen=True, slots=True)
class ReplicaCount:
    """How many replicas there are.

    Attributes
    ----------
    ready : int
        That take requests.
    wanted : int
        That there should be at least.
    failovers : int
        Requests that went on at another replica, as theirs had gone.
    """

    ready: int
    wanted: int
    failovers: int = 0


@runtime_checkable
class ReplicatedEngine(Protocol):
    """Many engines behind one object."""

    def replica_stats(self) -> Mapping[str, EngineStats]:
        """Return the counters of each replica that is ready; never waits."""

    def replica_count(self) -> ReplicaCount:
        """Return how many replicas there are; never waits."""

    async def watch(self) -> None:
        """Keep the counters fresh, for as long as this is awaited."""
