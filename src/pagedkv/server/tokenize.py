"""Tokenize and detokenize routes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from pagedkv.errors import bad_argument
from pagedkv.server.auth import Client
from pagedkv.server.chat import ChatForm, encode_chat
from pagedkv.server.schemas import ChatMessage, RequestBody, Text, TokenId
from pagedkv.server.state import Server

router = APIRouter(tags=["tokens"], dependencies=[Client])


class TokenizeRequest(RequestBody):
    """A text, or a conversation."""

    model: str | None = None
    prompt: Text | None = Field(None, description="A text; either it or messages.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)] | None = Field(
        None, description="A conversation, written out as for the chat endpoint."
    )
    add_special_tokens: bool | None = Field(
        None, description="With the tokens that open a text; true, but false where a chat template writes them."
    )
    add_generation_prompt: bool | None = Field(None, description="Of a conversation: open the answer; true.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="What the chat template is told.")
    return_token_strs: bool | None = Field(None, description="Return the text of every token, too.")


class Tokens(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Tokens."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


@router.post("/tokenize", summary="Turn a text into tokens")
async def tokenize(body: TokenizeRequest, server: Server) -> Tokens:
    """Return the tokens of a text or of a conversation."""
    server.model.check_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_argument("prompt", "either prompt or messages")
    if body.messages is not None:
        form = ChatForm(
            open_answer=body.add_generation_prompt is not False,
            special_tokens=body.add_special_tokens,
            told=body.chat_template_kwargs or {},
        )
        ids = await encode_chat(server.model, body.messages, form)
    else:
        ids = await server.model.encode(body.prompt or "", special_tokens=body.add_special_tokens is not False)
    texts = [server.tokens.text(token) for token in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=server.model.max_model_len, tokens=ids, token_strs=texts)


@router.post("/detokenize", summary="Turn tokens into a text")
async def detokenize(body: DetokenizeRequest, server: Server) -> Detokenized:
    """Return the text of tokens, special ones included."""
    server.model.check_name(body.model)
    server.model.check_ids(body.tokens, "tokens")
    return Detokenized(prompt=await server.model.decode(body.tokens))
