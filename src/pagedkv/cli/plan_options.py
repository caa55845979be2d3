"""The options of ``pagedkv plan``. What the command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pagedkv.cli.options import option
from pagedkv.cli.terminal import failures_in_one_line

__all__ = ["EXAMPLES", "plan"]

EXAMPLES = """Say how much KV cache a model needs for real traffic, what it saves, and what holds it back.

[bold]Examples[/bold]

  pagedkv plan trace.jsonl.gz --model llama-3.1-8b

  pagedkv plan trace.jsonl.gz --model ./my-model --target 0.95 --memory 40GiB

  pagedkv plan trace.jsonl --model qwen3-8b --kv-dtype fp8 --strategies lru,s3fifo --html plan.html

  pagedkv plan trace.jsonl --model config.json --tflops 990 --mfu 0.4 --json

The model is a config.json, a folder with one, JSON text, or the name of a known shape; no weights are read.
"""

_WHAT, _MODEL, _TRACE, _RATE, _OUTPUT = "What to plan", "The model", "The trace", "The hardware", "What to show"


def plan(
    trace: Annotated[Path, typer.Argument(help="A trace in any known format, gzipped or not.", show_default=False)],
    model: Annotated[
        str,
        option(
            "--model", "-m", help="A config.json, its folder, JSON text, or a known shape.", panel=_MODEL, default=False
        ),
    ],
    target: Annotated[
        float,
        option("--target", "-t", help="Share wanted of the hits that a cache without a limit has.", panel=_WHAT),
    ] = 0.9,
    memory: Annotated[
        str | None,
        option("--memory", help="Also say what this much gives: 40GiB, 80GB.", default=False, panel=_WHAT),
    ] = None,
    strategies: Annotated[
        str | None,
        option(
            "--strategies",
            "-s",
            help="To compare with LRU and the optimum; names or module:Class.",
            default="all that need no arguments",
            panel=_WHAT,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        option(
            "--kv-dtype",
            help="Element type of the cache: float16, bfloat16, float32, int8, fp8.",
            default="that of the config",
            panel=_MODEL,
        ),
    ] = None,
    window_as_full: Annotated[
        bool,
        option("--window-as-full", help="Count windowed layers as if they kept every token.", panel=_MODEL),
    ] = False,
    tflops: Annotated[float, option("--tflops", help="Peak rate of a replica, 10¹² FLOP/s.", panel=_RATE)] = 400.0,
    mfu: Annotated[float, option("--mfu", help="Share of the peak that prefill reaches.", panel=_RATE)] = 0.5,
    decode_rate: Annotated[
        float, option("--decode-rate", help="New tokens per second of a request.", panel=_RATE)
    ] = 50.0,
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
    jobs: Annotated[
        int | None, option("--jobs", "-j", help="Processes.", default="one a core, if it is worth it", panel=_WHAT)
    ] = None,
    json: Annotated[bool, option("--json", help="Print one JSON object instead.", panel=_OUTPUT)] = False,
    html: Annotated[
        Path | None, option("--html", help="Write a report to this file.", default=False, panel=_OUTPUT)
    ] = None,
    debug: Annotated[bool, option("--debug", help="Show the traceback of an error.", panel=_OUTPUT)] = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        from pagedkv.cli.plan import PlanRequest, run

        run(
            PlanRequest(
                trace=trace,
                model=model,
                target=target,
                memory=memory,
                strategies=strategies,
                kv_dtype=kv_dtype,
                window_as_full=window_as_full,
                tflops=tflops,
                mfu=mfu,
                decode_rate=decode_rate,
                format=format,
                block_tokens=block_tokens,
                skip_bad=skip_bad,
                jobs=jobs,
                json=json,
                html=html,
            )
        )
