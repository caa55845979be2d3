"""A team of threads for kernels: it spins briefly for the next job, then sleeps.

Kernels share out their work among threads by atomic counters, so a thread that comes late or never finds nothing to
do and nobody waits for it. A job goes to the helpers of the team, ordinary Python threads; the caller works on it too.
Between jobs a helper spins without the GIL for a short while, because waking a thread that sleeps takes as long as a
small job; then it sleeps. On a busy machine it gives way to others as it spins. OpenMP's threads do one or the other,
as the environment said before torch was loaded.

One job at a time is shared: whoever calls meanwhile, from another thread or from within a kernel, works alone.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
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
ROUNDS = 500
"""How often a helper gives way before it sleeps: about 0.5 ms on a quiet machine."""


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


def num_threads() -> int:
    """Return how many threads a kernel may use: as many as torch, but not more than there are processors for them.

    ``torch.set_num_threads`` sets it. It is 1 where nothing is compiled.
    """
    return 1 if _INTERPRETED else min(torch.get_num_threads(), usable_cores())


def run_in_threads(kernel: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    """Call ``kernel(*arguments)`` in up to ``threads`` threads at the same time; return when all of them are done.

    Parameters
    ----------
    kernel : Callable
        Releases the GIL, and shares out its work among the threads that call it: one of them may come late or never.
    arguments : tuple
        Given to each call.
    threads : int
        The calling thread is one of them.

    Raises
    ------
    Exception
        What the kernel raised in any thread.
    """
    team = _team()
    if threads <= 1 or _INTERPRETED or not team.lock.acquire(blocking=False):
        kernel(*arguments)
        return
    try:
        team.run(kernel, arguments, threads - 1)
    finally:
        team.lock.release()


@compiled
def _next_job(numbers: Ints, seen: int, done: Ints) -> int:
    """Count one in `done`, and spin until there is another number than `seen`, or for long enough; return it."""
    fetch_add(done, 0, 1)
    for _ in range(ROUNDS):
        for _ in range(16):
            if load_count(numbers, 0) != seen:
                return load_count(numbers, 0)
            pause()
        give_way()
    return seen


@compiled
def _wait_for(done: Ints, count: int) -> None:
    wait_until(done, 0, count)


class _Job:
    """A kernel to be called by whoever takes one of its places."""

    def __init__(self, number: int, kernel: Callable[..., Any], arguments: tuple[Any, ...], helpers: int) -> None:
        self.number, self.kernel, self.arguments = number, kernel, arguments
        self.places = [None] * helpers
        self.done = np.zeros(1, np.int64)
        self.errors: list[BaseException] = []

    def take_place(self) -> bool:
        """Tell whether there was one left."""
        try:
            self.places.pop()
        except IndexError:
            return False
        return True

    def call(self) -> None:
        try:
            self.kernel(*self.arguments)
        except BaseException as error:  # noqa: B036 - for the thread that called
            self.errors.append(error)


class _Team:
    """The helpers of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers = np.zeros(1, np.int64)
        self.job = _Job(0, lambda: None, (), 0)
        self.sleeping: list[bool] = []
        self.wakes: list[SimpleQueue[None]] = []

    def run(self, kernel: Callable[..., Any], arguments: tuple[Any, ...], helpers: int) -> None:
        job = _Job(self.job.number + 1, kernel, arguments, helpers)
        self._announce(job)
        try:
            kernel(*arguments)
        finally:
            begun = helpers
            while job.take_place():
                begun -= 1
            if begun:
                _wait_for(job.done, begun)
        if job.errors:
            raise job.errors[0]

    def _announce(self, job: _Job) -> None:
        self.job = job
        self.numbers[0] = job.number
        for i in range(len(job.places)):
            if i == len(self.wakes):
                self._hire()
            elif self.sleeping[i]:
                self.wakes[i].put(None)

    def _hire(self) -> None:
        place = len(self.wakes)
        self.sleeping.append(False)
        self.wakes.append(SimpleQueue())
        threading.Thread(target=self._help, args=(place,), name=f"pagedkv-{place + 1}", daemon=True).start()

    def _help(self, place: int) -> None:
        seen, done = 0, np.zeros(1, np.int64)
        while True:
            number = _next_job(self.numbers, seen, done)
            if number == seen:
                self.sleeping[place] = True
                if self.job.number == seen:
                    self.wakes[place].get()
                self.sleeping[place] = False
                continue
            job = self.job
            seen = job.number
            if job.take_place():
                job.call()
                done = job.done


@functools.cache
def _team_of(process: int) -> _Team:
    return _Team()


def _team() -> _Team:
    return _team_of(os.getpid())
