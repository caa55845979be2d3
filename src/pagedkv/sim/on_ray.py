"""The cells of a sweep as tasks of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from pagedkv.errors import InvalidOperation, MissingExtra
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.sweeps import Cell, try_out
from pagedkv.sim.trace import Trace
from pagedkv.sim.workers import outcome_of, result_of

__all__ = ["Cluster", "connected"]


class Cluster:
    """A Ray cluster that this process is connected to.

    Parameters
    ----------
    ray : module
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def run(self, trace: Trace, cells: Sequence[Cell]) -> Iterator[tuple[int, ReplayResult]]:
        """Replay every cell as a task of one core; the trace is put into the object store once.

        Yields
        ------
        place, result : int, ReplayResult
            As they are done.

        Raises
        ------
        ReplayFailed
            As soon as one cell failed, or Ray lost it.
        """
        ray = self._ray
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


def connected() -> Cluster:
    """Connect to the running cluster, unless this process is connected already.

    Raises
    ------
    MissingExtra
        If Ray is not installed.
    InvalidOperation
        If no cluster is found.
    """
    try:
        ray: Any = import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra("ray", "ray") from None
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InvalidOperation(
                "ray expects a running cluster; start one with: ray start --head (or name it in RAY_ADDRESS)"
            ) from error
    return Cluster(ray)
