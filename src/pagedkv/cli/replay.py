"""``pagedkv replay``: hit ratios of a trace by strategy and capacity."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pagedkv.cli.replay_options import Tiering, fleets_of, strategies_of, timing_of
from pagedkv.cli.terminal import (
    BlockTokensOption,
    DebugOption,
    Failure,
    FormatOption,
    HtmlOption,
    JobsOption,
    JsonOption,
    SkipBadOption,
    TraceArgument,
    command_line,
    failures_in_one_line,
    notes,
    option,
    output,
    print_json,
    progress_bar,
    require_writable,
    write_file,
)
from pagedkv.format import duration
from pagedkv.sim.baselines import LRU, OPTIMAL

if TYPE_CHECKING:
    from pagedkv.sim.curves import HitCurve
    from pagedkv.sim.measures import Measure, Measures
    from pagedkv.sim.queueing import Timing
    from pagedkv.sim.replayer import ReplayResult
    from pagedkv.sim.tiered import Tiers
    from pagedkv.sim.trace import Trace


# The options of ``pagedkv replay``. What the command needs is imported when it runs.

EXAMPLES = """Replay a trace of real requests and count the cache hits, for every strategy and capacity.

[bold]Examples[/bold]

  pagedkv replay chat.jsonl.gz --blocks 1k,10k --strategies lru,lfu,optimal

  pagedkv replay chat.jsonl.gz --strategies all --curve --html report.html

  pagedkv replay chat.jsonl.gz --blocks 10%,50% --strategy-from mine:Best --json

  pagedkv replay chat.jsonl.gz --blocks 20k --timed --prefill-rate 8000

  pagedkv replay chat.jsonl.gz --blocks 2k --tiers host:10k,disk:25% --restart-at 50%

  pagedkv replay chat.jsonl.gz --blocks 20k --replicas 1,8 --routing round_robin,sticky,prefix

  pagedkv replay chat.jsonl.gz --blocks 20k --replicas 2,8 --tiers host:50k,shared:200k --timed

A hit is a block of a request's longest cached prefix. The results go to stdout, everything else to stderr.
"""

_WHAT, _TIME, _TIERS, _OUTPUT = "What to replay", "In time", "Tiers beneath the pool", "What to show"
_FLEET = "On a fleet"


def replay(
    context: typer.Context,
    trace: TraceArgument,
    blocks: Annotated[
        str,
        option(
            "--blocks",
            "-b",
            help="Capacities: blocks (1000, 10k, 1.5m), a share of the distinct blocks (25%), auto for eight sizes.",
            panel=_WHAT,
        ),
    ] = "auto",
    strategies: Annotated[
        str | None,
        option(
            "--strategies",
            "-s",
            help="What is evicted first: registered names, optimal for Belady's optimum, or all.",
            default="lru,fifo,lfu,s3fifo,adaptive,optimal; lru with --replicas",
            panel=_WHAT,
        ),
    ] = None,
    strategy_from: Annotated[
        list[str] | None,
        option(
            "--strategy-from", help="A strategy of your own, module:Class; may be repeated.", default=False, panel=_WHAT
        ),
    ] = None,
    curve: Annotated[bool, option("--curve", help="Add the exact LRU curve over all capacities.", panel=_WHAT)] = False,
    format: FormatOption = None,
    block_tokens: BlockTokensOption = None,
    skip_bad: SkipBadOption = False,
    timed: Annotated[
        bool,
        option(
            "--timed", help="Requests hold their blocks while they are served; first tokens are timed.", panel=_TIME
        ),
    ] = False,
    prefill_tokens_per_second: Annotated[
        float | None,
        option("--prefill-rate", help="Prompt tokens per second of a request.", default="10000", panel=_TIME),
    ] = None,
    decode_tokens_per_second: Annotated[
        float | None,
        option("--decode-rate", help="New tokens per second of a request.", default="50", panel=_TIME),
    ] = None,
    bytes_per_token: Annotated[
        str | None,
        option(
            "--bytes-per-token", help="Of keys and values: 160KB. Loads take time by it.", default=False, panel=_TIME
        ),
    ] = None,
    tier_speeds: Annotated[
        str | None,
        option(
            "--tier-speeds",
            help="Bytes a second that a replica loads from each tier: host:25GB,shared:2GB.",
            default="at once",
            panel=_TIME,
        ),
    ] = None,
    tier_latencies: Annotated[
        str | None,
        option(
            "--tier-latencies",
            help="Seconds before each load begins: disk:0.0002,shared:0.002.",
            default="0",
            panel=_TIME,
        ),
    ] = None,
    tiers: Annotated[
        str | None,
        option(
            "--tiers",
            help="host, disk, shared (one for all replicas), the fastest first, sized as --blocks is: disk:100k.",
            default=False,
            panel=_TIERS,
        ),
    ] = None,
    tier_writes: Annotated[
        str | None,
        option(
            "--tier-writes",
            help="When a chain is stored: finish (its request ends), reclaim (the level above drops it), second-hit.",
            default="finish; reclaim with --exclusive",
            panel=_TIERS,
        ),
    ] = None,
    exclusive: Annotated[
        bool, option("--exclusive", help="What is loaded leaves the tier, and comes back when reclaimed.", panel=_TIERS)
    ] = False,
    tier_strategy: Annotated[
        str, option("--tier-strategy", help="What a full tier gives up first: a registered name.", panel=_TIERS)
    ] = LRU,
    restart_at: Annotated[
        str | None,
        option(
            "--restart-at",
            help="Empty the pool and the host tier there: 50% of the requests, or 90s, 30min, 1h into the trace.",
            default=False,
            panel=_TIERS,
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        option("--replicas", help="Replicas that share all blocks in equal parts: 8, or 1,2,4,8.", panel=_FLEET),
    ] = None,
    routing: Annotated[
        str | None,
        option(
            "--routing",
            help="Which replica serves a request: round_robin, least_load, sticky, prefix, or module:Class.",
            default="all four",
            panel=_FLEET,
        ),
    ] = None,
    jobs: JobsOption = None,
    ray: Annotated[bool, option("--ray", help="Replay as tasks of a running Ray cluster.", panel="How")] = False,
    json: JsonOption = False,
    csv: Annotated[
        str | None,
        option("--csv", help="Write the cells to this file; - for stdout, instead.", default=False, panel=_OUTPUT),
    ] = None,
    html: HtmlOption = None,
    debug: DebugOption = False,
) -> None:
    """Read the trace, replay every cell, show and write the results."""
    with failures_in_one_line(debug, context):
        from pagedkv.sim.curves import lru_curve
        from pagedkv.sim.reading import read_trace
        from pagedkv.sim.sweeps import parse_capacities, sweep

        if json and csv == "-":
            raise Failure("--json and --csv - both want stdout; give --csv a file")
        require_writable("--html", html)
        require_writable("--csv", None if csv in (None, "-") else Path(csv))
        asked = Tiering(tiers, tier_writes, exclusive, tier_strategy, restart_at, tier_speeds, tier_latencies)
        fleets = fleets_of(replicas, routing)
        names = strategies_of(strategies, strategy_from or [], timed, asked.is_asked, fleets)
        timing = timing_of(timed, prefill_tokens_per_second, decode_tokens_per_second, bytes_per_token)
        asked.require_times(timing)
        console = notes()
        with progress_bar(console) as bar:
            read = read_trace(
                trace, format=format, block_tokens=block_tokens, skip_bad=skip_bad, progress=bar("reading")
            )
            if read.num_skipped:
                console.print(f"{read.num_skipped:,} broken records skipped", style="yellow")
            if not read.num_requests:
                raise Failure(f"TRACE: expected requests, {trace} has none")
            capacities = parse_capacities(blocks, read.num_distinct) if read.has_content else [1]
            beneath = asked.made(read) if read.has_content else None
            show = bar("replaying")
            replay_all = partial(sweep, jobs=jobs, ray=ray, timing=timing, tiers=beneath, fleets=fleets, progress=show)
            results = replay_all(read, names, capacities)
            is_plain = timing is None and beneath is None and not fleets
            lru = lru_curve(read) if curve or (html is not None and is_plain) else None
        if html is not None:
            from pagedkv.sim.report import replay_report

            of_pool = lru if beneath is None and not fleets else None  # what tiers find is on no curve of one pool
            write_file("--html", html, replay_report(read, results, curve=of_pool, command=command_line(context)))
        if csv is not None:
            _write_csv(results, timing is not None, csv)
        shown = lru if curve else None
        if json:
            print_json(_replay_facts(read, results, shown, timing, beneath))
        elif csv != "-":
            _print_tables(read, results, shown, timing, beneath, output())


# Replays as tables: a column for every capacity, a row for every strategy under each measure.

_COLUMN_WIDTH = 12
BEST = "*"


def _told_tiers(tiers: Tiers, trace: Trace) -> str:
    """Say in a line what lies beneath the pool."""
    levels = [f"a {tier.medium} tier of {tier.blocks:,} blocks ({tier.strategy})" for tier in tiers.levels]
    kind = "exclusive" if tiers.exclusive else f"written on {tiers.writes}"
    parts = [f"{' and '.join(levels)}, {kind}"] if levels else []
    if tiers.restart_at is not None and tiers.restart_at < trace.num_requests:
        at = duration(float(trace.times[tiers.restart_at]))
        parts.append(f"a restart before request {tiers.restart_at + 1:,}, at {at}")
    return "; ".join(parts) if parts else "the restart lies behind the last request"


def _cell_tables(results: Sequence[ReplayResult], width: int) -> Iterator[Table | Text]:
    """Lay out the results, in as many tables beneath each other as the width of the terminal asks for."""
    from pagedkv.sim.measures import Measures

    shown = Measures(results)
    names = max(max(map(len, shown.strategies), default=0) + 2, 20)
    per_table = max(1, (width - names) // _COLUMN_WIDTH)
    for first in range(0, len(shown.capacities), per_table):
        yield _cell_table(shown, shown.capacities[first : first + per_table])
    if any(shown.best(shown.measures[0], blocks) is not None for blocks in shown.capacities):
        yield Text(f"{BEST} the best of its column, the optimum left out", style="dim")


def _cell_table(shown: Measures, capacities: list[int]) -> Table:
    table = _table("blocks", *(Column(f"{blocks:,}", justify="right", no_wrap=True) for blocks in capacities))
    for measure in shown.measures:
        rows = shown.rows(measure, capacities)
        if not rows:
            continue
        table.add_row(Text(measure.title, style="dim italic"))
        best = [shown.best(measure, blocks) for blocks in capacities]
        for name, values in rows:
            rivals = [None] * len(values) if name == OPTIMAL else best
            table.add_row(Text(f"  {name}"), *map(partial(_written, measure), values, rivals))
    return table


def _table(*headings: Column | str, title: str | None = None) -> Table:
    return Table(
        *headings,
        box=None,
        padding=(0, 2, 0, 0),
        show_edge=False,
        header_style="bold",
        title=title,
        title_justify="left",
    )


def _written(measure: Measure, value: float | None, best: float | None) -> Text:
    text = measure.written(value)
    if value is not None and value == best:
        return Text(f"{text} {BEST}", style="bold")
    return Text(f"{text}  " if measure.marks_best and value is not None else text)


def _curve_table(curve: CurveFacts) -> Table:
    headings = [Column(name, justify="right", no_wrap=True) for name in ("blocks", "hit ratio", "token hit ratio")]
    table = _table(*headings, title="the exact LRU curve")
    for blocks, ratio, token_ratio in zip(curve.blocks, curve.hit_ratio, curve.token_hit_ratio, strict=True):
        table.add_row(f"{blocks:,}", f"{ratio:.2%}", f"{token_ratio:.2%}")
    return table


# What ``pagedkv replay`` shows and writes: tables, one JSON object, CSV.

_POINTS_PER_DOUBLING = 8


class TierFacts(msgspec.Struct):
    """What a tier did in one replay; `written_share` is of all blocks that requests touched."""

    medium: str
    hit_blocks: int
    hit_ratio: float
    hit_tokens: int
    token_hit_ratio: float
    written: int
    written_share: float


class RestartFacts(msgspec.Struct):
    """What the tenth of the requests after a restart found; `request` is the first of them, from 0."""

    request: int
    requests: int
    accesses: int
    hit_blocks: int
    hit_ratio: float


class FleetFacts(msgspec.Struct):
    """The replicas of one replay: how many, how routed, and what the busiest computed over the mean of all."""

    replicas: int
    routing: str
    busiest: float


class WaitFacts(msgspec.Struct):
    """Seconds to the first token, by percentile, and in the queue; the share of the time that each replica works."""

    ttft_p50: float | None
    ttft_p90: float | None
    ttft_p99: float | None
    mean_queueing: float | None
    utilisation: list[float]


class CellFacts(msgspec.Struct):
    """One replay; what has a default with ``--timed``, tiers, a restart or replicas only."""

    strategy: str
    blocks: int
    accesses: int
    hit_blocks: int
    hit_ratio: float
    token_hit_ratio: float
    reclaimed: int
    seconds: float
    preempted: int | msgspec.UnsetType = msgspec.UNSET
    refused: int | msgspec.UnsetType = msgspec.UNSET
    pool_hit_blocks: int | msgspec.UnsetType = msgspec.UNSET
    pool_hit_ratio: float | msgspec.UnsetType = msgspec.UNSET
    tiers: list[TierFacts] | msgspec.UnsetType = msgspec.UNSET
    restart: RestartFacts | None | msgspec.UnsetType = msgspec.UNSET
    fleet: FleetFacts | None | msgspec.UnsetType = msgspec.UNSET
    attained: float | None | msgspec.UnsetType = msgspec.UNSET
    waits: WaitFacts | msgspec.UnsetType = msgspec.UNSET


class TraceFacts(msgspec.Struct):
    """The trace that was replayed; `attainable_hit_ratio` is that of a cache without a limit."""

    name: str
    format: str
    block_tokens: int
    requests: int
    accesses: int
    distinct_blocks: int
    tokens: int
    attainable_hit_ratio: float
    skipped: int
    reordered: int


class CurveFacts(msgspec.Struct):
    """The exact LRU curve at some capacities, those of the cells among them."""

    blocks: list[int]
    hit_ratio: list[float]
    token_hit_ratio: list[float]


class TierGiven(msgspec.Struct):
    """A tier that was asked for; how fast it is with ``--timed`` only."""

    medium: str
    blocks: int
    strategy: str
    bytes_per_second: float | None | msgspec.UnsetType = msgspec.UNSET
    latency: float | msgspec.UnsetType = msgspec.UNSET


class TiersGiven(msgspec.Struct):
    """The tiers that were asked for, and how they are used; `restart_at` is the first request after the restart."""

    levels: list[TierGiven]
    writes: str
    exclusive: bool
    restart_at: int | None


class ReplayFacts(msgspec.Struct):
    """What ``pagedkv replay --json`` prints; the last three with ``--timed``, ``--curve`` and ``--tiers`` only."""

    cells: list[CellFacts]
    trace: TraceFacts
    timing: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    curve: CurveFacts | msgspec.UnsetType = msgspec.UNSET
    tiers: TiersGiven | msgspec.UnsetType = msgspec.UNSET


def _replay_facts(
    trace: Trace,
    results: Sequence[ReplayResult],
    curve: HitCurve | None,
    timing: Timing | None,
    tiers: Tiers | None,
) -> ReplayFacts:
    facts = ReplayFacts(_cells(results, timing is not None), _trace(trace))
    if tiers is not None:
        levels = [TierGiven(tier.medium, tier.blocks, str(tier.strategy)) for tier in tiers.levels]
        if timing is not None:
            for given, tier in zip(levels, tiers.levels, strict=True):
                given.bytes_per_second, given.latency = tier.bytes_per_second, tier.latency
        facts.tiers = TiersGiven(levels, tiers.writes, tiers.exclusive, tiers.restart_at)
    if timing is not None:
        facts.timing = msgspec.to_builtins(timing)
    if curve is not None:
        facts.curve = _curve(curve, [result.blocks for result in results])
    return facts


def _print_tables(
    trace: Trace,
    results: Sequence[ReplayResult],
    curve: HitCurve | None,
    timing: Timing | None,
    tiers: Tiers | None,
    console: Console,
) -> None:
    """Show the trace in a line, and the results as tables that fit the terminal."""
    facts = _trace(trace)
    console.print(
        Text(
            f"{facts.name}: {facts.requests:,} requests, {facts.accesses:,} block accesses, {facts.distinct_blocks:,} "
            f"distinct blocks of {facts.block_tokens:,} tokens; at most {facts.attainable_hit_ratio:.2%} can be found"
        ),
        soft_wrap=True,
    )
    if tiers is not None:
        console.print(Text(f"beneath the pool {_told_tiers(tiers, trace)}"), soft_wrap=True)
    for table in _cell_tables(results, console.width):
        console.print(table)
    if curve is not None:
        console.print(_curve_table(_curve(curve, [result.blocks for result in results], 1)))


def _write_csv(results: Sequence[ReplayResult], timed: bool, file: str) -> None:
    """Write a line for every cell to a file, or to stdout for ``-``."""
    text = io.StringIO(newline="")
    rows = [_columns(cell) for cell in _cells(results, timed)]
    writer = csv.DictWriter(text, list(dict.fromkeys(chain.from_iterable(rows))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if file == "-":
        sys.stdout.write(text.getvalue())
    else:
        write_file("--csv", Path(file), text.getvalue())


def _cells(results: Sequence[ReplayResult], timed: bool) -> list[CellFacts]:
    cells = [msgspec.convert(result, CellFacts, from_attributes=True) for result in results]
    for cell, result in zip(cells, results, strict=True):
        if timed:
            cell.waits = _waits(result)
        else:
            cell.preempted = cell.refused = msgspec.UNSET
        if not cell.tiers and not cell.restart:
            cell.pool_hit_blocks = cell.pool_hit_ratio = cell.tiers = cell.restart = msgspec.UNSET
        cell.fleet = cell.fleet or msgspec.UNSET
        cell.attained = msgspec.UNSET if cell.attained is None else cell.attained
    return cells


def _waits(result: ReplayResult) -> WaitFacts:
    seconds = [*map(result.ttft_percentile, (50, 90, 99)), result.mean_queueing]
    half, most, nearly_all, queueing = (None if value != value else value for value in seconds)
    return WaitFacts(half, most, nearly_all, queueing, result.utilisation.tolist())


def _columns(cell: CellFacts) -> dict[str, object]:
    """Return a cell as a flat row: ``disk_hit_blocks`` is that of its disk tier."""
    row: dict[str, object] = msgspec.to_builtins(cell)
    for key in ("tiers", "restart", "fleet", "waits"):
        row.pop(key, None)
    for tier in cell.tiers or ():
        row |= {f"{tier.medium}_{key}": value for key, value in msgspec.to_builtins(tier).items() if key != "medium"}
    if cell.restart:
        row |= {f"restart_{key}": value for key, value in msgspec.to_builtins(cell.restart).items()}
    if cell.fleet:
        row |= msgspec.to_builtins(cell.fleet)
    if cell.waits:
        row |= msgspec.to_builtins(cell.waits) | {"utilisation": " ".join(map(str, cell.waits.utilisation))}
    return row


def _trace(trace: Trace) -> TraceFacts:
    return TraceFacts(
        name=trace.name,
        format=trace.format,
        block_tokens=trace.block_tokens,
        requests=trace.num_requests,
        accesses=trace.num_accesses,
        distinct_blocks=trace.num_distinct,
        tokens=trace.num_tokens,
        attainable_hit_ratio=trace.attainable_hit_ratio,
        skipped=trace.num_skipped,
        reordered=trace.num_reordered,
    )


def _curve(curve: HitCurve, asked: Sequence[int], per_doubling: int = _POINTS_PER_DOUBLING) -> CurveFacts:
    import numpy as np

    last = max(1, int(curve.blocks[-1]))
    doublings = np.arange(0, int(np.log2(last) * per_doubling) + 1) / per_doubling
    blocks = np.unique(np.concatenate([np.round(2**doublings), [last], asked]).astype(np.int64))
    return CurveFacts(
        blocks=blocks.tolist(),
        hit_ratio=curve.at(blocks).tolist(),
        token_hit_ratio=curve.at(blocks, tokens=True).tolist(),
    )
