"""Background work beside the server: tasks of its event loop, and the garbage collection of its process."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any


@asynccontextmanager
async def in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let `work` run until the block ends; it is cancelled then, and waited for."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# A full collection looks at every object, of which torch and transformers have half a million and a request some three
# hundred, and all threads wait for it: a quarter of a second or more. A request's own objects need none, as there are
# no circles in them.

SECONDS_BETWEEN, SECONDS_AT_MOST = 5.0, 60.0
_NEVER = 1 << 30


@contextmanager
def quiet_collections(is_quiet: Callable[[], bool], seconds: float = SECONDS_BETWEEN) -> Iterator[None]:
    """Let the garbage collector leave out what there is now, and wait for quiet moments, as long as the body runs.

    Parameters
    ----------
    is_quiet : callable
        Whether there is little to look at now. If that is never so, it is collected once a minute.
    seconds : float
        Between two looks.
    """
    young, middle, old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(young, middle, _NEVER)
    over = threading.Event()
    thread = threading.Thread(target=_collect, args=(over, is_quiet, seconds), name="pagedkv-collector", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        gc.set_threshold(young, middle, old)
        gc.unfreeze()


def _collect(over: threading.Event, is_quiet: Callable[[], bool], seconds: float) -> None:
    last = time.monotonic()
    while not over.wait(seconds):
        has_grown = gc.get_count()[2] > 0
        if (has_grown and is_quiet()) or time.monotonic() - last > SECONDS_AT_MOST:
            gc.collect()
            last = time.monotonic()
