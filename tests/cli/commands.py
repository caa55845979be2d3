"""How the tests call the command: inside of this process, or as a user does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from pagedkv.cli.app import app

# What is started in the background of a shell ignores Ctrl-C, and so would everything that it starts.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
START = f"{HEED}from pagedkv.cli import main; main()"


def call(*arguments: object, **options: Any) -> Result:
    """Run the command here; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="pagedkv", **options)


def start(*arguments: str, before: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-c", before + START, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, encoding="utf-8", **(pipes | options))
