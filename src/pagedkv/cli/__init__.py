"""The command line: ``pagedkv generate``, ``serve``, ``replay``, ``plan`` and what belongs to them."""

from __future__ import annotations

import os

__all__ = ["main"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    # Before torch loads OpenMP: threads that spin while they wait take the processor from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pagedkv.cli.app import app

    app(prog_name="pagedkv")
