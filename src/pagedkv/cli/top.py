"""``pagedkv top``: watch a server, or a recorded file, in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pagedkv.cli.terminal import DebugOption, Failure, failures_in_one_line
from pagedkv.cli.top_data import Recording, open_source

EXAMPLES = """Watch the block pool of a server in the terminal.

[bold]Examples[/bold]

  pagedkv top

  pagedkv top http://localhost:9000 --api-key "$KEY"

  pagedkv top --record pool.snapshots

  pagedkv top pool.snapshots

Every block by state, the requests, hit rate, throughput and evictions. Press [bold]?[/bold] for the keys.
"""
DEFAULT_SERVER = "http://127.0.0.1:8000"


def top(
    target: Annotated[
        str, typer.Argument(metavar="[URL|FILE]", help="A server, or a file of snapshots.")
    ] = DEFAULT_SERVER,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="PAGEDKV_API_KEY", help="For a server that wants one.")
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.25, max=60.0, help="Seconds between two snapshots.")
    ] = 0.5,
    record: Annotated[
        Path | None, typer.Option("--record", help="Write every snapshot to a file that this command reads.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Watch; the help text is `EXAMPLES`."""
    with failures_in_one_line(debug):
        from importlib.util import find_spec

        from pagedkv.errors import MissingExtra

        for module in ("textual", "httpx"):
            if find_spec(module) is None:
                raise MissingExtra(module, "serve")
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise Failure("top draws on a terminal; for programs there are /v1/cache and /metrics")
        watch(target, api_key, interval, record)


def watch(target: str, api_key: str | None, interval: float, record: Path | None) -> None:
    """Run the view until the user leaves; `Failure` where there is nothing to show."""
    from pagedkv.cli.top_screen import TopApp

    source = open_source(target, api_key)
    recording = None if record is None else Recording(record)
    try:
        trouble = TopApp(source, interval, recording).run()
    finally:
        source.close()
        if recording is not None:
            recording.close()
    if trouble:
        raise Failure(trouble)
