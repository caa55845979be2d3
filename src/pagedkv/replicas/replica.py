"""One replica of a fleet: an engine, its KV events, and the calls that the door makes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import cast

from pagedkv.engine import AsyncEngine, EngineSnapshot, EngineStats, RequestOutput
from pagedkv.engine.snapshot import PinnedPrefix
from pagedkv.errors import EngineDead, OutOfMemory, PagedKvError
from pagedkv.replicas.messages import Asked, Described, Told, news_of
from pagedkv.server.config import ServerConfig
from pagedkv.server.events import EventPublisher, publishing


class Replica:
    """Serves one engine to the door.

    Parameters
    ----------
    name : str
    engine : AsyncEngine
    events_endpoint : str
        Where its KV events are published; ``tcp://127.0.0.1:*`` takes a free port.
    """

    def __init__(self, name: str, engine: AsyncEngine, events_endpoint: str) -> None:
        self.name, self._engine = name, engine
        self._config = ServerConfig(events_endpoint=events_endpoint)
        self._running = AsyncExitStack()
        self._publisher: EventPublisher | None = None

    async def start(self) -> None:
        """Publish the KV events from here on."""
        self._publisher = await self._running.enter_async_context(publishing(self._engine, self._config))

    @property
    def addresses(self) -> tuple[str, str]:
        """Where its KV events are published, and where it is asked for those of before."""
        return ("", "") if self._publisher is None else (self._publisher.address, self._publisher.replay_address)

    async def generate(self, asked: Asked) -> AsyncGenerator[Told, None]:
        """Run a request and yield what is new in its output; an error is the last that is told.

        When the generator is closed the request is aborted.
        """
        outputs = cast(
            "AsyncGenerator[RequestOutput, None]",
            self._engine.generate(
                asked.token_ids.tolist(),
                asked.params,
                request_id=asked.request_id,
                priority=asked.priority,
                cache_salt=asked.cache_salt,
                session_id=asked.session_id,
                tenant=asked.tenant,
            ),
        )
        before: RequestOutput | None = None
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield news_of(output, before)
                    before = output
        except PagedKvError as error:
            yield Told(error=error)

    def check_health(self) -> None:
        """Raise `EngineDead` if the engine takes no more requests."""
        if not self._engine.is_alive:
            raise EngineDead("it takes no more requests") from self._engine.error

    def describe(self) -> Described:
        """Return what it is."""
        media = tuple(each.medium for each in self._engine.stats().tiers)
        ends = tuple(sorted(self._engine.llm.core.eos_token_ids))
        return Described(replica=self.name, sizes=self._engine.sizes, media=media, end_ids=ends)

    def stats(self) -> EngineStats:
        """Return the counters of its engine."""
        return self._engine.stats()

    def snapshot(self) -> EngineSnapshot:
        """Return pool, requests and counters between two steps."""
        return self._engine.snapshot()

    async def clear_prefix_cache(self) -> int:
        """Forget all prefixes; returns how many blocks became free."""
        return await self._engine.clear_prefix_cache()

    async def pin(self, token_ids: Sequence[int], cache_salt: str) -> PinnedPrefix | None:
        """Keep the leading blocks of a text that are in its pool; None where there is no room."""
        try:
            return await self._engine.pin(token_ids, cache_salt=cache_salt)
        except OutOfMemory:
            return None

    async def unpin(self, handles: Mapping[str, int]) -> None:
        """Take a pin back, by the handle that stands under its name."""
        if self.name in handles:
            await self._engine.unpin(handles[self.name])

    async def stop(self) -> None:
        """Abort what still runs, close the tiers, publish the last events."""
        await self._engine.shutdown(drain=False)
        await self._running.aclose()
