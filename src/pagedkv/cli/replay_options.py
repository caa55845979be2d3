"""What ``pagedkv replay`` and ``pagedkv plan`` are asked for: strategies, rates and tiers, as options name them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pagedkv.cli.terminal import Failure
from pagedkv.errors import InvalidOperation
from pagedkv.sim.baselines import LRU, OPTIMAL
from pagedkv.validate import require_choice, require_number, require_size

if TYPE_CHECKING:
    from pagedkv.sim.queueing import Timing
    from pagedkv.sim.replicas import Fleet
    from pagedkv.sim.tiered import Tiers, TierSpec
    from pagedkv.sim.trace import Trace

_ONLINE = (LRU, "fifo", "lfu", "s3fifo", "adaptive")
_ALL = "all"
_FOLDED = {LRU, OPTIMAL, _ALL}
"""Names that tables and reports compare with, whatever case they were asked for in."""


def split_names(text: str) -> list[str]:
    """Split ``--strategies`` at the commas, but not at those between the arguments of one: ``a,b:x=1,y=2,c``."""
    names: list[str] = []
    for part in text.split(","):
        is_argument = re.match(r"\s*\w+\s*=", part) or (names and names[-1].count("(") > names[-1].count(")"))
        if names and is_argument:
            names[-1] += f",{part}"
        elif part.strip():
            names.append(part.strip())
    return [name.lower() if name.lower() in _FOLDED else name for name in names]


def strategies_of(
    text: str | None, strategy_from: list[str], timed: bool, tiered: bool, fleets: Sequence[Fleet] = ()
) -> list[str]:
    """Return every strategy that is asked for, once."""
    if text is None and fleets:
        names = [LRU]  # routing decides more than what is evicted
    else:
        names = [*_ONLINE, *([] if timed or tiered else [OPTIMAL])] if text is None else split_names(text)
    if timed and {OPTIMAL, _ALL} & set(names):
        raise Failure("--timed leaves no optimum to find, as the optimum knows no time: leave optimal and all out")
    names = [*chain.from_iterable(_all_strategies() if name == _ALL else [name] for name in names)]
    require_strategies(names, strategy_from)
    return list(dict.fromkeys([*names, *strategy_from]))


def require_strategies(names: list[str], strategy_from: Sequence[str] = ()) -> None:
    """Find out before the trace is read, which may take minutes, that a strategy does not exist.

    ``module:Class`` may name a module in the folder at hand, as ``python -m`` would find it.
    """
    from pagedkv.sim.sweeps import imported_strategy, named_strategy

    if not names:
        raise Failure("--strategies: expected names such as lru,s3fifo, got none")
    is_asked = any(":" in name and "=" not in name for name in (*names, *strategy_from))  # no "priority:levels=3"
    if is_asked:
        _import_from_here()
    for name in names:
        named_strategy(name)
    for name in strategy_from:
        if name.endswith(".py") or ".py:" in name:
            raise Failure(f"--strategy-from: expected module:Class, not a file, got {name!r}")
        imported_strategy(name)


def fleets_of(replicas: str | None, routing: str | None) -> tuple[Fleet, ...]:
    """Return every fleet that is asked for; one replica needs no routing. None without ``--replicas``."""
    from pagedkv.fleet.routing import routing_names
    from pagedkv.sim.replicas import Fleet

    if replicas is None:
        if routing is not None:
            raise Failure("--routing needs --replicas")
        return ()
    names = [name.strip() for name in (routing or ",".join(routing_names())).split(",") if name.strip()]
    counts = [part.strip() for part in replicas.split(",") if part.strip()]
    if not names or not counts or not all(count.isdecimal() for count in counts):
        raise Failure(f"--replicas, --routing: expected numbers and names such as 1,8 and prefix, got {replicas!r}")
    if any(":" in name for name in names):
        _import_from_here()
    fleets = [Fleet(int(count), name) for count in counts for name in (names[:1] if int(count) == 1 else names)]
    return tuple(dict.fromkeys(fleets))


def _import_from_here() -> None:
    """Let ``module:Class`` name a module in the folder at hand, as ``python -m`` would find it."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _all_strategies() -> list[str]:
    """Return every strategy that needs no arguments, and the optimum."""
    from pagedkv.control.strategies import parse_strategy, strategy_names

    names = []
    for name in strategy_names():
        with suppress(InvalidOperation):
            parse_strategy(name)
            names.append(name)
    return [*names, OPTIMAL]


def timing_of(
    timed: bool, prefill_rate: float | None, decode_rate: float | None, bytes_per_token: str | None
) -> Timing | None:
    """Return the rates of a replay in time; None without ``--timed``."""
    from pagedkv.sim.queueing import Timing

    given = {"--prefill-rate": prefill_rate, "--decode-rate": decode_rate, "--bytes-per-token": bytes_per_token}
    for flag, value in given.items():
        if value is not None and not timed:
            raise Failure(f"{flag} needs --timed")
    if not timed:
        return None
    rates = {"prefill_tokens_per_second": prefill_rate, "decode_tokens_per_second": decode_rate}
    size = 0 if bytes_per_token is None else _bytes("bytes_per_token", bytes_per_token)
    return Timing(**{name: rate for name, rate in rates.items() if rate is not None}, bytes_per_token=size)


@dataclass(frozen=True)
class Tiering:
    """What the options say of tiers and of a restart."""

    tiers: str | None
    writes: str | None
    exclusive: bool
    strategy: str
    restart_at: str | None
    speeds: str | None = None
    latencies: str | None = None

    @property
    def is_asked(self) -> bool:
        """Whether there is anything but the pool; `Failure` where options do not go together."""
        from pagedkv.control.strategies import parse_strategy

        for flag, given in (("--tier-writes", self.writes), ("--exclusive", self.exclusive)):
            if given and self.tiers is None:
                raise Failure(f"{flag} needs --tiers")
        if self.exclusive and self.writes not in (None, "reclaim"):
            raise Failure(f"--exclusive goes with --tier-writes reclaim, got {self.writes}")
        require_choice("tier_writes", self.writes or "finish", ("finish", "reclaim", "second-hit"))
        try:
            parse_strategy(self.strategy)
        except InvalidOperation as error:
            raise Failure(f"--tier-strategy: {error.reason.removeprefix('strategy: ')}") from None
        return self.tiers is not None or self.restart_at is not None

    def made(self, trace: Trace) -> Tiers | None:
        """Return the tiers beneath the pool of every cell, if any."""
        from pagedkv.sim.sweeps import parse_moment, parse_tiers
        from pagedkv.sim.tiered import Tiers

        if not self.is_asked:
            return None
        levels = () if self.tiers is None else parse_tiers(self.tiers, trace.num_distinct, self.strategy)
        writes = self.writes or ("reclaim" if self.exclusive else "finish")
        restart_at = None if self.restart_at is None else parse_moment(self.restart_at, trace)
        return Tiers(self._in_time(levels), writes, self.exclusive, restart_at)

    def require_times(self, timing: Timing | None) -> None:
        """Refuse what says how fast tiers are without time, or without anything that takes time."""
        for flag, given in (("--tier-speeds", self.speeds), ("--tier-latencies", self.latencies)):
            if given is not None and (timing is None or self.tiers is None):
                raise Failure(f"{flag} needs --timed and --tiers")
        if self.speeds is not None and timing is not None and not timing.bytes_per_token:
            raise Failure("--tier-speeds needs --bytes-per-token")
        if self.restart_at is not None and timing is not None:
            raise Failure("--timed knows no restart: leave one of them out")

    def _in_time(self, levels: Sequence[TierSpec]) -> tuple[TierSpec, ...]:
        speeds = _by_medium("--tier-speeds", self.speeds, levels)
        latencies = _by_medium("--tier-latencies", self.latencies, levels)
        return tuple(
            replace(
                level,
                bytes_per_second=_speed(speeds.get(level.medium)),
                latency=_seconds(latencies.get(level.medium, "0")),
            )
            for level in levels
        )


def _by_medium(flag: str, text: str | None, levels: Sequence[TierSpec]) -> dict[str, str]:
    """Read ``host:25GB,disk:3GB``."""
    parts = [part.partition(":") for part in (text or "").split(",") if part.strip()]
    told = {medium.strip().lower(): value.strip() for medium, _, value in parts}
    known = [level.medium for level in levels]
    if not told.keys() <= set(known) or (text is not None and not told):
        raise Failure(f"{flag}: expected tiers of --tiers such as {known[0]}:…, got {text!r}")
    return told


def _speed(text: str | None) -> float | None:
    return None if text is None else _bytes("tier_speeds", text.removesuffix("/s"))


def _bytes(name: str, text: str) -> int:
    return require_size(name, int(text) if text.strip().isdecimal() else text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise Failure(f"--tier-latencies: expected seconds, got {text!r}") from None
    return require_number("tier_latencies", seconds, 0)
