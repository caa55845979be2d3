"""The options of ``pagedkv trace describe`` and ``pagedkv trace synth``. What they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pagedkv.cli.terminal import failures_in_one_line

__all__ = ["app"]

app = typer.Typer(
    help="Look at traces of requests, or make them up.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DESCRIBE = """Say what a trace is like: lengths, attainable hits, working sets, reuse gaps.

[bold]Examples[/bold]

  pagedkv trace describe trace.jsonl.gz

  pagedkv trace describe sessions/ --format weka --json

A hit is a block of a request's longest prefix that was seen before: what a cache without a limit finds.
"""
_SYNTH = """Make up a trace from stated parameters and a seed, and write it as Mooncake JSONL.

[bold]Examples[/bold]

  pagedkv trace synth chat -o chat.jsonl.gz

  pagedkv trace synth agents -n 50000 --seed 7 -o agents.jsonl

  pagedkv trace synth rag --set documents=5000 -o rag.jsonl

[bold]Kinds[/bold]

  chat    sessions of several turns behind popular system prompts

  agents  long tool-calling sessions, sub-agents, idle gaps, compaction

  rag     an instruction, then popular documents in random order

  mixed   the three at once

The same arguments write the same file, byte for byte.
"""
_TRAFFIC, _OUTPUT = "The traffic", "What to show"

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class _WithParameters(TyperCommand):
    """A command whose help ends with what ``--set`` can change, and the values of each kind."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from pagedkv.cli.traffic_table import print_parameters

        super().format_help(ctx, formatter)
        print_parameters()


@app.command(help=_DESCRIBE)
def describe(
    trace: Annotated[Path, typer.Argument(help="A trace in any known format, gzipped or not.", show_default=False)],
    format: Annotated[
        str | None, typer.Option("--format", help="The format of the trace.", show_default="recognised")
    ] = None,
    block_tokens: Annotated[
        int | None, typer.Option("--block-tokens", help="Tokens per block.", show_default="what the format says")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count broken lines and go on without them.")] = False,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        from pagedkv.cli.trace_screen import print_description

        print_description(trace, format=format, block_tokens=block_tokens, skip_bad=skip_bad, as_json=json)


@app.command(help=_SYNTH, cls=_WithParameters)
def synth(
    kind: Annotated[str, typer.Argument(help="chat, agents, rag or mixed.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The file; packed where it ends in .gz.", show_default=False),
    ],
    requests: Annotated[
        int | None, typer.Option("--requests", "-n", help="How many requests.", show_default="10000")
    ] = None,
    accesses: Annotated[
        int | None,
        typer.Option(
            "--accesses", help="Stop with the request that reaches so many block accesses.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests per second in the long run.", show_default="by kind")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed writes the same trace.")] = 0,
    block_tokens: Annotated[int, typer.Option("--block-tokens", help="Tokens per block.")] = 512,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: a parameter below; may be repeated.", show_default=False),
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check the options and run."""
    with failures_in_one_line(debug):
        from pagedkv.cli.trace_writing import write_synthetic

        write_synthetic(
            kind,
            output,
            requests=requests,
            accesses=accesses,
            rate=rate,
            seed=seed,
            block_tokens=block_tokens,
            parameters=parameters or [],
            as_json=json,
        )
