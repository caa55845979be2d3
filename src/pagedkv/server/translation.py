"""Translation of other APIs' conversations to a chat, and of their errors back: what they all share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError

from pagedkv.errors import InvalidOperation
from pagedkv.server.errors import ApiError, api_error_of
from pagedkv.server.schemas import ChatRequest, GenerationFields, RequestBody

Fields = dict[str, Any]
UNSUPPORTED = "unsupported_parameter"
B = TypeVar("B", bound=RequestBody)


def chat_request(body: GenerationFields, messages: Sequence[Fields], more: Fields) -> ChatRequest:
    """Return the chat that another API's request means.

    Parameters
    ----------
    body : GenerationFields
        Its fields go over as they are.
    messages : sequence of dict
        As of a chat.
    more : dict
        Fields of the chat that have another name or form in `body`; None is left out.

    Raises
    ------
    ApiError
        400: the chat does not take it.
    """
    for name in ("prompt_logprobs", "return_token_ids"):
        if getattr(body, name) not in (None, False):
            raise ApiError(400, f"{name}: is told by chats and completions only", param=name, code=UNSUPPORTED)
    same = body.model_dump(include=set(GenerationFields.model_fields), exclude_none=True, by_alias=True)
    told = {**same, **{name: value for name, value in more.items() if value is not None}}
    return validated(ChatRequest, {**told, "messages": list(messages)})


def validated(kind: type[B], fields: Fields) -> B:
    """Return a body of fields that come from another API; ApiError 400 if they are wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part.isidentifier())
        raise ApiError(400, f"{field}: {problem['msg']}", param=field, code="invalid_value") from None


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors that name a field of a chat name that of the client instead.

    Parameters
    ----------
    names : mapping
        Fields of the chat to what the client calls them.
    """
    try:
        yield
    except (ApiError, InvalidOperation) as error:
        told = api_error_of(error)
        first, dot, rest = (told.param or "").partition(".")
        if first not in names:
            raise
        told.param, before = f"{names[first]}{dot}{rest}", told.param
        told.message = told.message.replace(str(before), told.param, 1)
        raise told from None


def event(kind: str, fields: Fields) -> bytes:
    """Return a server-sent event that has a name, which is the ``type`` of its data."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields}))


encode = msgspec.json.Encoder().encode
