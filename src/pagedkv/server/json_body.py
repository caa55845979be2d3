"""JSON bodies: the prompts of a large one are counted before it is parsed, and large ones are parsed one at a time.

Parsing holds up everything else, whatever thread does it. So what no prompt can need is refused by what can be counted
in the raw bytes, in a few milliseconds, and after each large body the others have their time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from pagedkv.server.errors import ApiError
from pagedkv.server.state import ServerState

LARGE = 256 << 10
BYTES_PER_SECOND = 16 << 20
CONVERSATION = frozenset({"messages", "input", "instructions", "system"})
"""Fields that may be large: texts of all kinds of conversations."""


class SizedRoute(APIRoute):
    """A route whose large bodies are counted before they are parsed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles a request."""
        handle = super().get_route_handler()

        async def sized(request: Request) -> Response:
            return await handle(_SizedRequest(request.scope, request.receive))

        return sized


class _SizedRequest(Request):
    async def json(self) -> Any:
        """Return the parsed body.

        Raises
        ------
        ApiError
            400: a prompt, or anything else in it, is longer than can be of use.
        JSONDecodeError
        """
        raw = await self.body()
        if len(raw) <= LARGE:
            return await super().json()
        server: ServerState = self.app.state.server
        async with server.large_bodies.taken(self.scope.get("pagedkv.tenant", "")):
            await asyncio.sleep(len(raw) / BYTES_PER_SECOND)  # before it: what is refused takes as long
            try:
                return _parse(raw, server)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
                raise json.JSONDecodeError(f"{error}", "", 0) from None


def _parse(raw: bytes, server: ServerState) -> Any:
    fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    for name, field in fields.items():
        if name == "prompt":
            _count_prompts(bytes(field), server)
        elif name == "tokens":
            server.model.check_count(bytes(field).count(b",") + 1, "tokens")
        elif name not in CONVERSATION and len(bytes(field)) > LARGE:
            raise ApiError(400, f"{name[:100]}: expected at most {LARGE} bytes", param=name[:100], code="invalid_value")
    return {name: msgspec.json.decode(field) for name, field in fields.items()}


def _count_prompts(field: bytes, server: ServerState) -> None:
    """See that there are not too many prompts, nor too many token ids in one."""
    opening = re.match(rb"\[\s*(.)", field, re.DOTALL)
    if opening is None:
        return  # one text, or nothing that is allowed
    first = opening[1]
    if first == b'"':
        # Within texts quotes are escaped. Text that ends in a backslash hides one of its two.
        server.check_prompts((field.count(b'"') - field.count(b'\\"')) // 2)
    elif first == b"[":
        server.check_prompts(field.count(b"[") - 1)
        for ids in msgspec.json.decode(field, type=list[msgspec.Raw]):
            server.model.check_length(bytes(ids).count(b",") + 1, None, "prompt")
    else:
        server.model.check_length(field.count(b",") + 1, None, "prompt")
