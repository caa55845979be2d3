"""Strategies by name: ``strategy="lru"``, the simulator and the command line look them up here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from pagedkv.control.protocol import EvictionStrategy
from pagedkv.errors import InvalidOperation

__all__ = ["as_strategy", "parse_strategy", "register_strategy", "strategy_names"]

Factory = TypeVar("Factory", bound=Callable[..., Any])

_registry: dict[str, Callable[..., Any]] = {}


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _home(factory: Callable[..., Any]) -> object:
    """Return where a factory was defined; what has no name of its own, a partial for instance, is like no other."""
    name = getattr(factory, "__qualname__", "<lambda>")
    return factory if name.endswith("<lambda>") else (factory.__module__, name)


def register_strategy(name: str, factory: Factory | None = None) -> Any:
    """Make a strategy known by `name` to ``strategy=``, to the simulator and to the command line.

    Parameters
    ----------
    name : str
        Upper and lower case, ``_`` and ``-`` make no difference.
    factory : callable, optional
        The class, or a function that makes an instance. Without it this is a decorator.

    Raises
    ------
    InvalidOperation
        If the name is empty, taken by another factory, or has other characters than letters, digits, ``_`` and ``-``.
        A class that is defined anew under its own name, in a notebook for instance, takes the place of its old self.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise InvalidOperation(f"name expects letters, digits, _ and -, got {name!r}")

    def register(made_by: Factory) -> Factory:
        known = _registry.get(_key(name), made_by)
        if known is not made_by and _home(known) != _home(made_by):
            raise InvalidOperation(f"a strategy named {name!r} is registered already: {known!r}")
        _registry[_key(name)] = made_by
        return made_by

    return register if factory is None else register(factory)


def strategy_names() -> list[str]:
    """Return the names of all registered strategies, sorted."""
    return sorted(_registry)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_strategy(text: str) -> EvictionStrategy:
    """Make a strategy from its command-line form.

    ``"lru"``, ``"priority:levels=3"`` (or ``"priority:3"``), ``"streaming_llm:sink=4,window=512"``; what ``str()`` of a
    strategy gives is understood too.

    Raises
    ------
    InvalidOperation
        If no strategy has this name, or it does not take these arguments.
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:[:(]\s*(.*?)\s*\)?)?\s*", text) if isinstance(text, str) else None
    factory = _registry.get(_key(match[1])) if match else None
    if match is None or factory is None:
        raise InvalidOperation(f"strategy expects one of {', '.join(sorted(_registry))}, got {text!r}")
    names = list(inspect.signature(factory).parameters)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in filter(None, re.split(r"\s*,\s*", match[2] or "")):
        name, equals, value = argument.partition("=")
        if not equals:
            positional.append(_value(name.strip()))
            continue
        name = name.strip()
        full = next((known for known in names if known in (name, f"{name}_tokens")), name)
        if full in named:
            raise InvalidOperation(f"strategy expects {name} once, got {text!r}")
        named[full] = _value(value.strip())
    try:
        return as_strategy(factory(*positional, **named))
    except TypeError as error:
        wanted = ", ".join(names) or "no arguments"
        raise InvalidOperation(f"strategy {match[1]!r} takes {wanted}, got {match[2]!r}") from error


def as_strategy(strategy: object) -> EvictionStrategy:
    """Return `strategy` itself, or the one that the text names; refuse what cannot score.

    Raises
    ------
    InvalidOperation
        If it is neither a name nor an object with the two scoring methods.
    """
    if isinstance(strategy, str):
        return parse_strategy(strategy)
    if isinstance(strategy, type) or not isinstance(strategy, EvictionStrategy):
        raise InvalidOperation(
            f"strategy expects a name or an object with score_sequences and score_blocks, got {strategy!r}"
        )
    return strategy
