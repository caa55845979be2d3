"""Processes that replay cells. A process that dies names the cell it had, and none outlives the sweep."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from pagedkv.errors import ReplayFailed
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.sweeps import Cell
from pagedkv.sim.trace import Trace

__all__ = ["Failed", "outcome_of", "result_of", "run_in_processes"]

# Started anew rather than forked: a fork would copy locks that other threads of this process hold.
_context = multiprocessing.get_context("spawn")


def run_in_processes(folder: Path, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[int, ReplayResult]]:
    """Replay every cell, `jobs` at a time, over the trace that was saved in `folder`.

    Yields
    ------
    place, result : int, ReplayResult
        As they are done.

    Raises
    ------
    ReplayFailed
        As soon as one cell failed, or the process that replayed it died.
    """
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


@dataclass(frozen=True)
class Failed:
    """What a failed cell sends home in place of a result: errors and their tracebacks do not travel well.

    Attributes
    ----------
    reason, details : str
        One line, and the traceback.
    """

    reason: str
    details: str


def outcome_of(trace: Trace, cell: Cell) -> ReplayResult | Failed:
    """Replay a cell in another process; loading compiled code from the disk does not count as its time."""
    try:
        cell.try_out(trace)
        return cell.replay(trace)
    except ReplayFailed as failure:
        return Failed(failure.reason, traceback.format_exc())


def result_of(cell: Cell, outcome: ReplayResult | Failed) -> ReplayResult:
    """Return the result that came home.

    Raises
    ------
    ReplayFailed
        If none did.
    """
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
