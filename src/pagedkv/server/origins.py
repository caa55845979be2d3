"""Cross-origin requests: which Host may be named, which Origin may send a POST, and JSON asked of every one.

A web page can make its reader's browser call a server that only the reader reaches. Three things stop it. A name that
an attacker's DNS points at this machine is not a name of the server, so its Host is refused. A POST tells the Origin of
its page. And a browser asks before it sends the header ``Content-Type: application/json`` to another origin.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Depends, Request

from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import CLOSE, ApiError, says_json

Headers = Iterable[tuple[bytes, bytes]]


def foreign(config: ServerConfig, method: str, headers: Headers) -> ApiError | None:
    """Return the refusal of a request that names another host, or that a page of another origin posts."""
    given = {name: value.decode("latin-1") for name, value in headers if name in (b"host", b"origin")}
    host, origin = given.get(b"host"), given.get(b"origin")
    if host is not None and not _may_name(config, host):
        message = f"host: expected the address of the server, localhost or a host of --allow-host, got {host[:100]!r}"
        return ApiError(403, message, code="host_not_allowed", headers=CLOSE)
    if method == "POST" and origin is not None and not _may_post(config, origin, host):
        message = f"origin: expected that of the server or one of --allow-origin, got {origin[:100]!r}"
        return ApiError(403, message, code="origin_not_allowed", headers=CLOSE)
    return None


def _may_name(config: ServerConfig, host: str) -> bool:
    # Behind a key there is nothing to be had for a page that does not know it. An address cannot be pointed elsewhere.
    allowed = [name.lower() for name in config.allow_hosts]
    if "*" in allowed or (config.api_keys and not allowed):
        return True
    name = _host_name(host)
    return _is_address(name) or name in ("localhost", config.host.lower(), *allowed) or name.endswith(".localhost")


def _host_name(host: str) -> str:
    """Return the name or address in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _may_post(config: ServerConfig, origin: str, host: str | None) -> bool:
    if "*" in config.allow_origins or origin in config.allow_origins:
        return True
    # The scheme is not compared: a proxy may have taken TLS off.
    return host is not None and origin.partition("://")[2].lower() == host.lower()


async def _json(request: Request) -> None:
    if not says_json(request.headers.get("content-type", "")):
        message = "expected the header Content-Type: application/json, though there need be no body"
        raise ApiError(415, message, code="unsupported_media_type")


Json = Depends(_json)
"""A route's dependency, where it takes no body: one that takes a body answers 415 by itself."""
