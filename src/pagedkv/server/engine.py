"""The engine protocol: the one object through which the server reaches an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from pagedkv.engine import EngineSizes, EngineSnapshot, EngineStats, RequestOutput, SamplingParams


class Engine(Protocol):
    """An engine that runs beside the event loop; :class:`pagedkv.engine.AsyncEngine` is the one that serves.

    Attributes
    ----------
    sizes : EngineSizes
    tokenizer : optional
        Of transformers; None if there is none.
    is_alive : bool
        Whether requests are taken.
    """

    @property
    def sizes(self) -> EngineSizes:
        """Of the pool, the model and the batch."""

    @property
    def tokenizer(self) -> Any:
        """Text to tokens and back."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        session_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Stream cumulative outputs; closing the stream aborts the request."""

    def stats(self) -> EngineStats:
        """Return the counters; never waits."""

    def snapshot(self) -> EngineSnapshot:
        """Return pool, requests and counters between two steps; waits for the present step."""

    def hottest_prefixes(self, limit: int = ..., max_tokens: int = 0) -> tuple[Any, ...]:
        """Return the prefixes whose reuse saved the most, with their first tokens."""

    def block_records(self, block_ids: Any) -> Any:
        """Return copies of the records of some blocks."""

    def subscribe(self, callback: Callable[[Any], None]) -> Callable[[], None]:
        """Call back with every event of the cache; returns what ends it."""

    async def clear_prefix_cache(self) -> int:
        """Forget all prefixes; returns how many blocks became free."""

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop, once requests under way have ended or time is up."""
