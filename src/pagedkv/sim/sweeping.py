"""Many replays of one trace: every strategy at every capacity, in parallel processes or as Ray tasks.

The results come in the order that was asked for, and nothing in them but the seconds depends on how many processes
computed them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pagedkv.control.protocol import EvictionStrategy
from pagedkv.errors import InvalidOperation
from pagedkv.sim.replaying import MAX_BLOCKS
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.sweeps import Cell, named_strategy, try_out
from pagedkv.sim.timing import Timing
from pagedkv.sim.trace import Trace
from pagedkv.sim.workers import run_in_processes
from pagedkv.spec import require_int

__all__ = ["sweep"]

Progress = Callable[[int, int], None]
Outcomes = Iterator[tuple[int, ReplayResult]]

_WORTH_PROCESSES = 5_000_000
"""Block accesses of all cells together; less is done before a second process has started."""


def sweep(
    trace: Trace,
    strategies: Sequence[str | EvictionStrategy],
    blocks: Sequence[int],
    *,
    jobs: int | None = None,
    ray: bool = False,
    timing: Timing | None = None,
    progress: Progress | None = None,
) -> list[ReplayResult]:
    """Replay a trace once for every strategy and capacity.

    Parameters
    ----------
    trace : Trace
    strategies : sequence of str or EvictionStrategy
        Registered names (``"lru"``, ``"priority:levels=3"``), ``"optimal"`` for Belady's optimum, ``"module:Class"``
        for a class that can be imported and made without arguments, or strategy objects. A strategy that learns
        begins anew in every cell.
    blocks : sequence of int
        Capacities, at least 1 each.
    jobs : int, optional
        Processes that replay. 1 replays in this process. By default one for each usable core, or none where the work
        is done before they would have started.
    ray : bool
        Replay as tasks of an existing Ray cluster instead (``pip install 'pagedkv[ray]'``); `jobs` is not used then.
        The classes of strategies must be importable there.
    timing : Timing, optional
        Let requests hold their blocks for as long as they are served; the optimum knows no time.
    progress : callable, optional
        Called here with (cells done, cells asked for) at the start and after each cell.

    Returns
    -------
    list of ReplayResult
        Strategy by strategy in the order asked for, within it capacity by capacity.

    Raises
    ------
    InvalidOperation
        If an argument is no good: an unknown strategy, a capacity below 1, a trace that carries lengths only.
    ReplayFailed
        If one replay failed, for instance in a user's strategy; it names the strategy and the capacity.
    MissingExtra
        If `ray` is asked for and not installed.
    """
    cells = _cells(trace, strategies, blocks, timing)
    if ray:
        from pagedkv.sim.on_ray import connected

        return _collected(connected().run(trace, cells), len(cells), progress)
    jobs = _number_of_jobs(jobs, len(cells), trace.num_accesses)
    if jobs == 1:
        try_out(trace, cells)
        return _collected(((place, cell.replay(trace)) for place, cell in enumerate(cells)), len(cells), progress)
    with tempfile.TemporaryDirectory(prefix="pagedkv-") as folder:
        trace.save(Path(folder))
        try_out(trace, cells)
        return _collected(run_in_processes(Path(folder), cells, jobs), len(cells), progress)


def _cells(
    trace: Trace, strategies: Sequence[str | EvictionStrategy], blocks: Sequence[int], timing: Timing | None
) -> list[Cell]:
    if not trace.has_content:
        raise InvalidOperation(
            f"trace expects the content of its blocks, got {trace.name!r}: the format {trace.format} carries lengths "
            "only, and what is found again cannot be told from lengths"
        )
    for name, values in (("strategies", strategies), ("blocks", blocks)):
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence | np.ndarray):
            raise InvalidOperation(f"{name} expects a sequence, got {values!r}")
    capacities = [require_int("blocks", number, 1, MAX_BLOCKS) for number in blocks]
    named = [named_strategy(strategy) for strategy in strategies]
    for name, strategy in named:
        if strategy is None and timing is not None:
            raise InvalidOperation(f"strategies expects no {name!r} together with timing: the optimum knows no time")
    return [Cell(name, strategy, number, timing) for name, strategy in named for number in capacities]


def _number_of_jobs(jobs: int | None, num_cells: int, num_accesses: int) -> int:
    if jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = cores if num_cells * num_accesses >= _WORTH_PROCESSES else 1
    return max(1, min(require_int("jobs", jobs, 1, 2**16), num_cells))


def _collected(outcomes: Outcomes, asked: int, progress: Progress | None) -> list[ReplayResult]:
    results: dict[int, ReplayResult] = {}
    if progress:
        progress(0, asked)
    for place, result in outcomes:
        results[place] = result
        if progress:
            progress(len(results), asked)
    return [results[place] for place in range(asked)]
