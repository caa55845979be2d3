"""One cell of a sweep: a strategy at a capacity, and how the text of a strategy becomes one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np

from pagedkv.control.protocol import EvictionStrategy
from pagedkv.control.strategies import as_strategy, parse_strategy, strategy_names
from pagedkv.errors import InvalidOperation, PagedKvError, ReplayFailed
from pagedkv.sim.replaying import replay
from pagedkv.sim.result import ReplayResult
from pagedkv.sim.timing import Timing
from pagedkv.sim.trace import Trace

OPTIMAL = "optimal"
_FEW_REQUESTS, _FEW_BLOCKS = 2, 64
_MODULE_AND_CLASS = re.compile(r"\s*([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)\s*")


@dataclass(frozen=True)
class Cell:
    """One replay that is asked for. It is sent to other processes, so a strategy must be picklable there.

    Attributes
    ----------
    name : str
        The strategy as it was asked for.
    strategy : EvictionStrategy or None
        None for the optimum.
    blocks : int
    timing : Timing or None
    """

    name: str
    strategy: EvictionStrategy | None
    blocks: int
    timing: Timing | None = None

    def replay(self, trace: Trace) -> ReplayResult:
        """Replay with a strategy of its own, so that what it learned in another cell plays no part.

        Raises
        ------
        ReplayFailed
            Whatever went wrong.
        """
        return self._replay(trace, self.blocks)

    def try_out(self, trace: Trace) -> None:
        """Replay the first requests: everything is compiled afterwards, and a strategy that cannot work has failed.

        Raises
        ------
        ReplayFailed
            Whatever went wrong.
        """
        few = trace.slice(0, min(_FEW_REQUESTS, trace.num_requests))
        for name, array in vars(few).items():
            if isinstance(array, np.ndarray) and not getattr(trace, name).flags.writeable:
                array.flags.writeable = False  # read-only arrays are another type to the compiler
        self._replay(few, min(_FEW_BLOCKS, self.blocks))

    def _replay(self, trace: Trace, blocks: int) -> ReplayResult:
        try:
            if self.strategy is None:
                from pagedkv.sim.optimum import optimal

                result = optimal(trace, blocks)
            else:
                result = replay(trace, blocks, copy.deepcopy(self.strategy), timing=self.timing)
        except Exception as error:
            raise self.failure(error) from error
        return replace(result, strategy=self.name)

    def failure(self, error: Exception | str) -> ReplayFailed:
        """Return the error that names this cell; `error` is what happened in it."""
        told = str(error).strip() or "no reason was given"
        if isinstance(error, Exception) and not isinstance(error, PagedKvError):
            told = f"{type(error).__name__}: {told}"
        return ReplayFailed(self.name, self.blocks, told)


def try_out(trace: Trace, cells: Sequence[Cell]) -> None:
    """Try every strategy once: what they need is compiled here, and nothing is started for one that cannot work.

    Raises
    ------
    ReplayFailed
        Whatever went wrong.
    """
    for cell in {cell.name: cell for cell in reversed(cells)}.values():
        cell.try_out(trace)


def named_strategy(strategy: str | EvictionStrategy) -> tuple[str, EvictionStrategy | None]:
    """Return what a strategy is called and the strategy; None for the optimum.

    Raises
    ------
    InvalidOperation
        If it is neither ``"optimal"``, a registered name, ``module:Class`` nor a strategy object.
    """
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
    raise InvalidOperation(f"strategy expects module:Class or one of {', '.join([*known, OPTIMAL])}, got {strategy!r}")


def imported_strategy(text: str) -> EvictionStrategy:
    """Import ``module:Class`` and make one without arguments.

    Raises
    ------
    InvalidOperation
        If it cannot be imported or made, or is no strategy.
    """
    match = _MODULE_AND_CLASS.fullmatch(text)
    if match is None:
        raise InvalidOperation(f"a strategy's class expects module:Class, got {text!r}")
    try:
        found: object = import_module(match[1])
        for name in match[2].split("."):
            found = getattr(found, name)
    except Exception as error:
        raise InvalidOperation(f"strategy {text!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InvalidOperation(f"strategy {text!r} expects a class, got {found!r}")
    return _made(found, text)


def _made(factory: Callable[[], object], text: str) -> EvictionStrategy:
    try:
        made = factory()
    except Exception as error:
        raise InvalidOperation(
            f"strategy {text!r} cannot be made without arguments: {type(error).__name__}: {error}"
        ) from error
    try:
        return as_strategy(made)
    except InvalidOperation as error:
        raise InvalidOperation(f"{text!r}: {error.reason}") from error
