"""HTML and SVG elements: whatever is not markup already is escaped."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from hashlib import sha256
from html import escape
from importlib.resources import files

from pagedkv import format

_VOID = frozenset({"br", "col", "hr", "link", "meta"})
_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _unbroken(write: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: write(value).replace(" ", "\u00a0")


# What `pagedkv.format` writes with a unit, kept on one line.
duration, rough_duration = _unbroken(format.duration), _unbroken(format.rough_duration)
round_count, short, flops = map(_unbroken, (format.round_count, format.short, format.flops))
format_bytes = _unbroken(format.format_bytes)


class Markup(str):
    """Text that is HTML already; only `tag`, `text`, `join` and literals of this package make it."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return `value` as markup that shows exactly it; characters that no document may hold become U+FFFD."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(_NOT_IN_XML.sub("\ufffd", str(value))))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Return the parts in a row, escaped where they are not markup."""
    return Markup(str(text(between)).join(text(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; what is not `Markup` in it is escaped, and a child that is ``None`` is left out.

    The attribute ``class_`` is class, ``data_value`` is data-value. Numbers are rounded to 0.01, what is ``None`` or
    ``False`` is left out, ``True`` gives the attribute its own name.
    """
    given = ((key, value) for key, value in attributes.items() if value is not None and value is not False)
    written = "".join(_attribute(key, value) for key, value in given)
    if name in _VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(child for child in children if child is not None)}</{name}>")


def _attribute(key: str, value: object) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is True:
        value = key
    elif isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {key}="{text(value)}"'


# One HTML file that needs nothing else: style and script are part of it, and nothing may be fetched.


def page(title: str, *content: object) -> str:
    """Return a whole document.

    Its security policy forbids every connection and every script but its own, should a browser ever find one.
    """
    style, script = _resource("style.css"), _resource("page.js")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="pagedkv"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", *content, tag("script", Markup(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _resource(name: str) -> str:
    return files("pagedkv.sim.report").joinpath(name).read_text(encoding="utf-8")
