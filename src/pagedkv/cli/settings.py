"""Command options from the fields of a dataclass, and from a config file."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from pagedkv.cli.terminal import Failure

Settings = TypeVar("Settings")


def options_from(*settings: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of some dataclasses; they reach its ``**options`` by their names.

    The fields are made by :func:`pagedkv.server.config.setting`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        made = [_parameter(each, hint) for kind in settings for each, hint in _hinted(kind)]
        command.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def from_options(kind: type[Settings], options: Mapping[str, Any]) -> Settings:
    """Return the dataclass that the options of a command make.

    Raises
    ------
    Failure
        A file that an option names cannot be read.
    """
    given = {}
    for each, _ in _hinted(kind):
        value = options[each.name]
        if each.metadata["from_file"]:
            value = read_text(flag_of(each.name, kind), value)
        given[each.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def flag_of(name: str, *settings: type[Any]) -> str:
    """Return the option that sets a field, or an argument that is none."""
    for kind in settings:
        for each in fields(kind):
            if each.name == name and each.metadata["flag"]:
                return str(each.metadata["flag"]).partition(",")[0]
    return "--" + name.replace("_", "-")


def config_option() -> Any:
    """Return an option that names a file whose keys set the defaults of all others."""
    return typer.Option(
        "--config",
        help="A TOML or JSON file with any of the settings, by the names of the library; options go before it.",
        show_default=False,
        is_eager=True,
        callback=_take_defaults,
    )


def _take_defaults(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        text = read_text("--config", path) or ""
        given = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except Failure as error:
        raise typer.BadParameter(str(error)) from None
    except ValueError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from None
    known = {each.name for each in context.command.params} - {"config", "debug"}
    if not isinstance(given, dict):
        raise typer.BadParameter(f"{path}: expected settings by their names")
    if unknown := sorted(given.keys() - known):
        raise typer.BadParameter(
            f"{path}: {unknown[0]} is no setting; expected {', '.join(sorted(filter(None, known)))}"
        )
    context.default_map = given
    return path


def read_text(flag: str, path: Path | None) -> str | None:
    """Return the text of a file that an option names; None without one.

    Raises
    ------
    Failure
        It cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{flag}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _hinted(kind: type[Any]) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return [(each, hints[each.name]) for each in fields(kind)]


def _parameter(setting: Field[Any], hint: Any) -> inspect.Parameter:
    told, names = setting.metadata, (setting.metadata["flag"] or flag_of(setting.name)).split(",")
    default = setting.default
    if default is True:
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    if told["from_file"]:
        hint = Path | None
    elif get_origin(hint) is tuple:
        hint, default = list[str], []
    elif get_origin(hint) is Literal:
        hint = type(get_args(hint)[0])
    made = typer.Option(
        *names, help=told["help"], rich_help_panel=told["group"], show_default=told["shown"], envvar=told["env"]
    )
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, made]
    )
