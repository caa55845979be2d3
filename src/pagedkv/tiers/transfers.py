"""Transfers: rows in pieces on threads, one transfer behind another, and the checksums of rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from pagedkv.tiers.tier import Rows

Ints = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]


def after(before: Future[int], begin: Callable[[], Future[int]]) -> Future[int]:
    """Return a future of what is begun once another one is done."""
    answer: Future[int] = Future()
    answer.set_running_or_notify_cancel()

    def end(begun: Future[int]) -> None:
        error = begun.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(begun.result())

    def start(_: Future[int]) -> None:
        try:
            begin().add_done_callback(end)
        except BaseException as error:
            answer.set_exception(error)

    before.add_done_callback(start)
    return answer


def checksums(rows: Rows, places: Ints) -> Sums:
    """Return the checksums of some rows, never 0."""
    return np.array([xxhash.xxh3_64_intdigest(rows[place]) or 1 for place in places.tolist()], np.uint64)


def run_pieces(
    threads: ThreadPoolExecutor, pieces: list[Ints], work: Callable[[Ints], None], end: Callable[[], int]
) -> Future[int]:
    """Let threads work on all pieces; the last one to finish calls `end`, whose answer is the future's.

    An OSError of the work is no answer of the future: `end` finds out what was not done. Any other is.
    """
    answer: Future[int] = Future()
    answer.set_running_or_notify_cancel()  # so that nobody can cancel it while its rows are in use
    done: list[BaseException | None] = []
    lock = threading.Lock()

    def note(piece: Future[None]) -> None:
        with lock:
            done.append(piece.exception())
            if len(done) < len(pieces):
                return
        finish()

    def finish() -> None:
        try:
            count = end()
        except BaseException as error:
            answer.set_exception(error)
            return
        faults = [error for error in done if error is not None and not isinstance(error, OSError)]
        if faults:
            answer.set_exception(faults[0])
        else:
            answer.set_result(count)

    if not pieces:
        finish()
    for piece in pieces:
        threads.submit(work, piece).add_done_callback(note)
    return answer
