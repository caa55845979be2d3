"""Fleets to order: replicas, routing and tiers replayed in time, and the cheapest that meets a target.

Every configuration is a replay of the whole trace on replicas that queue, load and compute (`pagedkv.sim.queueing`).
The cheapest are replayed first and the search ends with the first that meets what is wanted: whatever was not replayed
costs more, so nothing is guessed of it. Tiers of more blocks than the trace has are one tier.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from pagedkv.control.strategies import as_strategy
from pagedkv.errors import bad_argument
from pagedkv.format import counted, digits, duration, format_bytes, money, percent, share
from pagedkv.machine import usable_cores
from pagedkv.sim.baselines import LRU
from pagedkv.sim.curves import HitCurve
from pagedkv.sim.load import blocks_in
from pagedkv.sim.model_shape import ModelShape
from pagedkv.sim.plan_types import FleetOptions, FleetOutcome, FleetPlan, FleetSize, Hardware, Load
from pagedkv.sim.queueing import Timing, output_blocks
from pagedkv.sim.replayer import ReplayResult
from pagedkv.sim.replicas import Fleet
from pagedkv.sim.sweeps import Cell, run_in_processes, try_out
from pagedkv.sim.tiered import DISK, HOST, SHARED, Tiers, TierSpec
from pagedkv.sim.trace import MAX_BLOCKS, Trace
from pagedkv.validate import require_int

MAX_CANDIDATES = 500
_WORTH_PROCESSES = 1_000_000
"""Block accesses of all replays together, below which no other process is started."""


def plan_fleet(
    trace: Trace,
    model: ModelShape,
    hardware: Hardware,
    memory: int,
    options: FleetOptions,
    *,
    load: Load,
    curve: HitCurve,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FleetPlan:
    """Find the cheapest fleet that meets what is wanted.

    Parameters
    ----------
    trace : Trace
    model : ModelShape
    hardware : Hardware
        Of one replica.
    memory : int
        Bytes for the KV cache of one replica.
    options : FleetOptions
    load : Load
        Of the trace.
    curve : HitCurve
        Of LRU over one pool.
    jobs : int, optional
        Processes that replay; by default this one alone, or one a core for large traces.
    progress : callable, optional
        Called with (configurations replayed, configurations that may be).

    Returns
    -------
    FleetPlan

    Raises
    ------
    InvalidOperation
        If a memory does not hold one block, or more than 500 configurations are asked for.
    ReplayFailed
        If a replay failed, for instance in a user's routing policy.
    """
    search = _Search(trace, model, hardware, memory, options, load, curve)
    return search.plan(jobs, progress)


@dataclass(frozen=True, eq=False)
class _Search:
    """The configurations, and what was found of them."""

    trace: Trace
    model: ModelShape
    hardware: Hardware
    memory: int
    options: FleetOptions
    load: Load
    curve: HitCurve

    def plan(self, jobs: int | None, progress: Callable[[int, int], None] | None) -> FleetPlan:
        sizes = self.sizes()
        if len(sizes) > MAX_CANDIDATES:
            raise bad_argument("replicas", f"at most {MAX_CANDIDATES} configurations in all", f"{len(sizes)}")
        least = tuple(min(getattr(self.options, tier)) for tier in ("host_memory", "disk", "shared"))
        first = [size for size in sizes if (size.host_bytes, size.disk_bytes, size.shared_bytes) == least]
        found = self.found(first, {}, jobs, progress, len(sizes), to_the_end=True)
        found = self.found(sizes, found, jobs, progress, len(sizes), to_the_end=False)
        # Several processes may have been at more than was needed: what is told does not depend on their number.
        limit = min((self.rank(size) for size, outcome in found.items() if outcome.meets), default=(math.inf,))
        outcomes = tuple(found[size] for size in sizes if size in found and (size in first or self.rank(size) <= limit))
        met = [outcome for outcome in outcomes if outcome.meets]
        best = min(
            met, key=lambda each: (*self.rank(each.size), each.ttft_p99, each.ttft_p50, -each.share), default=None
        )
        nearest = best or min(outcomes, key=lambda each: (*self.lacking(each), *self.rank(each.size), each.ttft_p50))
        made = FleetPlan(
            options=self.options,
            prefill_tokens_per_second=self.timing.prefill_tokens_per_second,
            decode_tokens_per_second=self.timing.decode_tokens_per_second,
            one_pool=tuple(self.one_pool(replicas) for replicas in sorted(set(self.options.replicas))),
            outcomes=outcomes,
            candidates=len(sizes),
            best=best,
            nearest=nearest,
            verdict="",
        )
        return replace(made, verdict=_ordered(made) if best else self.lacks(made))

    def sizes(self) -> list[FleetSize]:
        """Return every configuration once, the cheapest first; of one replica there is but one routing."""
        options, most = self.options, self.trace.num_distinct * self.bytes_per_block
        made, seen = [], set()
        tiers = list(product(*(sorted(set(tier)) for tier in (options.host_memory, options.disk, options.shared))))
        for replicas, routing, (host, disk, shared) in product(options.replicas, options.routings, tiers):
            routing = routing if replicas > 1 else options.routings[0]
            size = FleetSize(replicas, routing, self.memory, host, disk, shared)
            same = (replicas, routing, min(host, most), min(disk, most), min(shared, most))
            if same not in seen:
                seen.add(same)
                made.append(size)
        return sorted(made, key=self.rank)

    def rank(self, size: FleetSize) -> tuple[float, ...]:
        """Return what orders configurations by their cost; at the same cost the smaller one comes first."""
        memory = size.replicas * size.host_bytes + size.shared_bytes
        return round(size.cost(self.options.prices), 9), size.replicas, memory, size.replicas * size.disk_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.trace.block_tokens * self.model.bytes_per_token

    @property
    def timing(self) -> Timing:
        flops = float(self.model.prefill_flops(self.trace.input_tokens).sum())
        return Timing(
            self.trace.num_tokens * self.hardware.flops_per_second / max(flops, 1e-300),
            self.hardware.decode_tokens_per_second,
            float(self.model.bytes_per_token),
        )

    def largest(self, replicas: int) -> int:
        """Return the bytes of a pool that holds the largest request with its answer, beside windows and states."""
        needs = np.diff(self.trace.offsets) + output_blocks(self.trace)
        return int(needs.max()) * self.bytes_per_block + -(-self.load.window_bytes // replicas)

    def pool_blocks(self, replicas: int) -> int:
        """Return the blocks of one pool, beside its part of the windows and states of running requests."""
        part = replace(self.load, window_bytes=-(-self.load.window_bytes // replicas))
        return blocks_in(self.memory, self.trace, self.model, part)

    def cell(self, size: FleetSize) -> Cell:
        """Return the replay of a configuration."""
        options, levels = self.options, []
        for name, medium, num_bytes, rate in (
            ("host_memory", HOST, size.host_bytes, options.host_read),
            ("disk", DISK, size.disk_bytes, options.disk_read),
            ("shared", SHARED, size.shared_bytes, options.shared_read),
        ):
            if num_bytes:
                if num_bytes < self.bytes_per_block:
                    raise bad_argument(
                        name, f"0, or at least a block of {format_bytes(self.bytes_per_block)}", f"{num_bytes}"
                    )
                each = min(num_bytes // self.bytes_per_block, max(1, self.trace.num_distinct))
                blocks = each if medium == SHARED else each * size.replicas
                levels.append(TierSpec(medium, min(blocks, MAX_BLOCKS), bytes_per_second=rate))
        blocks = min(self.pool_blocks(size.replicas) * size.replicas, MAX_BLOCKS)
        fleet = Fleet(size.replicas, size.routing)
        return Cell(LRU, as_strategy(LRU), blocks, self.timing, Tiers(tuple(levels)), fleet)

    def found(
        self,
        sizes: Sequence[FleetSize],
        found: dict[FleetSize, FleetOutcome],
        jobs: int | None,
        progress: Callable[[int, int], None] | None,
        asked: int,
        *,
        to_the_end: bool,
    ) -> dict[FleetSize, FleetOutcome]:
        """Replay configurations, the cheapest first; unless `to_the_end`, none dearer than one that will do."""
        found = dict(found)
        limit = min((self.rank(size) for size, outcome in found.items() if outcome.meets), default=None)
        left = [
            size for size in sizes if size not in found and (to_the_end or limit is None or self.rank(size) <= limit)
        ]
        cells = [self.cell(size) for size in left]
        pending = dict(enumerate(left))
        if progress:
            progress(len(found), asked)
        with closing(_replayed(self.trace, cells, jobs)) as outcomes:
            for place, result in outcomes:
                size = pending.pop(place)
                found[size] = self.outcome(size, result)
                if progress:
                    progress(len(found), asked)
                if found[size].meets and not to_the_end:
                    limit = min(limit or self.rank(size), self.rank(size))
                    if all(self.rank(other) > limit for other in pending.values()):
                        break
        return found

    def outcome(self, size: FleetSize, result: ReplayResult) -> FleetOutcome:
        """Return what a replay says of a configuration."""
        service = (result.ttft - result.queueing)[~np.isnan(result.ttft)]
        attainable = int(self.curve.hit_blocks[-1])
        made = FleetOutcome(
            size=size,
            cost=size.cost(self.options.prices),
            hit_ratio=result.hit_ratio,
            share=result.hit_blocks / attainable if attainable else 1.0,
            ttft_p50=result.ttft_percentile(50),
            ttft_p99=result.ttft_percentile(99),
            service_p99=float(np.percentile(service, 99, method="inverted_cdf")) if len(service) else math.nan,
            queueing=result.mean_queueing,
            utilisation=float(result.utilisation.max(initial=0.0)),
            refused=result.refused,
            meets=False,
        )
        return replace(made, meets=not any(self.lacking(made)))

    def lacking(self, outcome: FleetOutcome) -> tuple[int, float]:
        """Return what a configuration lacks: requests refused, then how far it is from both targets; zeros if nothing.

        The share is lacking in parts of what is wanted, the time in doublings.
        """
        options = self.options
        share = 0.0 if options.share is None else max(0.0, options.share - outcome.share - 1e-12) / options.share
        late = 0.0
        if options.ttft_p99 is not None and not outcome.ttft_p99 <= options.ttft_p99:
            late = math.inf if math.isnan(outcome.ttft_p99) else math.log2(outcome.ttft_p99 / options.ttft_p99)
        return outcome.refused, share + late

    def one_pool(self, replicas: int) -> float:
        """Return the share of the attainable that one pool of so many replicas' memory finds under LRU."""
        blocks = self.pool_blocks(replicas) * replicas
        place = int(np.searchsorted(self.curve.blocks, blocks, side="right")) - 1
        attainable = int(self.curve.hit_blocks[-1])
        return int(self.curve.hit_blocks[place]) / attainable if attainable else 1.0

    def lacks(self, plan: FleetPlan) -> str:
        """Say that nothing will do, what comes nearest, what it lacks, and what would help."""
        near, options = plan.nearest, self.options
        faults, helps = [], []
        if near.refused:
            faults.append(f"it refuses {counted(near.refused, 'request')} larger than a pool")
            helps.append(f"a pool of at least {format_bytes(self.largest(near.size.replicas))} for each replica")
        if options.share is not None and near.share < options.share:
            faults.append(f"it finds {percent(near.share)} of the attainable instead of {share(options.share)}")
            helps.append(self.more_found(near, options.share))
        if options.ttft_p99 is not None and near.ttft_p99 > options.ttft_p99:
            faults.append(f"its p99 TTFT is {duration(near.ttft_p99)} instead of {duration(options.ttft_p99)}")
            helps.append(_sooner(near, options.ttft_p99))
        none = f"None of the {counted(plan.candidates, 'configuration')} gives {wanted(options)}. Nearest comes this"
        if plan.candidates == 1:
            none = f"The one configuration that was asked for does not give {wanted(options)}. It is this"
        return (
            f"{none}: {_told(near)}{_priced(plan)}; but {' and '.join(faults)}. "
            f"What would help: {'; '.join(dict.fromkeys(helps))}."
        )

    def more_found(self, near: FleetOutcome, wanted: float) -> str:
        """Say what would let more be found."""
        size, hits = near.size, max(1, math.ceil(wanted * int(self.curve.hit_blocks[-1]) - 1e-9))
        blocks = int(self.curve.blocks[np.searchsorted(self.curve.hit_blocks, hits)])
        needed = blocks * self.bytes_per_block
        held = max(size.replicas * max(size.pool_bytes, size.host_bytes, size.disk_bytes), size.shared_bytes)
        needs, has = format_bytes(needed), format_bytes(held)
        if held < needed:
            each = f", {format_bytes(needed / size.replicas)} for each replica" if size.replicas > 1 else ""
            return f"more memory or disk: one pool needs {needs} for that{each}, and {has} are there"
        if size.replicas > 1 and not size.shared_bytes:
            return f"a shared tier: {needs} in one place do, and {has} are there in {size.replicas}"
        return "a larger pool, as running requests take the room of what would be found"


def _sooner(near: FleetOutcome, wanted: float) -> str:
    """Say what would bring the first token sooner."""
    if near.service_p99 <= wanted:
        return f"more replicas, as without a queue the p99 is {duration(near.service_p99)}"
    times = digits(near.service_p99 / wanted)
    return (
        f"a replica that computes {times} times as fast (more GPUs for each, weights of fewer bits), as without any "
        f"queue the p99 is still {duration(near.service_p99)}"
    )


def _ordered(plan: FleetPlan) -> str:
    """Say what to order."""
    best = plan.nearest
    left = plan.candidates - len(plan.outcomes)
    others = f"; the other {left} cost more" if left else ""
    return (
        f"{_told(best)}: {percent(best.share)} of the attainable, p99 TTFT {soon(best.ttft_p99)}{_priced(plan)}. "
        f"It is the cheapest that gives {wanted(plan.options)}: {len(plan.outcomes)} of "
        f"{counted(plan.candidates, 'configuration')} were replayed{others}."
    )


def _priced(plan: FleetPlan) -> str:
    return f", {money(plan.nearest.cost)} an hour" if plan.options.prices.are_given else ""


def soon(seconds: float) -> str:
    """Return a time in which something comes; "never" where it did not."""
    return "never" if math.isnan(seconds) else duration(seconds)


def wanted(options: FleetOptions) -> str:
    """Return in words what a fleet must reach."""
    found = None if options.share is None else f"{share(options.share)} of the attainable"
    soon = None if options.ttft_p99 is None else f"a p99 TTFT of {duration(options.ttft_p99)}"
    return " and ".join(filter(None, (found, soon)))


def beneath(size: FleetSize) -> str:
    """Return in words what lies beneath the pools of a fleet."""
    own = [f"{format_bytes(size.host_bytes)} RAM"] if size.host_bytes else []
    own += [f"{format_bytes(size.disk_bytes)} disk"] if size.disk_bytes else []
    each = " each" if size.replicas > 1 and own else ""
    shared = [f"{format_bytes(size.shared_bytes)} shared"] if size.shared_bytes else []
    return ", ".join(filter(None, (" + ".join(own) + each, *shared)))


def _told(outcome: FleetOutcome) -> str:
    size = outcome.size
    routing = f", {size.routing} routing" if size.replicas > 1 else ""
    tiers = beneath(size) or "no tiers"
    return f"{counted(size.replicas, 'replica')}{routing}, {tiers}"


def _replayed(trace: Trace, cells: Sequence[Cell], jobs: int | None) -> Generator[tuple[int, ReplayResult]]:
    """Replay cells in their order, in this process or in others; who has heard enough closes it."""
    if jobs is None:
        jobs = usable_cores() if len(cells) * trace.num_accesses >= _WORTH_PROCESSES else 1
    jobs = max(1, min(require_int("jobs", jobs, 1, 2**16), len(cells)))
    try_out(trace, cells)
    if jobs == 1:
        yield from ((place, cell.replay(trace)) for place, cell in enumerate(cells))
        return
    with tempfile.TemporaryDirectory(prefix="pagedkv-") as folder:
        trace.save(Path(folder))
        yield from run_in_processes(Path(folder), cells, jobs)
