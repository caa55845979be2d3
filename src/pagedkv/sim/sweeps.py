"""Sweeps: many replays of one trace, every strategy at every capacity, in processes or as Ray tasks."""

from __future__ import annotations

import copy
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from pagedkv.control.protocol import EvictionStrategy, Strategy
from pagedkv.control.strategies import as_strategy, parse_strategy, strategy_names
from pagedkv.errors import InvalidOperation, MissingExtra, PagedKvError, ReplayFailed, bad_argument
from pagedkv.machine import usable_cores
from pagedkv.sim.baselines import OPTIMAL
from pagedkv.sim.queueing import Timing
from pagedkv.sim.replayer import ReplayResult, as_tiers, replay, require_fleet
from pagedkv.sim.replicas import Fleet
from pagedkv.sim.tiered import DISK, HOST, SHARED, Tiers, TierSpec
from pagedkv.sim.trace import MAX_BLOCKS, Int64s, Trace, require_content
from pagedkv.validate import require_int, shown

Progress = Callable[[int, int], None]
Outcomes = Iterator[tuple[int, ReplayResult]]  # the place of a cell, and what its replay found

_FEW_REQUESTS, _FEW_BLOCKS = 2, 64
_MODULE_AND_CLASS = re.compile(r"\s*([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)\s*")


@dataclass(frozen=True)
class Cell:
    """One replay that is asked for. It is sent to other processes, so a strategy must be picklable there."""

    name: str  # the strategy as it was asked for
    strategy: EvictionStrategy | None  # None for the optimum
    blocks: int
    timing: Timing | None = None
    tiers: Tiers | None = None
    fleet: Fleet | None = None

    def try_out(self, trace: Trace) -> None:
        """Replay the first requests: everything is compiled afterwards, and a strategy that cannot work has failed."""
        few = trace.slice(0, min(_FEW_REQUESTS, trace.num_requests))
        for name, array in vars(few).items():
            if isinstance(array, np.ndarray) and not getattr(trace, name).flags.writeable:
                array.flags.writeable = False  # read-only arrays are another type to the compiler
        self.replay(few, min(max(_FEW_BLOCKS, self.fleet.replicas if self.fleet else 1), self.blocks))

    def replay(self, trace: Trace, blocks: int | None = None) -> ReplayResult:
        """Replay with a strategy of its own, so that what it learned in another cell plays no part."""
        blocks = self.blocks if blocks is None else blocks
        try:
            if self.strategy is None:
                result = self._optimal(trace, blocks)
            else:
                strategy = copy.deepcopy(self.strategy)
                result = replay(trace, blocks, strategy, timing=self.timing, tiers=self.tiers, fleet=self.fleet)
                if self.fleet is not None or (self.tiers is not None and self.tiers.levels):
                    order = None if self.timing is None else result.order
                    result = replace(result, attainable=self._optimal(trace, blocks, order).hit_blocks)
        except Exception as error:
            raise self.failure(error) from error
        return replace(result, strategy=self.name)

    def _optimal(self, trace: Trace, blocks: int, order: Int64s | None = None) -> ReplayResult:
        from pagedkv.sim.optimum import optimal

        return optimal(trace, blocks, tiers=self.tiers, order=order)

    def failure(self, error: Exception | str) -> ReplayFailed:
        """Return the error that names this cell; `error` is what happened in it."""
        told = str(error).strip() or "no reason was given"
        if isinstance(error, Exception) and not isinstance(error, PagedKvError):
            told = f"{type(error).__name__}: {told}"
        return ReplayFailed(self.name, self.blocks, told)


def try_out(trace: Trace, cells: Sequence[Cell]) -> None:
    """Try every strategy once: what they need is compiled here, and nothing is started for one that cannot work."""
    for cell in {(cell.name, str(cell.fleet)): cell for cell in reversed(cells)}.values():
        cell.try_out(trace)


def named_strategy(strategy: str | EvictionStrategy) -> tuple[str, EvictionStrategy | None]:
    """Return what a strategy is called and the strategy; None for the optimum."""
    if not isinstance(strategy, str):
        has_a_name = type(strategy).__str__ is not object.__str__
        return str(strategy) if has_a_name else type(strategy).__name__, as_strategy(strategy)
    name = strategy.strip()
    if name.lower() == OPTIMAL:
        return name, None
    known, asked = strategy_names(), re.split(r"[:(]", name)[0].strip()
    if re.sub("[_-]", "", asked.lower()) in known:
        return name, parse_strategy(name)
    if _MODULE_AND_CLASS.fullmatch(name):
        return name, imported_strategy(name)
    raise bad_argument("strategy", f"module:Class or one of {', '.join([*known, OPTIMAL])}", f"{strategy!r}")


def imported_strategy(text: str) -> EvictionStrategy:
    """Import ``module:Class`` and make one without arguments."""
    match = _MODULE_AND_CLASS.fullmatch(text)
    if match is None:
        raise InvalidOperation(f"a strategy's class: expected module:Class, got {text!r}")
    try:
        found: object = import_module(match[1])
        for name in match[2].split("."):
            found = getattr(found, name)
    except Exception as error:
        raise InvalidOperation(f"strategy {text!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InvalidOperation(f"strategy {text!r}: expected a class, got {found!r}")
    try:
        made = found()
    except Exception as error:
        raise InvalidOperation(
            f"strategy {text!r} cannot be made without arguments: {type(error).__name__}: {error}"
        ) from error
    try:
        return as_strategy(made)
    except InvalidOperation as error:
        raise InvalidOperation(f"{text!r}: {error.reason}") from error


# The capacities that a user asks for, as text: ``1000``, ``10k``, ``25%`` of the distinct blocks, ``auto``.

_NUMBER = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([kmg%]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SOME_CAPACITIES = "capacities such as 1000,10k,25% or auto"


def parse_capacities(text: str, num_distinct: int) -> list[int]:
    """Return the capacities in the order they are named, each once.

    They are separated by commas: blocks, with ``k``, ``m`` or ``g`` for thousands, millions, thousand millions; a
    percentage of the distinct blocks, rounded up; ``auto`` for eight sizes that double up to all distinct blocks.
    """
    capacities: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part.lower() == "auto":
            capacities += spread_capacities(num_distinct)
        else:
            capacities.append(_capacity(part, num_distinct))
    if not capacities:
        raise bad_argument("blocks", _SOME_CAPACITIES, f"{text!r}")
    return list(dict.fromkeys(capacities))


def spread_capacities(num_distinct: int, count: int = 8) -> list[int]:
    """Return up to `count` capacities, each twice the one before, the last one all distinct blocks."""
    return sorted({max(1, math.ceil(num_distinct / 2**halvings)) for halvings in range(count)})


_SOME_TIERS = "tiers such as disk:100k or host:20k,disk:25%"


def parse_tiers(text: str, num_distinct: int, strategy: str = "lru") -> tuple[TierSpec, ...]:
    """Return the tiers that ``"host:20k,disk:25%"`` names, the fastest first; sizes as `parse_capacities` has them."""
    tiers = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        medium, colon, size = part.partition(":")
        if medium.lower() not in (HOST, DISK, SHARED) or not colon:
            raise bad_argument("tiers", _SOME_TIERS, f"{part!r}")
        blocks = _capacity(size.strip(), num_distinct, "tiers", _SOME_TIERS)
        tiers.append(TierSpec(medium.lower(), blocks, cast("Strategy", strategy)))  # told by its name, as it was asked
    if not tiers:
        raise bad_argument("tiers", _SOME_TIERS, f"{text!r}")
    return tuple(tiers)


_MOMENT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|s|min|h)", re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3600}


def parse_moment(text: str, trace: Trace) -> int:
    """Return the first request after a moment: ``50%`` of the requests; ``90s``, ``30min``, ``1h`` into the trace."""
    match = _MOMENT.fullmatch(text.strip())
    if match is None or (match[2] == "%" and not 0 <= float(match[1]) <= 100):
        raise bad_argument("restart_at", "a moment such as 50%, 90s, 30min or 1h", f"{text!r}")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        return int(round(number / 100 * trace.num_requests, 6))
    return int(np.searchsorted(trace.times, number * _SECONDS[unit]))


def _capacity(part: str, num_distinct: int, name: str = "blocks", wanted: str = _SOME_CAPACITIES) -> int:
    match = _NUMBER.fullmatch(part)
    if match is None:
        raise bad_argument(name, wanted, f"{part!r}")
    number, unit = float(match[1].replace("_", "")), match[2].lower()
    blocks = number / 100 * num_distinct if unit == "%" else number * _UNITS[unit]
    whole = math.ceil(round(blocks, 6)) if unit == "%" else round(blocks, 6)
    if whole != int(whole) or not 1 <= whole <= MAX_BLOCKS:
        reason = "a cache without a block finds nothing" if not whole else f"expected whole blocks, 1 … {MAX_BLOCKS}"
        raise InvalidOperation(f"{name}: {reason}, got {part!r}")
    return int(whole)


# Processes that replay cells. A process that dies names the cell it had, and none outlives the sweep.
# concurrent.futures.ProcessPoolExecutor does neither: all its cells fail alike, without an exit code, when one of its
# processes dies, and after Ctrl-C or a failure it waits until every cell that runs is done.

# Started anew rather than forked: a fork would copy locks that other threads of this process hold.
_context = multiprocessing.get_context("spawn")


def run_in_processes(folder: Path, cells: Sequence[Cell], jobs: int) -> Outcomes:
    """Replay every cell, `jobs` at a time, over the trace saved in `folder`; yields places and results as they come."""
    left = iter(enumerate(cells))
    workers: list[_Worker] = []
    try:
        with _without_interrupts():
            for _ in range(min(jobs, len(cells))):
                workers.append(_Worker(folder))
        busy = {worker.connection: worker for worker in workers}
        for worker in workers:
            worker.begin(*next(left))
        while busy:
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                yield worker.place, worker.result()
                following = next(left, None)
                if following is None:
                    del busy[worker.connection]
                else:
                    worker.begin(*following)
    finally:
        for worker in workers:
            worker.end()


class Failed(NamedTuple):
    """What a failed cell sends home in place of a result: errors and their tracebacks do not travel well."""

    reason: str
    details: str  # the traceback


def outcome_of(trace: Trace, cell: Cell) -> ReplayResult | Failed:
    """Replay a cell in another process; loading compiled code from the disk does not count as its time."""
    try:
        cell.try_out(trace)
        return cell.replay(trace)
    except ReplayFailed as failure:
        return Failed(failure.reason, traceback.format_exc())


def result_of(cell: Cell, outcome: ReplayResult | Failed) -> ReplayResult:
    """Return the result that came home, or raise the failure that came in its place."""
    if isinstance(outcome, ReplayResult):
        return outcome
    failure = cell.failure(outcome.reason)
    failure.add_note(outcome.details)
    raise failure


class _Worker:
    """One process and the cell that it has."""

    def __init__(self, folder: Path) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, folder), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.place = -1

    def begin(self, place: int, cell: Cell) -> None:
        self.place, self._cell = place, cell
        try:
            self.connection.send(cell)
        except OSError:
            raise self._death() from None
        except Exception as error:  # pickle raises what it likes
            raise cell.failure(f"its strategy cannot be sent to another process: {error}") from error

    def result(self) -> ReplayResult:
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        return result_of(self._cell, outcome)

    def end(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()

    def _death(self) -> ReplayFailed:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            how = f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
            how += "; memory may have run out, try fewer jobs" if -code == getattr(signal, "SIGKILL", 9) else ""
        else:
            how = f"its process ended with exit code {code}; a script that sweeps in several processes needs the guard "
            how += 'if __name__ == "__main__":'
        return self._cell.failure(how)


def _serve(connection: Connection, folder: Path) -> None:
    trace = Trace.load(folder)
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        except Exception as error:  # a class that cannot be imported here, say
            connection.send(Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))
        else:
            connection.send(outcome_of(trace, cell))


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes start that never see Ctrl-C: it goes to the whole group, and this process ends the others."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing.resource_tracker import ensure_running

    ensure_running()  # it lets interrupts through when it starts, so it starts before
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_RAY_PATIENCE = 5.0  # seconds
_WORTH_PROCESSES = 5_000_000
"""Block accesses of all cells together; less is done before a second process has started."""
_TIERED_WORK, _FLEET_WORK = 20, 10
"""How many plain accesses take as long as one of a replay with tiers, and as one on a fleet without."""


def sweep(
    trace: Trace,
    strategies: Sequence[str | EvictionStrategy],
    blocks: Sequence[int],
    *,
    jobs: int | None = None,
    ray: bool = False,
    timing: Timing | None = None,
    tiers: Tiers | Sequence[TierSpec] | None = None,
    fleets: Sequence[Fleet] | None = None,
    progress: Progress | None = None,
) -> list[ReplayResult]:
    """Replay a trace once for every strategy and capacity, and for every fleet if some are given.

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
    tiers : Tiers or sequence of TierSpec, optional
        Beneath the pool of every cell; the optimum is that of one cache as large as both.
    fleets : sequence of Fleet, optional
        Replicas that share the capacity of a cell, and their routing; the optimum bounds all of them.
    progress : callable, optional
        Called here with (cells done, cells asked for) at the start and after each cell.

    Returns
    -------
    list of ReplayResult
        Strategy by strategy in the order asked for, within it fleet by fleet, the optimum once for all of them, within
        that capacity by capacity. Nothing in them but the seconds depends on how many processes computed them.

    Raises
    ------
    InvalidOperation
        If an argument is no good: an unknown strategy, a capacity below 1, a trace that carries lengths only.
    ReplayFailed
        If one replay failed, for instance in a user's strategy; it names the strategy and the capacity.
    MissingExtra
        If `ray` is asked for and not installed.
    """
    tiers = as_tiers(tiers, timing)
    cells = _cells(trace, strategies, blocks, timing, tiers, fleets)
    if ray:
        return _collected(_run_on_ray(_connected_ray(), trace, cells), len(cells), progress)
    jobs = _number_of_jobs(
        jobs, len(cells), trace.num_accesses * (_TIERED_WORK if tiers else _FLEET_WORK if fleets else 1)
    )
    if jobs == 1:
        try_out(trace, cells)
        return _collected(((place, cell.replay(trace)) for place, cell in enumerate(cells)), len(cells), progress)
    with tempfile.TemporaryDirectory(prefix="pagedkv-") as folder:
        trace.save(Path(folder))
        try_out(trace, cells)
        return _collected(run_in_processes(Path(folder), cells, jobs), len(cells), progress)


def _cells(
    trace: Trace,
    strategies: Sequence[str | EvictionStrategy],
    blocks: Sequence[int],
    timing: Timing | None,
    tiers: Tiers | None,
    fleets: Sequence[Fleet] | None,
) -> list[Cell]:
    require_content(trace)
    for name, values in (("strategies", strategies), ("blocks", blocks), ("fleets", fleets or [])):
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence | np.ndarray):
            raise bad_argument(name, "a sequence", shown(values), f"write [{shown(values)}]")
    capacities = [require_int("blocks", number, 1, MAX_BLOCKS) for number in blocks]
    named = [named_strategy(strategy) for strategy in strategies]
    for name, strategy in named:
        if strategy is None and timing is not None:
            raise bad_argument("strategies", f"no {name!r} together with timing: the optimum knows no time")
    for fleet in fleets or ():
        require_fleet(fleet)
        for number in capacities:
            fleet.blocks_each(number)
        for tier in tiers.levels if tiers else ():
            tier.blocks_each(fleet.replicas)
    return [
        Cell(name, strategy, number, timing, tiers, fleet)
        for name, strategy in named
        for fleet in (strategy is not None and fleets) or (None,)
        for number in capacities
    ]


def _number_of_jobs(jobs: int | None, num_cells: int, num_accesses: int) -> int:
    if jobs is None:
        jobs = usable_cores() if num_cells * num_accesses >= _WORTH_PROCESSES else 1
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


def _run_on_ray(ray: Any, trace: Trace, cells: Sequence[Cell]) -> Outcomes:
    """Replay every cell as a task of one core; the trace is put into the object store once."""
    task = ray.remote(num_cpus=1)(outcome_of)
    shared = ray.put(trace)
    try_out(ray.get(shared), cells)  # the read-only arrays that the tasks will see, without a copy
    running = {task.remote(shared, cell): place for place, cell in enumerate(cells)}
    try:
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            place = running.pop(done)
            try:
                outcome = ray.get(done)
            except Exception as error:  # the worker died, or could not import the strategy
                raise cells[place].failure(error) from error
            yield place, result_of(cells[place], outcome)
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _connected_ray() -> Any:
    """Return the module Ray, connected to the running cluster."""
    try:
        ray: Any = import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra("ray", "ray") from None
    if not ray.is_initialized():
        _require_answer(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # of many kinds; what Ray says is the only trace of what went wrong
            raise _no_cluster(f"{type(error).__name__}: {error}") from error
    return ray


def _require_answer(address: str) -> None:
    """See that somebody listens where ``RAY_ADDRESS`` points to: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _RAY_PATIENCE).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise _no_cluster(f"nobody who answers at RAY_ADDRESS={address}: {error}") from error


def _no_cluster(got: str) -> InvalidOperation:
    return bad_argument("ray", "a running cluster (ray start --head starts one, RAY_ADDRESS names one)", got)
