"""How every command declares an option: with its help, in a panel."""

from __future__ import annotations

from typing import Any

import typer

__all__ = ["option"]


def option(*names: str, help: str, panel: str, default: str | bool = True, env: str | None = None) -> Any:
    """Return an option of these names; `default` is whether, or as what, the help shows the default."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default, envvar=env)
