"""Tokenize and detokenize routes."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from pagedkv.errors import bad_argument
from pagedkv.server.auth import Caller, Client
from pagedkv.server.chat import ChatForm, encode_chat
from pagedkv.server.generation import while_there
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.schemas import DetokenizeRequest, TokenizeRequest
from pagedkv.server.state import Server, ServerState

router = APIRouter(tags=["tokens"], dependencies=[Client], route_class=SizedRoute)
TOKENS_AT_ONCE = 4096  # whose texts are looked up before others have their time


class Tokens(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


@router.post("/tokenize", summary="Turn a text into tokens", response_model=Tokens)
async def tokenize(body: TokenizeRequest, request: Request, server: Server, caller: Caller = Client) -> Response:
    """Return the tokens of a text or of a conversation."""
    server.model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_argument("prompt", "either prompt or messages")
    ids = await while_there(request, _encode(body, server, caller))
    texts = None
    if body.return_token_strs:
        texts = []
        for start in range(0, len(ids), TOKENS_AT_ONCE):
            texts += [server.tokens.text(token) for token in ids[start : start + TOKENS_AT_ONCE]]
            await asyncio.sleep(0)
    # Not by FastAPI, which looks at every token again.
    told = {"count": len(ids), "max_model_len": server.model.max_model_len, "tokens": ids, "token_strs": texts}
    return Response(msgspec.json.encode(told), media_type="application/json")


async def _encode(body: TokenizeRequest, server: ServerState, caller: Caller) -> list[int]:
    if body.messages is None:
        special = body.add_special_tokens is not False
        return await server.model.encode(body.prompt or "", caller.name, special_tokens=special)
    return await encode_chat(server.model, body.messages, ChatForm.of(body, server), caller.name)


@router.post("/detokenize", summary="Turn tokens into a text")
async def detokenize(body: DetokenizeRequest, request: Request, server: Server, caller: Caller = Client) -> Detokenized:
    """Return the text of tokens, special ones included."""
    server.model.check_name(body.model)
    server.model.check_count(len(body.tokens), "tokens")
    server.model.check_ids(body.tokens, "tokens")
    return Detokenized(prompt=await while_there(request, server.model.decode(body.tokens, caller.name)))
