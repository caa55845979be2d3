"""The command line application and its commands; what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pagedkv.cli import bench, plan, replay, serve, top, trace, warmup
from pagedkv.cli.terminal import FAILED, INTERRUPTED, DebugOption, JsonOption, failures_in_one_line, option, say_error

# typer brings its own copy of click or uses the installed one, by version; the exception tree is the same.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


class _OneLineErrors(TyperGroup):
    """A command group that reports a wrong call in one line instead of a panel."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and end the process, as it would, but say one line where it would draw a panel."""
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else "pagedkv"
            say_error(f"{error.format_message()} (see {command} --help)")
            code = FAILED
        except typer.Abort:
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from pagedkv import __version__

        typer.echo(f"pagedkv {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def pagedkv(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A paged KV cache for language models.

    Try [bold]pagedkv generate "def fibonacci(n):" --show-blocks[/bold]
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def info(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show versions, cores, device, attention backends and the shipped model."""
    with failures_in_one_line(debug):
        from pagedkv.cli.info import print_info

        print_info(as_json=json)


_SAMPLING, _POOL, _STREAM, _OUTPUT = "What to write", "The pool", "Without end", "What to show"

_EXAMPLES = """Write text with a language model whose keys and values live in paged blocks.

[bold]Examples[/bold]

  pagedkv generate "def fibonacci(n):"

  pagedkv generate "class Stack:" -n 3 --show-blocks

  pagedkv generate "import os" --beams 4 --json

  cat prompt.txt | pagedkv generate - --model ./my-model --temperature 0

  pagedkv generate "def main():" --stream --window-tokens 508

The text goes to stdout, everything else to stderr. Nothing is ever downloaded.
"""


@app.command(help=_EXAMPLES)
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; [bold]-[/bold] reads it from stdin.")],
    model: Annotated[
        str | None,
        option("--model", "-m", help="A Hugging Face model folder.", default="the shipped model", panel=_SAMPLING),
    ] = None,
    samples: Annotated[
        int, option("-n", help="Samples written in parallel; they share the prompt's blocks.", panel=_SAMPLING)
    ] = 1,
    beams: Annotated[int, option("--beams", help="Beam search with so many beams.", panel=_SAMPLING)] = 1,
    max_new_tokens: Annotated[
        int | None,
        option(
            "--max-new-tokens", help="Stop after so many tokens.", default="128; none with --stream", panel=_SAMPLING
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        option("--temperature", help="0 takes the likeliest token.", default="0.7; 0 with --beams", panel=_SAMPLING),
    ] = None,
    top_p: Annotated[
        float, option("--top-p", help="Sample from the likeliest tokens of this total probability.", panel=_SAMPLING)
    ] = 1.0,
    seed: Annotated[int, option("--seed", help="The same seed writes the same text.", panel=_SAMPLING)] = 0,
    device: Annotated[str, option("--device", help="A torch device: cpu, cuda, cuda:1.", panel=_SAMPLING)] = "cpu",
    block_size: Annotated[int, option("--block-size", help="Tokens per block.", panel=_POOL)] = 16,
    num_blocks: Annotated[
        int | None, option("--num-blocks", help="Blocks of the pool.", default="what the call can need", panel=_POOL)
    ] = None,
    kv_dtype: Annotated[
        str | None,
        option(
            "--kv-dtype",
            help="Of keys and values: float32, bfloat16, float16; int8 or fp8 halve the memory of the last two.",
            default="as the model",
            panel=_POOL,
        ),
    ] = None,
    strategy: Annotated[
        str, option("--strategy", help="What is given up first: lru, lfu, fifo, longest_first, …", panel=_POOL)
    ] = "lru",
    stream: Annotated[
        bool,
        option("--stream", help="Write without end in a fixed pool (StreamingLLM); Ctrl-C stops.", panel=_STREAM),
    ] = False,
    sink_tokens: Annotated[
        int | None, option("--sink-tokens", help="First tokens that are kept.", default="4", panel=_STREAM)
    ] = None,
    window_tokens: Annotated[
        int | None, option("--window-tokens", help="Last tokens that are kept.", default="508", panel=_STREAM)
    ] = None,
    echo: Annotated[bool, option("--echo/--no-echo", help="Print the prompt before the text.", panel=_OUTPUT)] = True,
    show_blocks: Annotated[bool, option("--show-blocks", help="Draw the pool, a cell a block.", panel=_OUTPUT)] = False,
    json: Annotated[bool, option("--json", help="Print one JSON object, at the end.", panel=_OUTPUT)] = False,
    debug: DebugOption = False,
) -> None:
    """Gather the options and write; the help text is `_EXAMPLES`."""
    with failures_in_one_line(debug):
        from pagedkv.cli.generate import GenerateRequest, run

        given = {name: value for name, value in context.params.items() if name != "debug"}
        run(GenerateRequest(**given | {"echo": echo and not json}))


app.command(help=replay.EXAMPLES)(replay.replay)
app.add_typer(trace.app, name="trace")
app.command(help=plan.EXAMPLES)(plan.plan)
app.command(help=serve.EXAMPLES)(serve.serve)
app.command(help=top.EXAMPLES)(top.top)
app.command(help=bench.EXAMPLES)(bench.bench)
app.command(help=warmup.EXAMPLES)(warmup.warmup)
