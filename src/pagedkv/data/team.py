"""A team of threads for kernels: it spins briefly for the next job, then sleeps.

Kernels share out their work among threads by atomic counters, so a thread that comes late or never finds nothing to
do and nobody waits for it. A job goes to the helpers of the team, ordinary Python threads; the caller works on it too.
Between jobs a helper spins without the GIL for a short while, because waking a thread that sleeps takes as long as a
small job; then it sleeps. On a busy machine it gives way to others as it spins. OpenMP's threads do one or the other,
as the environment said before torch was loaded.

One job at a time is shared: whoever calls meanwhile, from another thread or from within a kernel, works alone.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from pagedkv.data.simd import fetch_add, give_way, load_count, pause
from pagedkv.jit import compiled, inlined
from pagedkv.machine import usable_cores

_INTERPRETED: bool = numba.config.DISABLE_JIT  # type: ignore[attr-defined]
Ints = npt.NDArray[np.int64]

PAUSES = 1000
"""How often `wait_until` looks before it gives way: about 25 µs."""
LOOKS, ROUNDS = 16, 1000
"""How often a helper looks for a job before it gives way, and gives way before it sleeps: 1 ms on a quiet machine."""


@inlined
def wait_until(counters: Ints, index: int, value: int) -> None:
    """Return when ``counters[index]``, int64, is at least ``value``, and all that was written before is seen.

    Inside kernels. It must be certain that others which have begun will count so far; what they still do should be
    short. The processor is given to other threads that are ready after some microseconds: on a busy machine one of
    them may be who is waited for.
    """
    for _ in range(PAUSES):
        if load_count(counters, index) >= value:
            return
        pause()
    while load_count(counters, index) < value:
        give_way()


def is_interpreted() -> bool:
    """Tell whether nothing is compiled (``NUMBA_DISABLE_JIT=1``)."""
    return _INTERPRETED


def num_threads() -> int:
    """Return how many threads a kernel may use: as many as torch, but not more than there are processors for them.

    ``torch.set_num_threads`` sets it. It is 1 where nothing is compiled.
    """
    return 1 if _INTERPRETED else min(torch.get_num_threads(), usable_cores())


def run_in_threads(
    kernel: Callable[..., Any], arguments: tuple[Any, ...], threads: int, *, joins: bool = False
) -> None:
    """Call ``kernel(*arguments)`` in up to ``threads`` threads at the same time; return when all of them are done.

    Parameters
    ----------
    kernel : Callable
        Releases the GIL, and shares out its work among the threads that call it: one of them may come late or never.
    arguments : tuple
        Given to each call.
    threads : int
        The calling thread is one of them.
    joins : bool
        Whether the kernel itself returns only when all work is done. Threads that are about to return from it are then
        waited for in the next call, before its kernel begins: until then they may read what they count by, so who
        ``joins`` gives two calls that follow each other other counters.

    Raises
    ------
    Exception
        What the kernel raised in any thread; where it ``joins``, in this one.
    """
    team = _team
    if threads <= 1 or _INTERPRETED or not team.lock.acquire(blocking=False):
        team.last.wait()
        kernel(*arguments)
        return
    try:
        team.run(kernel, arguments, threads - 1, joins)
    finally:
        team.lock.release()


@compiled
def _next_job(numbers: Ints, seen: int, done: Ints) -> int:
    """Count one more in `done` and spin, until there is another number than `seen` or for long enough; return it."""
    fetch_add(done, 0, 1)
    for _ in range(ROUNDS):
        for _ in range(LOOKS):
            number = load_count(numbers, 0)
            if number != seen:
                return number
            pause()
        give_way()
    return seen


@compiled
def _wait_for(done: Ints, count: int) -> None:
    wait_until(done, 0, count)


def _nothing() -> None:
    pass


class _Job:
    """A kernel, called by all who take one of its places."""

    def __init__(self, number: int, kernel: Callable[..., Any], arguments: tuple[Any, ...], helpers: int) -> None:
        self.number, self.call = number, (kernel, arguments)
        self.places = [None] * helpers
        self.helpers = 0  # that took a place, once it is closed
        self.done = np.zeros(1, np.int64)
        self.errors: list[BaseException] = []

    def take_place(self) -> bool:
        """Tell whether one was left."""
        try:
            self.places.pop()
        except IndexError:
            return False
        return True

    def help(self) -> None:
        kernel, arguments = self.call
        try:
            kernel(*arguments)
        except BaseException as error:  # noqa: B036 - the caller raises it
            self.errors.append(error)

    def close(self, helpers: int) -> None:
        """Let nobody of so many begin any more, and keep nothing of the caller's alive."""
        try:
            while self.take_place():
                helpers -= 1
            self.helpers = helpers
        finally:
            self.call = _nothing, ()

    def wait(self) -> None:
        """Wait for who has begun."""
        if self.helpers:
            _wait_for(self.done, self.helpers)


class _Team:
    """The helpers of this process. Who holds the lock has a job for them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers = np.zeros(1, np.int64)
        self.job = self.last = _Job(0, _nothing, (), 0)  # `last` is the last one that joined
        self.uncounted = np.zeros(1, np.int64)
        self.is_over = False
        self.helpers: list[threading.Thread] = []
        self.sleeping: list[bool] = []
        self.wakes: list[SimpleQueue[None]] = []

    def run(self, kernel: Callable[..., Any], arguments: tuple[Any, ...], helpers: int, joins: bool) -> None:
        self.last.wait()
        job = _Job(self.job.number + 1, kernel, arguments, helpers)
        is_through = False
        try:
            self._announce(job)
            kernel(*arguments)
            is_through = joins
        finally:
            job.close(helpers)
            if is_through:
                self.last = job
            else:
                job.wait()
        if job.errors and not joins:
            raise job.errors[0]

    def stop(self) -> None:
        """End the helpers; who calls from now on works alone. One that is still in a kernel is left to itself."""
        if self.lock.acquire(blocking=False):
            self.is_over = True
            self._announce(_Job(self.job.number + 1, _nothing, (), len(self.helpers)))
            for helper in self.helpers:
                helper.join(timeout=1)

    def _announce(self, job: _Job) -> None:
        self.job = job
        self.numbers[0] = job.number
        while len(self.helpers) < len(job.places) and self._hire():
            pass
        for _, is_asleep, wake in zip(job.places, self.sleeping, self.wakes, strict=False):
            if is_asleep:
                wake.put(None)

    def _hire(self) -> bool:
        """Tell whether the system let another thread begin; without it the others have more to do."""
        place = len(self.helpers)
        helper = threading.Thread(target=self._help, args=(place,), name=f"pagedkv-{place + 1}", daemon=True)
        self.sleeping.append(False)
        self.wakes.append(SimpleQueue())
        try:
            helper.start()
        except RuntimeError:
            self.sleeping.pop()
            self.wakes.pop()
            return False
        self.helpers.append(helper)
        return True

    def _help(self, place: int) -> None:
        seen, done = 0, self.uncounted
        while not self.is_over:
            number = _next_job(self.numbers, seen, done)
            done = self.uncounted
            if number == seen:
                self._sleep(place, seen)
                continue
            job = self.job
            seen = job.number
            if job.take_place():
                job.help()
                done = job.done

    def _sleep(self, place: int, seen: int) -> None:
        self.sleeping[place] = True
        if self.job.number == seen:  # a job that is announced from here on finds this thread asleep
            self.wakes[place].get()
        self.sleeping[place] = False


_team = _Team()


def _forget_helpers() -> None:
    """Begin anew in a forked child, which has none of its parent's threads."""
    global _team
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
atexit.register(lambda: _team.stop())


@contextmanager
def torch_alone() -> Iterator[None]:
    """Let torch's operations run in the calling thread alone.

    OpenMP's threads go on spinning for milliseconds after an operation of torch that they took part in, and hold the
    cores that the team needs next; between two steps of a model that is worse than what they save.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
