"""Authentication by API key, and the tenant whose prefixes a request may reuse."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from pagedkv.server.config import ServerConfig
from pagedkv.server.errors import ApiError
from pagedkv.server.state import Server

_bearer = HTTPBearer(auto_error=False, description="One of the server's API keys, where it has any.")
_header = APIKeyHeader(name="x-api-key", auto_error=False, description="The same, as Anthropic's clients send it.")


async def _given_key(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    key: Annotated[str | None, Security(_header)],
) -> str | None:
    return key if credentials is None else credentials.credentials


Credentials = Annotated[str | None, Depends(_given_key)]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes
    ----------
    name : str
        A word for the logs that tells keys apart and does not give them away; empty without keys.
    tenant : str
        What the salts of this caller's requests are made of; empty where all callers share.
    owner : str
        Whose is what the server keeps for later requests: a key's own, though keys share the cache; empty without keys.
    """

    name: str = ""
    tenant: str = ""
    owner: str = ""


def _digest(*parts: str, purpose: str) -> str:
    # Each part goes in with its length, so that ("ab", "c") and ("a", "bc") differ.
    digest = blake2b(digest_size=16, person=purpose.encode())
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def salt_of(caller: Caller, client_salt: str | None) -> str:
    """Return the salt of a request: what the caller's key and the caller's own salt make together."""
    if not caller.tenant and not client_salt:
        return ""
    return _digest(caller.tenant, client_salt or "", purpose="pagedkv-salt")


def salts_of(config: ServerConfig) -> list[str]:
    """Return the salts of requests that bring none of their own: one for each key whose cache is its own."""
    if config.shared_cache or not config.api_keys:
        return [""]
    keys = dict.fromkeys((*config.api_keys, *config.operator_keys))
    return [salt_of(Caller(tenant=_tenant_of(key)), None) for key in keys]


def _tenant_of(key: str) -> str:
    return _digest(key, purpose="pagedkv-tenant")


def _find(token: str, keys: Iterable[str]) -> str | None:
    # All keys are compared, and by digests of one length: how long it takes tells nothing about them.
    given, found = _digest(token, purpose="pagedkv-auth"), None
    for key in keys:
        if hmac.compare_digest(given, _digest(key, purpose="pagedkv-auth")):
            found = key
    return found


def name_of_caller(config: ServerConfig, headers: Mapping[bytes, bytes]) -> str | None:
    """Return the name of who sends these headers, empty without keys; None if the key in them is not known."""
    if not config.api_keys:
        return ""
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() != "bearer":
        token = headers.get(b"x-api-key", b"").decode("latin-1")
    key = _find(token.strip(), (*config.api_keys, *config.operator_keys))
    return None if key is None else _name_of(key)


def _name_of(key: str) -> str:
    return _digest(key, purpose="pagedkv-name")[:8]


def _authenticated(config: ServerConfig, given: str | None) -> str | None:
    if not config.api_keys:
        return None
    key = None if given is None else _find(given.strip(), (*config.api_keys, *config.operator_keys))
    if key is None:
        message = "no API key was given" if given is None else "the API key is not known"
        raise ApiError(
            401,
            f"{message}; expected the header Authorization: Bearer <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return key


async def caller_of(request: Request, server: Server, credentials: Credentials) -> Caller:
    """Return who calls.

    Raises
    ------
    ApiError
        401.
    """
    config = server.config
    key = _authenticated(config, credentials)
    if key is None:
        return Caller()
    caller = Caller(_name_of(key), "" if config.shared_cache else _tenant_of(key), _tenant_of(key))
    request.scope["pagedkv.caller"] = caller.name
    return caller


async def _operator(server: Server, credentials: Credentials) -> None:
    config = server.config
    key = _authenticated(config, credentials)
    if key is None:
        return
    if config.operator_keys:
        allowed = _find(key, config.operator_keys) is not None
    else:
        allowed = config.shared_cache or len(set(config.api_keys)) == 1
    if not allowed:
        message = "this concerns all tenants: it takes an operator's key (pagedkv serve --operator-key)"
        raise ApiError(403, message, code="operator_only")


Client = Depends(caller_of)
"""A router's dependency: who calls must have a key, where the server has any."""

AnyCaller = Annotated[Caller, Client]
"""The same as a parameter: who calls."""

Operator = Depends(_operator)
"""The same for what shows or touches the cache of all tenants."""
