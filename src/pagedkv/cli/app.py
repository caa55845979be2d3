"""The command line application and its commands; what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pagedkv.cli import bench, chat, check_model, demo, generate, plan, replay, serve, tier, top, trace, warmup
from pagedkv.cli.terminal import FAILED, INTERRUPTED, DebugOption, JsonOption, failures_in_one_line, say_error

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


app.command(help=generate.EXAMPLES)(generate.generate)
app.command(help=chat.EXAMPLES)(chat.chat)
app.command(help=demo.EXAMPLES)(demo.demo)
app.command(help=replay.EXAMPLES)(replay.replay)
app.add_typer(trace.app, name="trace")
app.command(help=plan.EXAMPLES)(plan.plan)
app.command(help=serve.EXAMPLES)(serve.serve)
app.command(help=top.EXAMPLES)(top.top)
app.add_typer(tier.app, name="tier")
app.command(name="check-model", help=check_model.EXAMPLES)(check_model.check_model)
app.command(help=bench.EXAMPLES)(bench.bench)
app.command(help=warmup.EXAMPLES)(warmup.warmup)
