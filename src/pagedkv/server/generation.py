"""Generation: the engine requests of one HTTP request, their deltas, and the stream of server-sent events."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagedkv.engine import CompletionOutput, EngineDead, RequestOutput, SamplingParams
from pagedkv.server.answers import Usage
from pagedkv.server.auth import Caller, salt_of
from pagedkv.server.errors import ApiError, ClientLeft, api_error_of
from pagedkv.server.logs import note
from pagedkv.server.schemas import GenerationFields
from pagedkv.server.state import ServerState

T = TypeVar("T")
Changes = AsyncIterator[list[tuple[int, RequestOutput]]]


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and how to go on from it."""

    token_ids: list[int]
    params: SamplingParams


class Generation:
    """Runs the prompts of one HTTP request and hands out what is newest.

    Outputs are cumulative, so only the newest one of each prompt is kept: a client that reads slowly skips steps, the
    engine never waits for it, and what is held for it is bounded. When the client leaves, or time is up, or the
    ``async with`` block ends, whatever still runs is aborted and its blocks are free.
    """

    def __init__(
        self,
        body: GenerationFields,
        request: Request,
        server: ServerState,
        caller: Caller,
        jobs: Sequence[Job],
        request_id: str,
    ) -> None:
        self.body = body
        self.latest: list[RequestOutput | None] = [None] * len(jobs)
        self._server, self._request, self._jobs, self._request_id = server, request, jobs, request_id
        # A salt that nobody else has: nothing is found under it.
        self._caller = caller
        self._salt = salt_of(caller, secrets.token_hex() if body.cache_prompt is False else body.cache_salt)
        self._changed: set[int] = set()
        self._wake = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._places = ExitStack()
        self._started = time.perf_counter()

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens of all prompts."""
        return [job.token_ids for job in self._jobs]

    @property
    def salt(self) -> str:
        """Under which the prompts are found in the cache."""
        return self._salt

    async def __aenter__(self) -> Generation:
        """Start; 429 if there is no room, 503 if the server drains."""
        if self._server.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after=5)
        texts = sum(job.params.n for job in self._jobs)
        self._places.enter_context(self._server.admission.entered(texts, self._caller.name))
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
        # Both know this object: circles, which would stay until they are collected.
        self._tasks.clear()
        self._error = None

    async def changes(self) -> Changes:
        """Yield (prompt, its newest output) of all prompts that changed, until all are finished.

        Raises ClientLeft, 504 when time is up, or what the engine raised.
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
            priority=self.body.priority or 0,
            cache_salt=self._salt,
            session_id=self.body.session_id or self._request.headers.get("x-session-id"),
            tenant=self._caller.name,
        )
        return cast("AsyncGenerator[RequestOutput, None]", outputs)

    async def _watch(self) -> None:
        """See when the client leaves."""
        await _left(self._request)
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


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do what has to be done before a generation, for as long as the client is there; ClientLeft if it is not."""
    tasks = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientLeft("the client left")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _aborted() -> ApiError:
    return ApiError(503, "the request was aborted: the server is shutting down", code="aborted", retry_after=5)


def _refuse_abort(output: RequestOutput) -> None:
    # The engine ends requests on its own only when it shuts down.
    aborted = [choice for choice in output.outputs if choice.finish_reason == "abort"]
    if output.finished and aborted:
        if isinstance(aborted[0].stop_reason, str):  # the parser of a grammar met a limit
            raise ApiError(400, aborted[0].stop_reason, code="grammar_too_complex")
        raise _aborted()


class Deltas:
    """Tells for one text after the other what is new since it was asked last."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], tuple[int, int]] = {}
        self._ended: set[tuple[int, int]] = set()

    def of(self, place: int, output: CompletionOutput) -> tuple[CompletionOutput, bool] | None:
        """Return what is new in a text of a prompt, and whether it is the first of it; None if nothing is new."""
        key = place, output.index
        if key in self._ended:
            return None
        first = key not in self._told
        characters, tokens = self._told.get(key, (0, 0))
        text = output.text[characters:]
        logprobs = None if output.logprobs is None else output.logprobs[tokens:]
        if not (text or logprobs or output.finish_reason):
            return None
        # Tokens without text wait for the text that they become part of, so that a delta has both.
        self._told[key] = (max(characters, len(output.text)), len(output.token_ids))
        if output.finish_reason:
            self._ended.add(key)
        delta = CompletionOutput(
            index=output.index,
            text=text,
            token_ids=output.token_ids[tokens:],
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            logprobs=logprobs,
            cumulative_logprob=output.cumulative_logprob,
        )
        return delta, first


# Server-sent events.

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"
BESIDE = "beside"
"""Of a choice: fields that stand beside it in its event, not in it."""


class EventFrame:
    """Writes the events of one answer: all hold the same fields, which are encoded once, and one choice each.

    Parameters
    ----------
    fields : dict
    wants_usage : bool
        Whether the last event holds the usage; the others have it as null then.
    """

    def __init__(self, fields: dict[str, Any], wants_usage: bool) -> None:
        self._fields = fields
        self._head = b"data: " + msgspec.json.encode(fields)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if wants_usage else b"]}\n\n"

    def event(self, choice: dict[str, Any]) -> bytes:
        """Return the event of a choice."""
        more = choice.pop(BESIDE, None)
        tail = b"]," + _encode(more)[1:-1] + self._tail[1:] if more else self._tail
        return self._head + _encode(choice) + tail

    def last(self, usage: Usage) -> bytes:
        """Return the event of the usage."""
        return _event({**self._fields, "choices": [], "usage": usage.model_dump()})


_encode = msgspec.json.Encoder().encode


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + _encode(fields) + b"\n\n"


class EventStream(Response):
    """Sends events and leaves the generation, whatever happens."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, events: AsyncGenerator[bytes, None], media_type: str = media_type
    ) -> None:
        self.media_type = media_type
        self.status_code, self.background, self.body = 200, None, b""
        self._generation, self._events = generation, events
        self.init_headers(_HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            return
        finally:
            await self._generation.__aexit__()


Steps = AsyncGenerator[list[dict[str, Any]], None]
"""What is new in the choices of an answer, step by step."""


async def stream_steps(
    generation: Generation,
    choices_of: Callable[[int, RequestOutput, CompletionOutput, bool], list[dict[str, Any]]],
    events_of: Callable[[Steps], AsyncGenerator[bytes, None]],
    media_type: str = EventStream.media_type,
) -> EventStream:
    """Start what is to run and, once there is something to tell, return the stream that `events_of` makes of its steps.

    What goes wrong before that is raised, so that the client gets the right status; what goes wrong later is raised in
    the steps. The choices are made by `choices_of` of the prompt's place, its output, a delta and whether it is the
    first of its text.
    """
    await generation.__aenter__()
    try:
        changes = generation.changes()
        news = await anext(changes)
    except BaseException:
        await generation.__aexit__()
        raise

    async def steps() -> Steps:
        deltas, changed = Deltas(), news
        while changed:
            told = [
                choice
                for place, output in changed
                for text in output.outputs
                if (found := deltas.of(place, text)) is not None
                for choice in choices_of(place, output, *found)
            ]
            if told:
                yield told
            changed = await anext(changes, [])

    return EventStream(generation, events_of(steps()), media_type)


async def stream(
    generation: Generation,
    frame: dict[str, Any],
    choices_of: Callable[[int, RequestOutput, CompletionOutput, bool], list[dict[str, Any]]],
    usage: Callable[[], Usage],
) -> EventStream:
    """Stream an answer as OpenAI's chats and completions do: each event is `frame` with one choice.

    An error that comes in the middle is the last event but one.
    """

    async def events(steps: Steps) -> AsyncGenerator[bytes, None]:
        wants_usage = generation.body.wants_usage
        made = EventFrame(frame, wants_usage)
        try:
            async for choices in steps:
                yield b"".join([made.event(choice) for choice in choices])
            if wants_usage:
                yield made.last(usage())
        except (ClientLeft, GeneratorExit):
            raise
        except Exception as error:
            # The status is long sent: the error is an event, as OpenAI's clients expect it.
            yield _event(api_error_of(error).body)
        yield DONE

    return await stream_steps(generation, choices_of, events)
