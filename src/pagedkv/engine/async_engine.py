"""AsyncEngine: steps of the engine in a thread of its own, outputs streamed to coroutines of any event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pagedkv.control.events import CacheEvent
from pagedkv.control.types import CacheStats, HotPrefix, KvBlock
from pagedkv.engine.llm import LLM
from pagedkv.engine.output import OutputDraft
from pagedkv.engine.request import Request, RequestOutput
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.engine.snapshot import NUM_PREFIXES, EngineSizes, EngineSnapshot, EngineStats, PinnedPrefix
from pagedkv.engine.structured import Structured
from pagedkv.engine.token_grammar import GrammarState
from pagedkv.errors import EngineDead, PagedKvError
from pagedkv.tiers.tier import Tier
from pagedkv.typing import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Outputs for coroutines: the latest one, never a queue that grows.

News = OutputDraft | PagedKvError


class Stream:
    """The outputs of one request, for one reader. Outputs are cumulative, so only the latest is kept.

    Parameters
    ----------
    request_id : str
    loop : AbstractEventLoop
        Of the reader.

    Attributes
    ----------
    is_over : bool
        The reader has got the last output, or an error.
    """

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id, self.loop = request_id, loop
        self.is_over = False
        self._news: News | None = None
        self._reader: asyncio.Future[None] | None = None  # what it waits for

    def put(self, news: News) -> None:
        """Replace what is there; called in the loop."""
        self._news = news
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.is_over:
            raise StopAsyncIteration
        while (news := self._news) is None:
            self._reader = self.loop.create_future()
            await self._reader
        self._news = None
        if isinstance(news, OutputDraft):
            self.is_over = news.finished
            return news.output()
        self.is_over = True
        if isinstance(news, EngineDead):  # one error for many readers: each raises its own
            raise EngineDead(news.reason) from news.__cause__
        raise news


def deliver(news: Iterable[tuple[Stream, News]]) -> list[Stream]:
    """Hand news to streams from another thread: one call for each event loop.

    Returns
    -------
    list of Stream
        Those whose loop is closed: they are never read.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, News]]] = defaultdict(list)
    for stream, each in news:
        by_loop[stream.loop].append((stream, each))
    lost: list[Stream] = []
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, pairs)
        except RuntimeError:
            lost += [stream for stream, _ in pairs]
    return lost


def _put_all(news: Sequence[tuple[Stream, News]]) -> None:
    for stream, each in news:
        stream.put(each)


logger = logging.getLogger("pagedkv")

T = TypeVar("T")
LONG_TEXT = 4096  # characters that are tokenized beside the event loop


class AsyncEngine:
    """Runs the steps of an engine in a thread of its own and streams what they bring.

    Use it from any event loop and any thread; do not use the `llm` itself as long as the thread runs. The thread starts
    with the first request.

    Parameters
    ----------
    llm : LLM

    Attributes
    ----------
    llm : LLM
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._core = llm.core
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, Stream] = {}  # of the engine's thread alone
        self._thread: threading.Thread | None = None
        self._numbers = itertools.count()
        self._closing = self._stopped = False
        self._dead: EngineDead | None = None
        if self._core.scheduler.offload is not None:
            self._core.scheduler.offload.ladder.on_news = self._hear_of_tiers

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return self._dead is None and not self._closing

    @property
    def error(self) -> EngineDead | None:
        """Why it has stopped; None while it has not."""
        return self._dead

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
        """Stream the outputs of one request; each holds all of the text so far, and the last one is ``finished``.

        A slow reader misses outputs between, never text. When the iterator is closed or its task is cancelled the
        request is aborted, and its blocks are free before the next step.

        Parameters
        ----------
        prompt : str or sequence of int
        params : SamplingParams, optional
        request_id : str, optional
            One that is not in use.
        priority : int
            Higher goes first.
        cache_salt : str
            Requests of different salts never share a block.
        session_id : str, optional
        tenant : str
            Whose it is. Tenants share the steps, whatever the priorities of their requests.

        Yields
        ------
        RequestOutput

        Raises
        ------
        InvalidOperation
            If an argument makes no sense.
        RequestRefused
            If the request can never fit, with the numbers.
        EngineDead
            If a step failed, or the engine was shut down.
        """
        self._require_alive()
        ids: Sequence[int]
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            ids = await asyncio.to_thread(self.llm.encode, prompt)
        else:
            ids = self.llm.encode(prompt) if isinstance(prompt, str) else prompt
        request = self.llm.request(
            ids,
            params,
            request_id=f"async-{next(self._numbers)}" if request_id is None else request_id,
            priority=priority,
            cache_salt=cache_salt,
            session_id=session_id,
            tenant=tenant,
        )
        request.prompt = prompt if isinstance(prompt, str) else None
        if isinstance(params, SamplingParams) and params.structured is not None:
            request.grammar = await self._grammar(params.structured)
        stream = Stream(request.request_id, asyncio.get_running_loop())
        self._submit(lambda: self._take_in(request, stream))
        try:
            async for output in stream:
                yield output
        finally:
            if not stream.is_over:
                self._submit_quietly(lambda: self._take_out(stream))

    def compile(self, structured: Structured) -> None:
        """Make ready what texts are to follow, for requests to come; from any thread, in up to a second.

        Raises
        ------
        InvalidOperation
            No text can follow it.
        """
        self._core.grammars.compile(structured)

    async def _grammar(self, structured: Structured) -> GrammarState:
        grammars = self._core.grammars
        kept = grammars.kept(structured)
        return await asyncio.to_thread(grammars.compile, structured) if kept is None else kept

    async def abort(self, request_id: str) -> None:
        """End a request: its stream gets a last output with what there is. Unknown ids are ignored."""
        self._submit_quietly(lambda: self._abort(request_id))

    @property
    def sizes(self) -> EngineSizes:
        """Of the pool, the model and the batch: what never changes."""
        return self._core.sizes

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where K and V are kept beyond the pool, nearest first."""
        return self._core.tiers

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of the model; None if there is none."""
        tokenizer: PreTrainedTokenizerBase | None = self.llm.tokenizer
        return tokenizer

    def stats(self) -> EngineStats:
        """Return the counters since the engine was made, or reset; never waits."""
        return self._core.stats()

    def cache_stats(self) -> CacheStats:
        """Return the counters of the cache since it was made; never waits."""
        return self._core.cache_stats()

    def snapshot(self) -> EngineSnapshot:
        """Return pool, requests and counters between two steps; blocks until the present step is done."""
        return self._between_steps(self._core.snapshot).result()

    async def clear_prefix_cache(self) -> int:
        """Forget all prefixes, between two steps; returns how many blocks became free."""
        return await asyncio.wrap_future(self._between_steps(self._core.clear_prefix_cache))

    async def reset(self) -> int:
        """Forget all prefixes and count from zero again, between two steps; returns how many blocks became free.

        Raises
        ------
        InvalidOperation
            If requests are under way.
        """
        return await asyncio.wrap_future(self._between_steps(self._core.reset))

    async def pin(self, token_ids: Sequence[int], *, cache_salt: str = "") -> PinnedPrefix:
        """Keep the leading blocks of a text that are in the pool now, until `unpin` or until all is forgotten.

        They make room where a request could not be computed otherwise.

        Parameters
        ----------
        token_ids : sequence of int
        cache_salt : str
            Of the texts that are to find it.

        Raises
        ------
        OutOfMemory
            If not one block of the pool is free.
        """
        return await asyncio.wrap_future(self._between_steps(lambda: self._core.pin(token_ids, cache_salt)))

    async def unpin(self, handle: int) -> None:
        """Take a pin back; one that is gone already is ignored."""
        await asyncio.wrap_future(self._between_steps(lambda: self._core.unpin(handle)))

    def hottest_prefixes(self, limit: int = NUM_PREFIXES, max_tokens: int = 0) -> tuple[HotPrefix, ...]:
        """Return the prefixes whose reuse saved the most tokens; never waits.

        Parameters
        ----------
        limit : int
            The most prefixes.
        max_tokens : int
            The first so many token ids of each are returned with it.
        """
        return self._core.runner.cache.hottest_prefixes(limit, max_tokens)

    def block_records(self, block_ids: Ints) -> npt.NDArray[np.void]:
        """Return copies of the records of some blocks, with the fields of the pool's own; never waits."""
        return self._core.runner.cache.block_records(block_ids)

    def block(self, block_id: int) -> KvBlock:
        """Return a live view of a block of the pool."""
        block: KvBlock = self._core.runner.cache.block(block_id)
        return block

    def subscribe(self, callback: Callable[[CacheEvent], None]) -> Callable[[], None]:
        """Call back with every event of the cache, in the engine's thread; returns what ends it."""
        return self._core.runner.cache.subscribe(callback)

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop, and close the tiers; requests that come now get EngineDead. A tier that cannot be closed is logged.

        Parameters
        ----------
        drain : bool
            Let requests under way come to their end.
        timeout : float, optional
            Seconds that they have; what is left then is aborted.
        """
        self._closing = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while drain and self._is_busy() and (deadline is None or time.monotonic() < deadline):
            await asyncio.sleep(0.01)
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        try:
            await asyncio.to_thread(self.llm.close)
        except Exception:  # what it stored may be lost; whoever shuts down goes on with the rest
            logger.exception("a tier was not closed")

    # ---------------------------------------------------------------- from any thread

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead.reason) from self._dead
        if self._closing:
            raise EngineDead("it is shutting down")

    def _submit(self, job: Callable[[], None]) -> None:
        """Have a job done by the engine's thread, before its next step."""
        with self._wake:
            self._require_alive()
            self._post(job)

    def _submit_quietly(self, job: Callable[[], None]) -> None:
        """The same for jobs that also make sense while it shuts down, and none when it has stopped."""
        with self._wake:
            if self._dead is None and not self._stopped:
                self._post(job)

    def _post(self, job: Callable[[], None]) -> None:
        self._inbox.append(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pagedkv-engine", daemon=True)
            self._thread.start()
        self._wake.notify()

    def _between_steps(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._wake:
            if self._thread is not None and not self._stopped and self._dead is None:
                self._post(job)
                return future
        job()  # nothing runs
        return future

    def _is_busy(self) -> bool:
        return self._dead is None and (bool(self._inbox) or self._core.has_work)

    # ---------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        try:
            while self._next_jobs():
                if self._core.has_work:
                    self._deliver(self._core.advance())
            self._end(EngineDead("it was shut down"), None)
        except BaseException as error:  # whatever a model can raise: no reader may wait for ever
            logger.exception("a step of the engine failed")
            self._end(EngineDead(f"a step failed: {type(error).__name__}: {error}"), error)

    def _next_jobs(self) -> bool:
        """Do what was asked for, waiting for it where there is nothing else to do; False when it is time to stop."""
        with self._wake:
            while not self._inbox and not self._stopped:
                patience = self._core.patience
                if patience == 0 or not self._wake.wait(patience):
                    break
            jobs, go_on = list(self._inbox), not self._stopped
            self._inbox.clear()
        for job in jobs:
            job()
        return go_on

    def _hear_of_tiers(self) -> None:
        """Wake up, in a thread of a tier: something that a request waits for has come."""
        with self._wake:
            self._wake.notify()

    def _take_in(self, request: Any, stream: Stream) -> None:
        try:
            self._core.add(request)
        except PagedKvError as error:
            deliver([(stream, error)])
        else:
            self._streams[request.request_id] = stream

    def _take_out(self, stream: Stream) -> None:
        # The id may belong to another request by now.
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._core.end(stream.request_id)

    def _abort(self, request_id: str) -> None:
        request = self._core.end(request_id)
        if request is not None:
            self._deliver([request])

    def _deliver(self, requests: Iterable[Request]) -> None:
        """Hand what there is of requests to their streams."""
        streams = self._streams
        news = [(streams[each.request_id], OutputDraft(each)) for each in requests if each.request_id in streams]
        for stream, draft in news:
            if draft.finished:
                del self._streams[stream.request_id]
        for lost in deliver(news):
            self._take_out(lost)

    def _end(self, dead: EngineDead, cause: BaseException | None) -> None:
        """Fail all who wait and free their blocks."""
        dead.__cause__ = cause
        with self._wake:
            self._dead = dead
            jobs = list(self._inbox)
            self._inbox.clear()
        for job in jobs:
            job()
        streams, self._streams = self._streams, {}
        for request_id in streams:
            try:
                self._core.end(request_id)
            except PagedKvError:
                logger.exception("request %s could not be taken out", request_id)
        deliver([(stream, dead) for stream in streams.values()])
