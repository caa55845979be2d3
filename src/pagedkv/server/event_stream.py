"""Server-sent events of a request that runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagedkv.server.errors import ClientLeft, api_error_of
from pagedkv.server.generation import Changes, Running

__all__ = ["EventStream", "stream"]

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends objects as events, an error as the last of them, and ends what runs, whatever happens.

    Parameters
    ----------
    running : Running
        Entered; the stream leaves it.
    chunks : async iterator of dict
    """

    media_type = "text/event-stream"

    def __init__(self, running: Running, chunks: AsyncIterator[dict[str, Any]]) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self._running, self._chunks = running, chunks
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
            await self._running.__aexit__()

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


async def stream(running: Running, chunks_of: Callable[[Changes], AsyncIterator[dict[str, Any]]]) -> EventStream:
    """Start what is to run and, once there is something to tell, return the stream of it.

    What goes wrong before that is raised, so that the client gets the right status.
    """
    await running.__aenter__()
    try:
        changes = running.changes()
        first = await anext(changes)
    except BaseException:
        await running.__aexit__()
        raise

    async def all_changes() -> Changes:
        yield first
        async for change in changes:
            yield change

    return EventStream(running, chunks_of(all_changes()))
