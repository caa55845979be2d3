"""The options of ``pagedkv replay``. What the command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pagedkv.cli.options import option
from pagedkv.cli.terminal import failures_in_one_line

__all__ = ["EXAMPLES", "replay"]

EXAMPLES = """Replay a trace of real requests and count the cache hits, for every strategy and capacity.

[bold]Examples[/bold]

  pagedkv replay chat.jsonl.gz --blocks 1k,10k --strategies lru,lfu,optimal

  pagedkv replay chat.jsonl.gz --strategies all --curve --html report.html

  pagedkv replay chat.jsonl.gz --blocks 10%,50% --strategy-from mine:Best --json

  pagedkv replay chat.jsonl.gz --blocks 20k --timed --prefill-rate 8000

A hit is a block of a request's longest cached prefix. The results go to stdout, everything else to stderr.
"""

_WHAT, _TRACE, _TIME, _HOW, _OUTPUT = "What to replay", "The trace", "In time", "How", "What to show"


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace in any known format, gzipped or not.")],
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
            help="What is given up first: registered names, optimal for Belady's optimum, or all.",
            default="lru,fifo,lfu,s3fifo,adaptive,optimal",
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
    format: Annotated[
        str | None, option("--format", help="The format of the trace.", default="recognised", panel=_TRACE)
    ] = None,
    block_tokens: Annotated[
        int | None,
        option("--block-tokens", help="Tokens per block.", default="what the format says", panel=_TRACE),
    ] = None,
    skip_bad: Annotated[
        bool, option("--skip-bad", help="Count broken lines and go on without them.", panel=_TRACE)
    ] = False,
    timed: Annotated[
        bool,
        option("--timed", help="Requests hold their blocks while they are served, and may be preempted.", panel=_TIME),
    ] = False,
    prefill_rate: Annotated[
        float | None,
        option("--prefill-rate", help="Prompt tokens per second of a request.", default="10000", panel=_TIME),
    ] = None,
    decode_rate: Annotated[
        float | None,
        option("--decode-rate", help="New tokens per second of a request.", default="50", panel=_TIME),
    ] = None,
    jobs: Annotated[
        int | None, option("--jobs", "-j", help="Processes.", default="one a core, if it is worth it", panel=_HOW)
    ] = None,
    ray: Annotated[bool, option("--ray", help="Replay as tasks of a running Ray cluster.", panel=_HOW)] = False,
    json: Annotated[bool, option("--json", help="Print one JSON object instead of the table.", panel=_OUTPUT)] = False,
    csv: Annotated[
        str | None,
        option("--csv", help="Write the cells to this file; - for stdout, instead.", default=False, panel=_OUTPUT),
    ] = None,
    html: Annotated[
        Path | None, option("--html", help="Write a report to this file.", default=False, panel=_OUTPUT)
    ] = None,
    debug: Annotated[bool, option("--debug", help="Show the traceback of an error.", panel=_OUTPUT)] = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        from pagedkv.cli.replay import ReplayRequest, run

        run(
            ReplayRequest(
                trace=trace,
                blocks=blocks,
                strategies=strategies,
                strategies_from=tuple(strategy_from or ()),
                curve=curve,
                format=format,
                block_tokens=block_tokens,
                skip_bad=skip_bad,
                timed=timed,
                prefill_rate=prefill_rate,
                decode_rate=decode_rate,
                jobs=jobs,
                ray=ray,
                json=json,
                csv=csv,
                html=html,
            )
        )
