"""``pagedkv replay``: what hit ratio would this traffic have had, with which capacity and strategy?"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from pagedkv.cli.console import library_notices, notes, output
from pagedkv.cli.terminal import Failure
from pagedkv.errors import InvalidOperation

if TYPE_CHECKING:
    from pagedkv.sim.hit_curve import HitCurve
    from pagedkv.sim.result import ReplayResult
    from pagedkv.sim.timing import Timing
    from pagedkv.sim.trace import Trace

__all__ = ["ReplayRequest", "run", "search_folder_at_hand", "split_names"]

_ONLINE = ("lru", "fifo", "lfu", "s3fifo", "adaptive")
_OPTIMAL = "optimal"
_ALL = "all"
_FOLDED = {"lru", _OPTIMAL, _ALL}
"""Names that tables and reports compare with, whatever case they were asked for in."""


@dataclass(frozen=True)
class ReplayRequest:
    """What was asked for, as it was typed; the options tell what each means."""

    trace: Path
    blocks: str = "auto"
    strategies: str | None = None
    strategies_from: tuple[str, ...] = ()
    curve: bool = False
    format: str | None = None
    block_tokens: int | None = None
    skip_bad: bool = False
    timed: bool = False
    prefill_rate: float | None = None
    decode_rate: float | None = None
    jobs: int | None = None
    ray: bool = False
    json: bool = False
    csv: str | None = None
    html: Path | None = None


def run(request: ReplayRequest) -> None:
    """Read the trace, replay every cell, show and write the results.

    Raises
    ------
    PagedKvError
        Whatever is wrong with the options, the trace, or a strategy.
    """
    from pagedkv.cli import replay_output
    from pagedkv.sim.capacities import parse_capacities
    from pagedkv.sim.curves import lru_curve
    from pagedkv.sim.reading import read_trace
    from pagedkv.sim.sweeping import sweep

    _check_outputs(request)
    strategies, timing = _strategies(request), _timing(request)
    console = notes()
    with library_notices(console), _bar(console) as bar:
        trace = read_trace(
            request.trace,
            format=request.format,
            block_tokens=request.block_tokens,
            skip_bad=request.skip_bad,
            progress=bar.shows("reading"),
        )
        if trace.num_skipped:
            console.print(f"{trace.num_skipped:,} broken records skipped", style="yellow")
        if not trace.num_requests:
            raise Failure(f"TRACE expects requests, {request.trace} has none")
        capacities = parse_capacities(request.blocks, trace.num_distinct) if trace.has_content else [1]
        results = sweep(
            trace,
            strategies,
            capacities,
            jobs=request.jobs,
            ray=request.ray,
            timing=timing,
            progress=bar.shows("replaying"),
        )
        wants_curve = request.curve or (request.html is not None and timing is None)
        curve = lru_curve(trace) if wants_curve else None
    shown = curve if request.curve else None
    if request.html is not None:
        _write_report(request, trace, results, curve)
    if request.csv is not None:
        replay_output.write_csv(results, timing is not None, request.csv)
    if request.json:
        replay_output.print_json(trace, results, shown, timing)
    elif request.csv != "-":
        replay_output.print_tables(trace, results, shown, timing, output())


def split_names(text: str) -> list[str]:
    """Split strategies at the commas, but not at those between the arguments of one: ``a,b:x=1,y=2,c``."""
    names: list[str] = []
    for part in text.split(","):
        is_argument = re.match(r"\s*\w+\s*=", part) or (names and names[-1].count("(") > names[-1].count(")"))
        if names and is_argument:
            names[-1] += f",{part}"
        elif part.strip():
            names.append(part.strip())
    return [name.lower() if name.lower() in _FOLDED else name for name in names]


def _strategies(request: ReplayRequest) -> list[str]:
    """Return every strategy that is asked for, once; those that do not exist fail before the trace is read."""
    from pagedkv.sim.sweeps import imported_strategy, named_strategy

    if request.strategies is None:
        names = list(_ONLINE) if request.timed else [*_ONLINE, _OPTIMAL]
    else:
        names = split_names(request.strategies)
        if not names:
            raise Failure(f"--strategies expects names such as lru,fifo,optimal, got {request.strategies!r}")
        names = [*chain.from_iterable(_all_strategies() if name == _ALL else [name] for name in names)]
    search_folder_at_hand([*names, *request.strategies_from])
    for name in names:
        named_strategy(name)
    for text in request.strategies_from:
        if text.endswith(".py") or ".py:" in text:
            raise Failure(f"--strategy-from expects module:Class, not a file, got {text!r}")
        imported_strategy(text)
    return list(dict.fromkeys([*names, *request.strategies_from]))


def search_folder_at_hand(strategies: Iterable[str]) -> None:
    """Let ``module:Class`` name a module in the folder at hand, as ``python -m`` would find it."""
    is_asked = any(":" in name and "=" not in name for name in strategies)  # no "priority:levels=3"
    if is_asked and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _all_strategies() -> list[str]:
    """Return every strategy that needs no arguments, and the optimum."""
    from pagedkv.control.strategies import parse_strategy, strategy_names

    names = []
    for name in strategy_names():
        with suppress(InvalidOperation):
            parse_strategy(name)
            names.append(name)
    return [*names, _OPTIMAL]


def _timing(request: ReplayRequest) -> Timing | None:
    from pagedkv.sim.timing import Timing

    rates = {"--prefill-rate": request.prefill_rate, "--decode-rate": request.decode_rate}
    for option, rate in rates.items():
        if rate is not None and not request.timed:
            raise Failure(f"{option} needs --timed")
        if rate is not None and not 0 < rate < float("inf"):
            raise Failure(f"{option} expects tokens per second above 0, got {rate:g}")
    if not request.timed:
        return None
    if request.strategies and {_OPTIMAL, _ALL} & set(split_names(request.strategies)):
        raise Failure("--timed leaves no optimum to find, as the optimum knows no time: leave optimal (and all) out")
    default = Timing()
    return Timing(
        default.prefill_tokens_per_second if request.prefill_rate is None else request.prefill_rate,
        default.decode_tokens_per_second if request.decode_rate is None else request.decode_rate,
    )


def _check_outputs(request: ReplayRequest) -> None:
    """Find out now, not after minutes of work, that nothing could be written."""
    if request.json and request.csv == "-":
        raise Failure("--json and --csv - both want stdout; give --csv a file")
    files = [("--html", request.html), ("--csv", None if request.csv in (None, "-") else Path(str(request.csv)))]
    for option, file in files:
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise Failure(f"{option} expects a file in a folder that exists, got {file}")


def _write_report(request: ReplayRequest, trace: Trace, results: list[ReplayResult], curve: HitCurve | None) -> None:
    from pagedkv.cli.replay_output import write_file
    from pagedkv.sim.report import replay_report

    words = ["pagedkv", "replay", request.trace.name, "--blocks", request.blocks]
    words += ["--strategies", request.strategies] if request.strategies else []
    for text in request.strategies_from:
        words += ["--strategy-from", text]
    words += ["--timed"] if request.timed else []
    page = replay_report(trace, results, curve=curve, command=shlex.join([*words, "--html", str(request.html)]))
    write_file("--html", Path(str(request.html)), page)


class _Bar:
    """One progress bar that says what is done at the moment."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, visible=False)

    def shows(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that is told how much is done, of how much."""

        def show(done: int, asked: int) -> None:
            self._progress.update(self._task, description=what, completed=done, total=asked or None, visible=True)

        return show


@contextmanager
def _bar(console: Console) -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress)
