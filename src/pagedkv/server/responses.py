"""OpenAI's ``/v1/responses``: a chat whose conversation the server may keep for the next request."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Hashable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from pagedkv.errors import bad_argument
from pagedkv.server.auth import AnyCaller, Caller
from pagedkv.server.chat import begin_chat
from pagedkv.server.errors import ApiError, ClientLeft, api_error_of
from pagedkv.server.generation import Generation, Steps, stream_steps
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.openapi import answers_with_named_events
from pagedkv.server.schemas import Body, GenerationFields, RequestBody, Text
from pagedkv.server.state import Server, ServerState
from pagedkv.server.translation import Fields, chat_request, encode, event, in_words_of

# What a client sends.


class InputPart(RequestBody):
    """A piece of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(RequestBody):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(min_length=1, max_length=1000, fail_fast=True)]

    @property
    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InputCall(Body):
    """What the model called."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class InputCallOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | list[InputPart]

    @property
    def text(self) -> str:
        """The whole text."""
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class TextFormat(RequestBody):
    """The form of a text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(RequestBody):
    """What the text is to be like."""

    format: TextFormat | None = None


Items = Annotated[
    list[InputMessage | InputCall | InputCallOutput], Field(min_length=1, max_length=10_000, fail_fast=True)
]


class ResponsesRequest(GenerationFields):
    """Answer a conversation, or go on with one that was kept."""

    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "logprobs": (),
        "max_completion_tokens": (),
        "max_tokens": (),
        "max_tool_calls": (),
        "messages": (),
        "moderation": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Text | Items = Field(description="A text of the user, or messages, calls and what came of them.")
    n: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="One.")
    instructions: Text | None = Field(None, description="A system prompt, of this request alone.")
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="As many as fit by default."
    )
    previous_response_id: str | None = Field(None, description="Go on from the conversation of this response.")
    store: bool | None = Field(None, description="Keep it for previous_response_id; true.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="Is in the response.")
    text: TextConfig | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def as_chat(self) -> Fields:
        """Return the fields of a chat that are spelled otherwise here."""
        form = None if self.text is None or self.text.format is None else self.text.format
        more: Fields = {"max_tokens": self.max_output_tokens}
        if form is not None and form.type != "text":
            schema = {"name": form.name, "schema": form.json_schema, "strict": form.strict}
            told = {"json_schema": {name: value for name, value in schema.items() if value is not None}}
            more["response_format"] = {"type": form.type, **(told if form.type == "json_schema" else {})}
        if self.tools:
            more |= {"tools": [_chat_tool(tool) for tool in self.tools], "tool_choice": _chat_choice(self.tool_choice)}
            more["parallel_tool_calls"] = self.parallel_tool_calls
        return more


NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""Fields of a chat, and what they are here."""


def _chat_tool(tool: Fields) -> Fields:
    if tool.get("type") != "function":
        raise bad_argument("tools", "tools of type function", f"{str(tool.get('type'))[:40]!r}")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _chat_choice(choice: str | Fields | None) -> str | Fields | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def chat_messages(given: str | Sequence[InputMessage | InputCall | InputCallOutput]) -> list[Fields]:
    """Return what a client sends as messages of a chat: calls in a row are of one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Fields] = []
    for item in given:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": item.text})
        elif isinstance(item, InputCallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item.call_id, "type": "function", "function": function})
    return messages


# What it gets.


class OutputText(BaseModel):
    """A text of the model."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []


class OutputMessage(BaseModel):
    """A message of the model."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of the model."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(BaseModel):
    """Where the tokens of the prompt came from."""

    cached_tokens: int = Field(description="Tokens whose keys and values came from the cache.")
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """What the tokens of the answer were."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """What a response cost."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseObject(BaseModel):
    """A response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    model: str
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    store: bool = True
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"


class ResponseEvent(BaseModel):
    """The data of one event of a stream; what else it holds depends on its type."""

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    """A response that is not kept any more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class KeptResponse(BaseModel):
    """A response and the chat up to its end."""

    told: Fields
    messages: list[Fields]


router = APIRouter(tags=["responses"], route_class=SizedRoute)


@router.post(
    "/v1/responses",
    summary="Answer a conversation that may be kept",
    response_model=ResponseObject,
    responses=answers_with_named_events(ResponseEvent),
)
async def create_response(body: ResponsesRequest, request: Request, server: Server, caller: AnyCaller) -> Response:
    """Write an answer, as OpenAI's endpoint does."""
    if "message.output_text.logprobs" in (body.include or []):
        raise ApiError(400, "include: log probabilities are told by chats and completions only", param="include")
    messages = [*_conversation(server, caller, body.previous_response_id), *chat_messages(body.input)]
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    with in_words_of(NAMES):
        chat = chat_request(body, [*system, *messages], body.as_chat())
        generation, answer = await begin_chat(chat, request, server, caller)
    made = _Making(body, server, caller, generation, messages, answer.frame["id"].removeprefix("chatcmpl-"))
    if body.stream:
        return await stream_steps(generation, answer.chunks, made.events)
    async with generation:
        (output,) = await generation.finished()
        (choice,) = answer.choices(output)
        made.take({**choice, "delta": choice["message"]})
        made.end()
    return Response(encode(made.told), media_type="application/json")


@router.get("/v1/responses/{response_id}", summary="A response that was kept", response_model=ResponseObject)
async def get_response(
    response_id: str, server: Server, caller: AnyCaller, stream: Annotated[bool, Query()] = False
) -> Fields:
    """Return a response of the same key."""
    if stream:
        raise ApiError(400, "stream: expected false, as events are not kept", param="stream", code="invalid_value")
    return _kept(server, caller, response_id, "response_id").told


@router.delete("/v1/responses/{response_id}", summary="Forget a response")
async def delete_response(response_id: str, server: Server, caller: AnyCaller) -> DeletedResponse:
    """Forget a response of the same key. What went on from it stays."""
    _kept(server, caller, response_id, "response_id")
    server.responses.pop(caller.owner, response_id)
    return DeletedResponse(id=response_id)


def _kept(server: ServerState, caller: Caller, response_id: str, param: str, status: int = 404) -> KeptResponse:
    found: KeptResponse | None = server.responses.get(caller.owner, response_id)
    if found is None:
        message = f"{param}: there is no response {response_id[:100]!r}: it was not kept, or newer ones took its place"
        raise ApiError(status, message, param=param, code=f"{param.removesuffix('_id')}_not_found")
    return found


def _conversation(server: ServerState, caller: Caller, response_id: str | None) -> list[Fields]:
    return [] if response_id is None else _kept(server, caller, response_id, "previous_response_id", 400).messages


class _Making:
    """A response in the making: takes what is new in a chat's answer and tells the events that it makes."""

    def __init__(
        self,
        body: ResponsesRequest,
        server: ServerState,
        caller: Caller,
        generation: Generation,
        messages: list[Fields],
        request_id: str,
    ) -> None:
        self._body, self._server, self._caller, self._generation = body, server, caller, generation
        self._messages = messages
        self._sequence = 0
        self._reason: str | None = None
        # Nobody can guess it, nor bring it about by the id of a request.
        self._id = f"{request_id}_{secrets.token_hex(8)}"
        form = {"type": "text"}
        if body.text is not None and body.text.format is not None:
            form = body.text.format.model_dump(exclude_none=True, by_alias=True)
        self.told: Fields = ResponseObject(
            id=f"resp_{self._id}",
            created_at=int(time.time()),
            status="in_progress",
            model=server.model.name,
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            store=body.store is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": form},
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_p=1.0 if body.top_p is None else body.top_p,
        ).model_dump()

    async def events(self, steps: Steps) -> AsyncGenerator[bytes, None]:
        """Return the whole stream."""
        yield self._event("response.created", response=self.told)
        yield self._event("response.in_progress", response=self.told)
        try:
            async for choices in steps:
                yield b"".join([told for choice in choices for told in self.take(choice)])
            yield b"".join(self.end())
        except (ClientLeft, GeneratorExit):
            raise
        except Exception as error:
            known = api_error_of(error)
            self.told |= {"status": "failed", "error": {"code": known.code or "server_error", "message": known.message}}
            yield self._event("response.failed", response=self.told)

    def take(self, choice: Fields) -> list[bytes]:
        """Take what is new in the chat's choice; returns the events that tell it."""
        delta, told = choice["delta"], []
        if delta.get("content"):
            told += self._text(delta["content"])
        for place, call in enumerate(delta.get("tool_calls") or []):
            told += self._call(call.get("index", place), call)
        self._reason = choice["finish_reason"] or self._reason
        return told

    def end(self) -> list[bytes]:
        """End the response, and keep it; returns the last events."""
        told = [] if self.told["output"] else self._text("")
        is_cut = self._reason == "length"
        status = "incomplete" if is_cut else "completed"
        told += self._close(status)
        usage = self._generation.usage()
        details = {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0}
        self.told |= {
            "status": status,
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": details,
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        }
        if self._body.store is not False:
            self._keep()
        return [*told, self._event(f"response.{status}", response=self.told)]

    def _text(self, text: str) -> list[bytes]:
        told, output = [], self.told["output"]
        if not output or output[-1]["type"] != "message":
            told += self._close("completed")
            item = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
            told += self._open({"id": f"msg_{self._id}_{len(output)}", **item})
            part = {"type": "output_text", "text": "", "annotations": []}
            output[-1]["content"].append(part)
            told.append(self._item_event("response.content_part.added", content_index=0, part=part))
        output[-1]["content"][0]["text"] += text
        if text:
            told.append(self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=[]))
        return told

    def _call(self, index: int, call: Fields) -> list[bytes]:
        told, output, function = [], self.told["output"], call.get("function") or {}
        calls = sum(item["type"] == "function_call" for item in output)
        if index >= calls:
            told += self._close("completed")
            item = {"type": "function_call", "status": "in_progress", "call_id": call.get("id") or "", "arguments": ""}
            told += self._open({"id": f"fc_{self._id}_{len(output)}", "name": function.get("name") or "", **item})
        if arguments := function.get("arguments"):
            output[-1]["arguments"] += arguments
            told.append(self._item_event("response.function_call_arguments.delta", delta=arguments))
        return told

    def _open(self, item: Fields) -> list[bytes]:
        self.told["output"].append(item)
        return [self._event("response.output_item.added", output_index=len(self.told["output"]) - 1, item=item)]

    def _close(self, status: str) -> list[bytes]:
        """End the item that is open."""
        if not self.told["output"] or self.told["output"][-1]["status"] != "in_progress":
            return []
        item = self.told["output"][-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            text = {"content_index": 0, "text": part["text"], "logprobs": []}
            told = [
                self._item_event("response.output_text.done", **text),
                self._item_event("response.content_part.done", content_index=0, part=part),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            told = [self._item_event("response.function_call_arguments.done", **done)]
        return [*told, self._event("response.output_item.done", output_index=len(self.told["output"]) - 1, item=item)]

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        """Return an event of the item that is open."""
        output = self.told["output"]
        return self._event(kind, item_id=output[-1]["id"], output_index=len(output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        made = event(kind, {"sequence_number": self._sequence, **fields})
        self._sequence += 1
        return made

    def _keep(self) -> None:
        texts = [item["content"][0]["text"] for item in self.told["output"] if item["type"] == "message"]
        calls = [
            {"id": item["call_id"], "type": "function", "function": {n: item[n] for n in ("name", "arguments")}}
            for item in self.told["output"]
            if item["type"] == "function_call"
        ]
        answer: Fields = {"role": "assistant", "content": "".join(texts)}
        kept = KeptResponse.model_construct(
            told=self.told, messages=[*self._messages, answer | ({"tool_calls": calls} if calls else {})]
        )
        # Messages that came from another response are the same objects, and count once.
        parts: dict[Hashable, int] = {id(message): _size(message) for message in kept.messages}
        parts[self.told["id"]] = _size(self.told)
        self._server.responses.put(self._caller.owner, self.told["id"], kept, parts)


def _size(fields: Fields) -> int:
    return len(encode(fields))
