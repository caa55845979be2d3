"""From the engine's thread to a coroutine: the latest output, never a queue that grows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from pagedkv.engine.outputs import RequestOutput
from pagedkv.errors import EngineDead, PagedKvError

__all__ = ["Stream", "deliver"]

News = RequestOutput | PagedKvError


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
        self._news: News = EngineDead("nothing came")
        self._event = asyncio.Event()

    def put(self, news: News) -> None:
        """Replace what is there; called in the loop."""
        self._news = news
        self._event.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.is_over:
            raise StopAsyncIteration
        await self._event.wait()
        self._event.clear()
        news = self._news
        if isinstance(news, RequestOutput):
            self.is_over = news.finished
            return news
        self.is_over = True
        if isinstance(news, EngineDead):  # one error for many readers: each raises its own
            raise EngineDead(news.reason) from news.__cause__
        raise news


def deliver(by_loop: Mapping[asyncio.AbstractEventLoop, Sequence[tuple[Stream, News]]]) -> list[Stream]:
    """Hand news to streams from another thread: one call for each event loop.

    Returns
    -------
    list of Stream
        Those whose loop is closed: nobody will ever read them.
    """
    lost: list[Stream] = []
    for loop, news in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, news)
        except RuntimeError:
            lost += [stream for stream, _ in news]
    return lost


def _put_all(news: Sequence[tuple[Stream, News]]) -> None:
    for stream, each in news:
        stream.put(each)
