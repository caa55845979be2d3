"""Anthropic's ``/v1/messages``: a chat of content blocks, whose beginnings a client may have pinned."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.server.auth import AnyCaller, Caller
from pagedkv.server.background import in_background
from pagedkv.server.chat import begin_chat, chat_tokens
from pagedkv.server.errors import AnthropicError, ApiError, ClientLeft, anthropic_error, api_error_of
from pagedkv.server.generation import Generation, Steps, stream_steps, while_there
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.logs import request_id_of
from pagedkv.server.openapi import answers_with_named_events
from pagedkv.server.pins import MOST_MARKS
from pagedkv.server.schemas import ChatRequest, GenerationFields, RequestBody, StopString, Text
from pagedkv.server.state import Server, ServerState
from pagedkv.server.translation import Fields, chat_request, encode, event, in_words_of

# What a client sends.

SECONDS = {"5m": 300.0, "1h": 3600.0}


class CacheControl(RequestBody):
    """Asks for the prompt up to here to be kept in the pool."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = Field(None, description="For how long after its last use; 5m.")

    @property
    def seconds(self) -> float:
        """For how long."""
        return SECONDS[self.ttl or "5m"]


class TextBlock(RequestBody):
    """A text."""

    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None


class ToolUseBlock(RequestBody):
    """What the model called."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(RequestBody):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return (
            "".join(block.text for block in self.content or []) if not isinstance(self.content, str) else self.content
        )


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
Blocks = Annotated[list[Block], Field(max_length=1000, fail_fast=True)]


class InputMessage(RequestBody):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks

    @property
    def blocks(self) -> Sequence[TextBlock | ToolUseBlock | ToolResultBlock]:
        """The content as blocks."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class OutputConfig(RequestBody):
    """What the answer is to be like."""

    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {"effort": ()}

    format: dict[str, Any] | None = None


class TokensRequest(GenerationFields):
    """A conversation."""

    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "output_format": (),
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
    }

    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="One.")
    system: Text | Annotated[list[TextBlock], Field(max_length=1000, fail_fast=True)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description="That of the last block.")

    @property
    def system_blocks(self) -> list[TextBlock]:
        """The system prompt as blocks."""
        return [TextBlock(type="text", text=self.system)] if isinstance(self.system, str) else self.system or []

    def as_chat(self) -> Fields:
        """Return the fields of a chat that are spelled otherwise here."""
        more: Fields = {"stop": self.stop_sequences or None}
        if self.tools:
            choice = self.tool_choice or {}
            more |= {"tools": [_chat_tool(tool) for tool in self.tools], "tool_choice": _chat_choice(choice)}
            more["parallel_tool_calls"] = False if choice.get("disable_parallel_tool_use") else None
        form = None if self.output_config is None else self.output_config.format
        if form is not None:
            if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
                raise bad_argument("output_config", "a format of type json_schema with its schema")
            schema = {"name": "output", "schema": form["schema"], "strict": True}
            more["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.messages[-1].role == "assistant":
            more |= {"continue_final_message": True, "add_generation_prompt": False}
        return more


class MessagesRequest(TokensRequest):
    """Answer a conversation."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]


NAMES = {
    "response_format": "output_config",
    "stop": "stop_sequences",
    "continue_final_message": "messages",
    "add_generation_prompt": "messages",
}
"""Fields of a chat, and what they are here."""


def _chat_tool(tool: Fields) -> Fields:
    if tool.get("type") not in (None, "custom"):
        raise bad_argument("tools", "tools of the client", f"type {str(tool['type'])[:40]!r}")
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    function = {other: tool[name] for name, other in names.items() if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _chat_choice(choice: Fields) -> str | Fields | None:
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if (kind := choice.get("type", "auto")) not in ("auto", "any", "none"):
        raise bad_argument("tool_choice", "the type auto, any, tool or none", f"{str(kind)[:40]!r}")
    return "required" if kind == "any" else str(kind)


def chat_messages(system: Sequence[TextBlock], messages: Sequence[InputMessage]) -> list[Fields]:
    """Return a conversation as messages of a chat."""
    said: list[Fields] = [{"role": "system", "content": _parts(system)}] if system else []
    for message in messages:
        texts = [block for block in message.blocks if isinstance(block, TextBlock)]
        results = [block for block in message.blocks if isinstance(block, ToolResultBlock)]
        calls = [block for block in message.blocks if isinstance(block, ToolUseBlock)]
        said += [{"role": "tool", "tool_call_id": each.tool_use_id, "content": each.text} for each in results]
        if texts or calls or not results:
            made: Fields = {"role": message.role, "content": _parts(texts) if texts else ("" if not calls else None)}
            if calls:
                made["tool_calls"] = [_chat_call(call) for call in calls]
            said.append(made)
    return said


def _parts(blocks: Sequence[TextBlock]) -> list[Fields]:
    return [{"type": "text", "text": block.text} for block in blocks]


def _chat_call(call: ToolUseBlock) -> Fields:
    function = {"name": call.name, "arguments": msgspec.json.encode(call.input).decode()}
    return {"id": call.id, "type": "function", "function": function}


def marks_of(body: TokensRequest) -> list[tuple[float, list[Fields]]]:
    """Return the beginnings of a conversation that a client wants to be kept, as chats, and for how many seconds.

    Raises
    ------
    InvalidOperation
        There are more than may be.
    """
    system, messages = body.system_blocks, body.messages
    found: list[tuple[CacheControl, list[Fields]]] = []
    for tool in body.tools or []:
        if tool.get("cache_control") is not None:
            found.append((CacheControl.model_validate(tool["cache_control"]), chat_messages([], [])))
    for place, block in enumerate(system):
        if block.cache_control is not None:
            found.append((block.cache_control, chat_messages(system[: place + 1], [])))
    for turn, message in enumerate(messages):
        for place, each in enumerate(message.blocks):
            if each.cache_control is not None:
                cut = message.model_copy(update={"content": message.blocks[: place + 1]})
                found.append((each.cache_control, chat_messages(system, [*messages[:turn], cut])))
    if body.cache_control is not None:
        found.append((body.cache_control, chat_messages(system, messages)))
    if len(found) > MOST_MARKS:
        raise bad_argument("cache_control", f"at most {MOST_MARKS} of them", f"{len(found)}")
    return [(control.seconds, said) for control, said in found]


# What it gets.


class OutputBlock(BaseModel):
    """A text, or a call."""

    type: Literal["text", "tool_use"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class CacheCreation(BaseModel):
    """Tokens that were pinned, by how long they stay."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(BaseModel):
    """What a message cost: the prompt is the sum of the three kinds of input tokens."""

    input_tokens: int
    cache_read_input_tokens: int = Field(description="Tokens whose keys and values came from the cache.")
    cache_creation_input_tokens: int = Field(description="Other tokens that are pinned now.")
    cache_creation: CacheCreation
    output_tokens: int


class MessageObject(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """The data of one event of a stream; what else it holds depends on its type."""

    type: str


class TokenCount(BaseModel):
    """How long a prompt is."""

    input_tokens: int


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicError, "description": "The request is at fault, or there is no room."},
    "5XX": {"model": AnthropicError, "description": "The server is at fault, or it took too long."},
}
router = APIRouter(tags=["messages"], route_class=SizedRoute, responses=_ERRORS)


@router.post(
    "/v1/messages",
    summary="Answer a conversation of content blocks",
    response_model=MessageObject,
    responses=answers_with_named_events(MessageEvent),
)
async def create_message(body: MessagesRequest, request: Request, server: Server, caller: AnyCaller) -> Response:
    """Write an answer, as Anthropic's endpoint does."""
    marks = marks_of(body)
    with in_words_of(NAMES):
        chat = chat_request(
            body, chat_messages(body.system_blocks, body.messages), {**body.as_chat(), "max_tokens": body.max_tokens}
        )
        generation, answer = await begin_chat(chat, request, server, caller)
    ends = await while_there(request, _ends(chat, marks, generation.prompts[0], server, caller))
    made = _Making(body, server, caller, generation, ends, request_id_of(request.scope))
    if body.stream:
        return await stream_steps(generation, answer.chunks, made.events)
    async with generation:
        async for news in generation.changes():
            await made.begin()
            (_, output) = news[0]
        (choice,) = answer.choices(output)
        made.take({**choice, "delta": choice["message"]})
        made.end()
    return Response(encode(made.told), media_type="application/json")


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation")
async def count_tokens(body: TokensRequest, request: Request, server: Server, caller: AnyCaller) -> TokenCount:
    """Return how many tokens a conversation has, as Anthropic's endpoint does."""
    server.model.check_name(body.model)
    with in_words_of(NAMES):
        chat = chat_request(body, chat_messages(body.system_blocks, body.messages), body.as_chat())
        ids = await while_there(request, chat_tokens(chat, server, caller))
    return TokenCount(input_tokens=len(ids))


async def _ends(
    chat: ChatRequest,
    marks: Sequence[tuple[float, list[Fields]]],
    prompt: Sequence[int],
    server: ServerState,
    caller: Caller,
) -> list[tuple[float, int]]:
    """Return for how many seconds how many tokens of a prompt are to be kept."""
    if chat.cache_prompt is False:
        return []  # nobody could find them
    found = []
    for seconds, beginning in marks:
        # A template may want somebody to have spoken.
        said = beginning if beginning[1:] else [*beginning, {"role": "user", "content": "a"}]
        more = {"messages": said, "add_generation_prompt": False, "continue_final_message": None}
        try:
            told = ChatRequest.model_validate({**chat.model_dump(exclude_none=True, by_alias=True), **more})
            ids = await chat_tokens(told, server, caller)
        except (ApiError, InvalidOperation):
            continue  # as the template does not end there, nothing is known to begin there
        found.append((seconds, _common(ids, prompt)))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass(eq=False)
class _Making:
    """A message in the making: takes what is new in a chat's answer and tells the events that it makes."""

    body: MessagesRequest
    server: ServerState
    caller: Caller
    generation: Generation
    ends: list[tuple[float, int]]
    request_id: str
    told: Fields = field(default_factory=dict)
    pinned: dict[float, int] = field(default_factory=dict)
    arguments: str = ""
    is_open: bool = False

    async def begin(self) -> list[bytes]:
        """Pin what is to be kept, once it is computed; returns the first event."""
        if self.told:
            return []
        if self.ends:
            prompt, salt = self.generation.prompts[0], self.generation.salt
            for seconds, end in self.ends:
                count = await self.server.pins.keep(self.caller.owner, salt, prompt[:end], seconds)
                self.pinned[seconds] = max(count, self.pinned.get(seconds, 0))
        self.told = {
            "id": f"msg_{self.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self.server.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }
        return [event("message_start", {"message": self.told})]

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """Return the whole stream."""
        try:
            async for choices in steps:
                first = await self.begin()
                yield b"".join([*first, *(told for choice in choices for told in self.take(choice))])
            yield b"".join(self.end())
        except (ClientLeft, GeneratorExit):
            raise
        except Exception as error:
            told = anthropic_error(api_error_of(error))
            yield event("error", {"error": told["error"]})

    def take(self, choice: Fields) -> list[bytes]:
        """Take what is new in the chat's choice; returns the events that tell it."""
        delta, told = choice["delta"], []
        if delta.get("content"):
            told += self._text(delta["content"])
        for place, call in enumerate(delta.get("tool_calls") or []):
            told += self._call(call.get("index", place), call)
        if choice["finish_reason"]:
            reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(choice["finish_reason"], "end_turn")
            if reason == "end_turn" and choice.get("stop_reason") in (self.body.stop_sequences or []):
                reason, self.told["stop_sequence"] = "stop_sequence", choice["stop_reason"]
            self.told["stop_reason"] = reason
        return told

    def end(self) -> list[bytes]:
        """End the message; returns the last events."""
        told = self._close()
        self.told["usage"] = self._usage()
        delta = {name: self.told[name] for name in ("stop_reason", "stop_sequence")}
        return [*told, event("message_delta", {"delta": delta, "usage": self.told["usage"]}), event("message_stop", {})]

    def _text(self, text: str) -> list[bytes]:
        told, content = [], self.told["content"]
        if not self.is_open or content[-1]["type"] != "text":
            told = [*self._close(), self._open({"type": "text", "text": ""})]
        content[-1]["text"] += text
        return [*told, self._delta({"type": "text_delta", "text": text})]

    def _call(self, index: int, call: Fields) -> list[bytes]:
        told, content, function = [], self.told["content"], call.get("function") or {}
        if index >= sum(block["type"] == "tool_use" for block in content):
            block: Fields = {
                "type": "tool_use",
                "id": call.get("id") or "",
                "name": function.get("name") or "",
                "input": {},
            }
            told = [*self._close(), self._open(block)]
        if arguments := function.get("arguments"):
            self.arguments += arguments
            told.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
        return told

    def _open(self, block: Fields) -> bytes:
        self.told["content"].append(block)
        self.is_open = True
        return event("content_block_start", {"index": len(self.told["content"]) - 1, "content_block": block})

    def _delta(self, delta: Fields) -> bytes:
        return event("content_block_delta", {"index": len(self.told["content"]) - 1, "delta": delta})

    def _close(self) -> list[bytes]:
        """End the block that is open."""
        if not self.is_open:
            return []
        block, self.is_open = self.told["content"][-1], False
        if block["type"] == "tool_use":
            block["input"], self.arguments = _object(self.arguments), ""
        return [event("content_block_stop", {"index": len(self.told["content"]) - 1})]

    def _usage(self) -> Fields:
        usage = self.generation.usage()
        read = usage.prompt_tokens_details.cached_tokens
        created = {ttl: max(0, self.pinned.get(seconds, 0) - read) for ttl, seconds in SECONDS.items()}
        created["5m"] = max(0, created["5m"] - created["1h"])
        return {
            "input_tokens": usage.prompt_tokens - read - sum(created.values()),
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": sum(created.values()),
            "cache_creation": {f"ephemeral_{ttl}_input_tokens": count for ttl, count in created.items()},
            "output_tokens": usage.completion_tokens,
        }


@asynccontextmanager
async def expiring_pins(state: ServerState) -> AsyncIterator[None]:
    """Take back the pins of clients in time, as long as the server runs."""
    async with in_background(state.pins.expire_in_time()):
        yield


def _object(arguments: str) -> Fields:
    """Return the arguments of a call; empty if the model was cut off in them, or wrote something else."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
