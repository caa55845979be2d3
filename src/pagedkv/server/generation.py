"""Generation: the engine requests of one HTTP request, their deltas, and the stream of server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagedkv.engine import CompletionOutput, EngineDead, RequestOutput, SamplingParams
from pagedkv.server.auth import Caller, salt_of
from pagedkv.server.errors import ApiError, ClientLeft, api_error_of
from pagedkv.server.logs import note
from pagedkv.server.schemas import GenerationFields, Usage
from pagedkv.server.state import ServerState

Changes = AsyncIterator[list[tuple[int, RequestOutput]]]


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt.

    Attributes
    ----------
    token_ids : list of int
    params : SamplingParams
    """

    token_ids: list[int]
    params: SamplingParams


class Generation:
    """Runs the prompts of one HTTP request and hands out what is newest.

    Outputs are cumulative, so only the newest one of each prompt is kept: a client that reads slowly skips steps, the
    engine never waits for it, and what is held for it is bounded. When the client leaves, or time is up, or the
    ``async with`` block ends, whatever still runs is aborted and its blocks are free.

    Parameters
    ----------
    server : ServerState
    request : Request
        Its body has been read.
    jobs : sequence of Job
    request_id : str
        The id of the answer; the engine calls its requests by it.
    priority : int
    salt : str
    session_id : str, optional
    """

    def __init__(
        self,
        server: ServerState,
        request: Request,
        jobs: Sequence[Job],
        *,
        request_id: str,
        priority: int = 0,
        salt: str = "",
        session_id: str | None = None,
    ) -> None:
        self.latest: list[RequestOutput | None] = [None] * len(jobs)
        self._server, self._request, self._jobs, self._request_id = server, request, jobs, request_id
        self._priority, self._salt, self._session_id = priority, salt, session_id
        self._changed: set[int] = set()
        self._wake = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._places = ExitStack()
        self._started = time.perf_counter()

    @classmethod
    def of(
        cls,
        body: GenerationFields,
        request: Request,
        server: ServerState,
        caller: Caller,
        jobs: Sequence[Job],
        request_id: str,
    ) -> Generation:
        """Run `jobs` as body and headers ask for it, in the cache of the caller."""
        return cls(
            server,
            request,
            jobs,
            request_id=request_id,
            priority=body.priority or 0,
            salt=salt_of(caller, body.cache_salt),
            session_id=body.session_id or request.headers.get("x-session-id"),
        )

    async def __aenter__(self) -> Generation:
        """Start.

        Raises
        ------
        ApiError
            429 if there is no room, 503 if the server drains.
        """
        if self._server.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=5)
        self._places.enter_context(self._server.admission.entered(sum(job.params.n for job in self._jobs)))
        ids = self._places.enter_context(self._server.request_ids.taken(self._request_id, len(self._jobs)))
        work = [self._pump(place, job, each) for place, (job, each) in enumerate(zip(self._jobs, ids, strict=True))]
        self._tasks = [asyncio.create_task(self._guarded(each)) for each in (*work, self._watch(), self._clock())]
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Abort what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._places.close()
        self._server.admission.took(time.perf_counter() - self._started)
        self._take_notes()

    async def changes(self) -> Changes:
        """Yield (prompt, its newest output) of all prompts that changed, until all are finished.

        Raises
        ------
        ClientLeft
        ApiError
            504 when time is up, or what the engine raised.
        """
        unfinished = set(range(len(self._jobs)))
        while unfinished:
            await self._wake.wait()
            self._wake.clear()
            if self._error is not None:
                raise self._error
            changed, self._changed = sorted(self._changed), set()
            news = [(place, output) for place in changed if (output := self.latest[place]) is not None]
            unfinished -= {place for place, output in news if output.finished}
            if news:
                yield news

    async def finished(self) -> list[RequestOutput]:
        """Return the last outputs, one a prompt; raises as `changes` does."""
        async for _ in self.changes():
            pass
        return [output for output in self.latest if output is not None]

    def usage(self) -> Usage:
        """Return what it cost so far."""
        outputs = [output for output in self.latest if output is not None]
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        written = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return Usage.model_validate(
            {
                "prompt_tokens": prompt,
                "completion_tokens": written,
                "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
        )

    async def _guarded(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except Exception as error:
            if self._error is None:
                self._error = error
            self._wake.set()

    async def _pump(self, place: int, job: Job, request_id: str) -> None:
        last: RequestOutput | None = None
        reason = "aborted"
        try:
            async with aclosing(self._start(job, request_id)) as outputs:
                async for last in outputs:
                    _refuse_abort(last)
                    self.latest[place] = last
                    self._changed.add(place)
                    self._wake.set()
                    for observer in self._server.observers:
                        observer.updated(last)
            if last is None or not last.finished:
                raise _aborted()
            reason = "finished"
        except EngineDead:
            if self._server.draining:
                raise _aborted() from None
            reason = "error"
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            for observer in self._server.observers:
                observer.ended(last, "timeout" if self._out_of_time else reason)

    def _start(self, job: Job, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        outputs = self._server.engine.generate(
            job.token_ids,
            job.params,
            request_id=request_id,
            priority=self._priority,
            cache_salt=self._salt,
            session_id=self._session_id,
        )
        return cast("AsyncGenerator[RequestOutput, None]", outputs)

    async def _watch(self) -> None:
        """See when the client leaves."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        raise ClientLeft("the client left")

    async def _clock(self) -> None:
        limit = self._server.config.request_timeout
        await asyncio.sleep(limit)
        raise ApiError(
            504,
            f"the request took longer than the {limit:g} seconds that it may",
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )

    @property
    def _out_of_time(self) -> bool:
        return isinstance(self._error, ApiError) and self._error.status == 504

    def _take_notes(self) -> None:
        usage = self.usage()
        facts: dict[str, object] = {
            "prompts": len(self._jobs),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
        }
        firsts = [o.metrics.first_token - o.metrics.arrived for o in self.latest if o and o.metrics.first_token]
        if firsts:
            facts["first_token_seconds"] = round(max(firsts), 6)
        if self._error is not None:
            facts["ended"] = self._error.code if isinstance(self._error, ApiError) else type(self._error).__name__
        note(self._request.scope, **facts)


def _aborted() -> ApiError:
    return ApiError(503, "the request was aborted: the server is shutting down", code="aborted", retry_after=5)


def _refuse_abort(output: RequestOutput) -> None:
    # The engine ends requests on its own only when it shuts down.
    if output.finished and any(choice.finish_reason == "abort" for choice in output.outputs):
        raise _aborted()


# Deltas: what is new in texts that the engine hands out as a whole each time.

Ending = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new in one text.

    Attributes
    ----------
    text : str
    token_ids : tuple of int
    logprobs : list of dict, optional
        One entry for each of the tokens.
    finish_reason : {"stop", "length"}, optional
    stop_reason : int or str, optional
    first : bool
        Whether nothing was told of this text before.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Any]] | None
    finish_reason: Ending | None
    stop_reason: int | str | None
    first: bool = True


class Deltas:
    """Tells for one text after the other what is new since it was asked last."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[int, int]] = {}
        self._ended: set[int] = set()

    def of(self, index: int, output: CompletionOutput) -> TextDelta | None:
        """Return what is new in the text of this index; None if there is nothing to tell."""
        if index in self._ended:
            return None
        characters, tokens = self._told.get(index, (0, 0))
        delta = whole(output)
        text, token_ids = delta.text[characters:], delta.token_ids[tokens:]
        logprobs = None if delta.logprobs is None else delta.logprobs[tokens:]
        if not (text or logprobs or delta.finish_reason):
            return None
        first = index not in self._told
        # Tokens without text wait for the text that they become part of, so that a delta has both.
        self._told[index] = (max(characters, len(delta.text)), len(delta.token_ids))
        if delta.finish_reason:
            self._ended.add(index)
        return TextDelta(text, token_ids, logprobs, delta.finish_reason, delta.stop_reason, first)


def whole(output: CompletionOutput) -> TextDelta:
    """Return a whole text as one delta."""
    ending = cast("Ending | None", output.finish_reason)
    return TextDelta(output.text, tuple(output.token_ids), output.logprobs, ending, output.stop_reason)


# Server-sent events.

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends objects as events, an error as the last of them, and ends what runs, whatever happens.

    Parameters
    ----------
    generation : Generation
        Entered; the stream leaves it.
    chunks : async iterator of dict
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, chunks: AsyncIterator[dict[str, Any]]) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self._generation, self._chunks = generation, chunks
        self.init_headers(_HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events()) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            return
        finally:
            await self._generation.__aexit__()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._chunks:
                yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        except (ClientLeft, GeneratorExit):
            raise
        except Exception as error:
            # The status is long sent: the error is an event, as OpenAI's clients expect it.
            yield b"data: " + msgspec.json.encode(api_error_of(error).body) + b"\n\n"
        yield DONE


async def stream(generation: Generation, chunks_of: Callable[[Changes], AsyncIterator[dict[str, Any]]]) -> EventStream:
    """Start what is to run and, once there is something to tell, return the stream of it.

    What goes wrong before that is raised, so that the client gets the right status.
    """
    await generation.__aenter__()
    try:
        changes = generation.changes()
        first = await anext(changes)
    except BaseException:
        await generation.__aexit__()
        raise

    async def all_changes() -> Changes:
        yield first
        async for change in changes:
            yield change

    return EventStream(generation, chunks_of(all_changes()))
