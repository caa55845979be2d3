"""The command line: ``pagedkv generate``, ``pagedkv info``."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from pagedkv.cli.app import app

    app(prog_name="pagedkv")
