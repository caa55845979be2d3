"""The engine of a fleet's door: it has the calls of one engine, and each request runs at a replica."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import numpy.typing as npt

from pagedkv.engine import (
    CompletionOutput,
    EngineSizes,
    EngineSnapshot,
    EngineStats,
    RequestOutput,
    SamplingParams,
    Structured,
)
from pagedkv.engine.snapshot import PinnedPrefix
from pagedkv.engine.token_grammar import Grammars
from pagedkv.errors import EngineDead, InvalidOperation, ReplicaLost
from pagedkv.replicas.messages import Asked, Described, Told, output_of, with_seed
from pagedkv.replicas.totals import total_sizes, total_snapshot, total_stats
from pagedkv.server.engines import ReplicaCount
from pagedkv.typing import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTEMPTS = 4
"""Replicas that a request is given to, one after the other, if they are lost."""
SECONDS_BETWEEN_LOOKS = 1.0
_RECORD = np.dtype([("indexed", "u1"), ("created", "i8"), ("access_count", "i8"), ("last_access", "i8")])


class Link(Protocol):
    """How the door reaches its replicas."""

    @property
    def ready(self) -> tuple[str, ...]:
        """The replicas that take requests."""

    @property
    def wanted(self) -> int:
        """How many there should be at least."""

    @property
    def most(self) -> int:
        """How many there may be."""

    def generate(self, asked: Asked, avoid: Collection[str]) -> AsyncGenerator[tuple[str, Told], None]:
        """Give a request to one of the replicas and yield its name with what it tells.

        Raises `ReplicaLost` when it is gone. When the generator is closed the request is cancelled there.
        """

    async def everywhere(self, call: str, *arguments: object) -> dict[str, object]:
        """Call all replicas and return what each answers; one that is lost meanwhile is left out."""

    async def close(self) -> None:
        """End the replicas."""


class FleetEngine:
    """Serves as one engine what many replicas do.

    A request that has lost its replica begins anew at another one. That one writes the same text, as the seed of every
    request is drawn here, and a reader gets what comes after the tokens that it has; should they differ, it gets an
    error and never a wrong text.

    Parameters
    ----------
    link : Link
    tokenizer : transformers tokenizer, or None
    described : Described
        One of the replicas, which are alike.
    """

    def __init__(self, link: Link, tokenizer: PreTrainedTokenizerBase | None, described: Described) -> None:
        self._link, self._tokenizer = link, tokenizer
        self.media = described.media
        self._sizes = total_sizes(described.sizes, link.most)
        self._grammars = Grammars(tokenizer, described.sizes.vocab_size, described.end_ids)
        self._stats: dict[str, EngineStats] = {}
        self._pins: dict[int, dict[str, int]] = {}
        self._numbers = itertools.count()
        self._running = self._failovers = 0
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def of(cls, link: Link, tokenizer: PreTrainedTokenizerBase | None) -> FleetEngine:
        """Ask the replicas what they are."""
        described = await link.everywhere("describe")
        return cls(link, tokenizer, cast(Described, next(iter(described.values()))))

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests; they wait while no replica is ready."""
        return self._closing is None

    @property
    def sizes(self) -> EngineSizes:
        """Of all replicas together, where as many run as may."""
        return self._sizes

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of the model."""
        return self._tokenizer

    async def generate(
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
        """Stream the outputs of one request, as :meth:`pagedkv.engine.AsyncEngine.generate` does.

        Raises
        ------
        InvalidOperation, RequestRefused
            As the replica says.
        ReplicaLost
            If no replica could bring it to its end.
        EngineDead
            If this was shut down.
        """
        self._require_alive()
        number = next(self._numbers)
        asked = Asked(
            request_id=f"fleet-{number}" if request_id is None else request_id,
            token_ids=np.array(self._encode(prompt), np.int64),
            params=with_seed(SamplingParams() if params is None else params),
            priority=priority,
            cache_salt=cache_salt,
            session_id=session_id,
            tenant=tenant,
        )
        shown: RequestOutput | None = None
        owed: RequestOutput | None = None  # what a reader has of replicas that are lost
        avoid: list[str] = []
        arrived = time.monotonic()
        self._running += 1
        try:
            while shown is None or not shown.finished:
                try:
                    async with aclosing(self._outputs(asked, arrived, avoid)) as outputs:
                        async for output in outputs:
                            if _goes_on(output, owed):
                                shown = output
                                yield output
                except _AnotherText:
                    raise ReplicaLost(avoid[-1], "another one wrote another text") from None
                except ReplicaLost as lost:
                    self._require_alive()
                    if len(avoid) + 1 == ATTEMPTS or lost.replica in avoid:
                        raise
                    avoid.append(lost.replica)
                    owed = None if asked.params.beam_width is not None else shown  # beams take back what they wrote
                    self._failovers += 1
        finally:
            self._running -= 1

    async def _outputs(
        self, asked: Asked, arrived: float, avoid: Collection[str]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the outputs of a request at one replica; `ReplicaLost` if they do not come to their end."""
        prompt, sent = tuple(asked.token_ids.tolist()), time.monotonic()
        output, name = None, ""
        async with aclosing(self._link.generate(asked, avoid)) as news:
            async for name, told in news:
                if isinstance(told.error, EngineDead):
                    raise ReplicaLost(name, told.error.reason)
                if told.error is not None:
                    raise told.error
                output = output_of(told, output, asked.request_id, prompt, arrived, sent)
                if output.finished and any(text.finish_reason == "abort" for text in output.outputs):
                    self._require_alive()
                    if not any(isinstance(text.stop_reason, str) for text in output.outputs):
                        raise ReplicaLost(name, "it was shut down")
                yield output
                if output.finished:
                    return
        raise ReplicaLost(name, "its answer ended early")

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            raise InvalidOperation("prompt: expected token ids, as there is no tokenizer", "prompt")
        return cast("list[int]", self._tokenizer(prompt)["input_ids"])

    def _require_alive(self) -> None:
        if self._closing is not None:
            raise EngineDead("it is shutting down")

    def compile(self, structured: Structured) -> None:
        """See that a text can follow what it is to follow; the replica compiles it again."""
        self._grammars.compile(structured)

    def stats(self) -> EngineStats:
        """Return the counters of all replicas together, a second old at most."""
        return total_stats(list(self._stats.values()))

    def replica_stats(self) -> Mapping[str, EngineStats]:
        """Return the counters of each replica that is ready."""
        return dict(self._stats)

    def replica_count(self) -> ReplicaCount:
        """Return how many replicas there are."""
        return ReplicaCount(len(self._link.ready), self._link.wanted, self._failovers)

    async def refresh(self) -> None:
        """Ask all replicas for their counters."""
        self._stats = cast("dict[str, EngineStats]", await self._link.everywhere("stats"))

    async def watch(self) -> None:
        """Keep the counters fresh, for as long as this is awaited."""
        while True:
            with suppress(ReplicaLost):
                await self.refresh()
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    def snapshot(self) -> EngineSnapshot:
        """Return the pools of all replicas, one behind the other; waits for them, in a thread without an event loop.

        Raises
        ------
        ReplicaLost
            If none is ready.
        """
        taken = cast("dict[str, EngineSnapshot]", asyncio.run(self._link.everywhere("snapshot")))
        if not taken:
            raise ReplicaLost("", "none is ready")
        return total_snapshot(taken)

    async def clear_prefix_cache(self) -> int:
        """Forget all prefixes of all replicas; returns how many blocks became free."""
        return sum(cast("dict[str, int]", await self._link.everywhere("clear_prefix_cache")).values())

    async def pin(self, token_ids: Sequence[int], *, cache_salt: str = "") -> PinnedPrefix:
        """Keep the leading blocks of a text at every replica that has them; tells the most tokens that one keeps."""
        found = cast("dict[str, PinnedPrefix | None]", await self._link.everywhere("pin", list(token_ids), cache_salt))
        pins = {name: pin for name, pin in found.items() if pin is not None and pin.num_tokens}
        number = next(self._numbers)
        if pins:
            self._pins[number] = {name: pin.handle for name, pin in pins.items()}
        return PinnedPrefix(number, max((pin.num_tokens for pin in pins.values()), default=0))

    async def unpin(self, handle: int) -> None:
        """Take a pin back at every replica; one that is gone already is ignored."""
        handles = self._pins.pop(handle, None)
        if handles:
            await self._link.everywhere("unpin", handles)

    def block_records(self, block_ids: Ints) -> npt.NDArray[np.void]:
        """Return records of blocks that hold nothing: those of other processes cannot be looked at."""
        return np.zeros(np.asarray(block_ids).shape, _RECORD)

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """End the replicas; requests that come now get `EngineDead`.

        Parameters
        ----------
        drain : bool
            Let requests under way come to their end.
        timeout : float, optional
            Seconds that they have.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while drain and self._running and (deadline is None or time.monotonic() < deadline):
            await asyncio.sleep(0.01)
        if self._closing is None:
            self._closing = asyncio.create_task(self._link.close())
        await self._closing


class _AnotherText(Exception):
    """A replica does not write what the one before it wrote."""


def _goes_on(output: RequestOutput, owed: RequestOutput | None) -> bool:
    """Whether an output has all that a reader has already; `_AnotherText` if it never will."""
    if owed is None:
        return True
    pairs = [*zip(output.outputs, owed.outputs, strict=False)]  # texts that come later are not there yet
    if len(output.outputs) < len(owed.outputs):
        return False
    if any(_differ(new, old) for new, old in pairs) or (output.finished and any(_lacks(*pair) for pair in pairs)):
        raise _AnotherText
    return not any(_lacks(*pair) for pair in pairs)


def _differ(new: CompletionOutput, old: CompletionOutput) -> bool:
    count = min(len(new.token_ids), len(old.token_ids))
    return new.token_ids[:count] != old.token_ids[:count]


def _lacks(new: CompletionOutput, old: CompletionOutput) -> bool:
    return len(new.token_ids) < len(old.token_ids) or (not new.finished and len(new.text) < len(old.text))
