"""Cache simulator: replay traces through the control plane that serves models, and plan the size of a cache.

The names are loaded when they are first used, so that the command's help stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.sim.curves import HitCurve, lru_curve, shards_curve
    from pagedkv.sim.optimum import optimal
    from pagedkv.sim.plan_types import FleetOptions, Hardware, Prices
    from pagedkv.sim.planner import plan
    from pagedkv.sim.queueing import Timing
    from pagedkv.sim.reading import read_trace
    from pagedkv.sim.replayer import ReplayResult, replay
    from pagedkv.sim.replicas import Fleet, FleetResult
    from pagedkv.sim.sweeps import sweep
    from pagedkv.sim.synth import synthesize
    from pagedkv.sim.tiered import Tiers, TierSpec
    from pagedkv.sim.trace import Trace, write_trace
    from pagedkv.sim.trace_stats import describe

__all__ = [
    "Fleet",
    "FleetOptions",
    "FleetResult",
    "Hardware",
    "HitCurve",
    "Prices",
    "ReplayResult",
    "TierSpec",
    "Tiers",
    "Timing",
    "Trace",
    "describe",
    "lru_curve",
    "optimal",
    "plan",
    "read_trace",
    "replay",
    "shards_curve",
    "sweep",
    "synthesize",
    "write_trace",
]

_HOMES = {
    "curves": ("HitCurve", "lru_curve", "shards_curve"),
    "optimum": ("optimal",),
    "plan_types": ("FleetOptions", "Hardware", "Prices"),
    "planner": ("plan",),
    "reading": ("read_trace",),
    "queueing": ("Timing",),
    "replayer": ("ReplayResult", "replay"),
    "replicas": ("Fleet", "FleetResult"),
    "sweeps": ("sweep",),
    "synth": ("synthesize",),
    "tiered": ("TierSpec", "Tiers"),
    "trace": ("Trace", "write_trace"),
    "trace_stats": ("describe",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pagedkv.sim' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pagedkv.sim.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
