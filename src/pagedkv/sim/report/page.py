"""One HTML file that needs nothing else: style and script are part of it, and nothing may be fetched."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from pagedkv.sim.report.html import Markup, tag

__all__ = ["page"]


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
