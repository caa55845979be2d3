"""Ollama's ``/api``: chats, prompts and the model as Ollama's clients ask for them, a JSON object a line."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from pagedkv import __version__
from pagedkv.engine import RequestOutput
from pagedkv.server.auth import AnyCaller, Caller, Client
from pagedkv.server.chat import begin_chat
from pagedkv.server.completions import begin_completion
from pagedkv.server.errors import ClientLeft, OllamaError, api_error_of, ollama_error
from pagedkv.server.generation import Generation, Steps, stream_steps, while_there
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.openapi import answers_with_lines
from pagedkv.server.schemas import INT64, CompletionRequest, GenerationFields, RequestBody, StopString, Text
from pagedkv.server.state import Server, ServerState
from pagedkv.server.tools import form_of
from pagedkv.server.translation import Fields, chat_request, encode, in_words_of, validated

LINES = "application/x-ndjson"

# What a client sends.


class Options(RequestBody):
    """How to write; what is not here and cannot change the answer (num_ctx, num_gpu, …) is ignored."""

    num_predict: Annotated[int, Field(ge=-2, lt=2**31)] | None = Field(None, description="Below 1: as many as fit.")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopString | list[StopString] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def told(self) -> Fields:
        """Return those that say something, under the names of a chat."""
        given = self.model_dump(exclude_none=True)
        if (count := given.pop("num_predict", 0)) > 0:
            given["max_tokens"] = count
        return given


class OllamaRequest(RequestBody):
    """What chats and prompts have in common."""

    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "context": ([],),
        "images": ([],),
        "logprobs": (False,),
        "suffix": ("",),
        "template": ("",),
        "think": (False,),
        "top_logprobs": (0,),
    }

    model: str | None = Field(None, description="The name of the model, with :latest or without.")
    stream: bool | None = Field(None, description="An object a line; true.")
    format: Literal["json", ""] | dict[str, Any] | None = Field(None, description="json, or a JSON schema.")
    options: Options | None = None
    keep_alive: Any = Field(None, description="Ignored: the model stays.")

    @property
    def streams(self) -> bool:
        """Whether an object a line is sent."""
        return self.stream is not False

    def given(self) -> Fields:
        """Return the fields that a chat and a prompt have alike, under their names."""
        name = None if self.model is None else self.model.removesuffix(":latest")
        return {"model": name, "stream": self.streams, **({} if self.options is None else self.options.told())}

    def more(self) -> Fields:
        """Return the form of the answer as a chat has it."""
        if not self.format:
            return {}
        if self.format == "json":
            return {"response_format": {"type": "json_object"}}
        schema = {"name": "format", "schema": self.format}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


class OllamaFunction(RequestBody):
    """A function and what it is called with."""

    name: Text
    arguments: dict[str, Any]


class OllamaCall(RequestBody):
    """A call of the model."""

    function: OllamaFunction


class OllamaMessage(RequestBody):
    """A message."""

    not_honoured: ClassVar[Mapping[str, tuple[Any, ...]]] = {"images": ([],), "thinking": ("",)}

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: Text | None = None


class OllamaChat(OllamaRequest):
    """Answer a conversation."""

    messages: Annotated[list[OllamaMessage], Field(max_length=10_000, fail_fast=True)] = Field(
        default_factory=list, description="None: is the model there?"
    )
    tools: list[dict[str, Any]] | None = None

    def more(self) -> Fields:
        """Return the form of the answer, and the tools, as a chat has them."""
        return {**super().more(), "tools": self.tools or None}


class OllamaPrompt(OllamaRequest):
    """Answer a prompt, or go on from it."""

    prompt: Text = Field("", description="Empty: is the model there?")
    system: Text | None = None
    raw: bool | None = Field(None, description="Go on from the prompt as it is, without the chat template.")


class ShowRequest(RequestBody):
    """The name of a model."""

    model: str | None = None
    name: str | None = Field(None, description="The older name of the field.")


NAMES = {"response_format": "format", "max_tokens": "options.num_predict"}
"""Fields of a chat, and what they are here."""


def chat_messages(messages: Sequence[OllamaMessage]) -> list[Fields]:
    """Return messages of a chat; calls get ids, which here they have not."""
    said: list[Fields] = []
    waiting: list[tuple[str, str]] = []  # calls without a result: name and id
    for place, message in enumerate(messages):
        told: Fields = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            names = [call.function.name for call in message.tool_calls]
            waiting = [(name, f"call_{place}_{number}") for number, name in enumerate(names)]
            told["tool_calls"] = [
                {
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": encode(call.function.arguments).decode()},
                }
                for call, (name, call_id) in zip(message.tool_calls, waiting, strict=True)
            ]
        if message.role == "tool":
            mine = next((call for call in waiting if call[0] == message.tool_name), waiting[0] if waiting else None)
            if mine is not None:
                waiting.remove(mine)
                told["tool_call_id"] = mine[1]
        said.append(told)
    return said


# What it gets.


class ToldFunction(BaseModel):
    """A function and what it is called with."""

    name: str
    arguments: dict[str, Any]


class ToldCall(BaseModel):
    """A call of the model."""

    function: ToldFunction


class ToldMessage(BaseModel):
    """A message of the model, or what is new in it."""

    role: Literal["assistant"] = "assistant"
    content: str
    tool_calls: list[ToldCall] | None = None


class Line(BaseModel):
    """An answer, or what is new in it; the counts and durations (nanoseconds) are in the last one."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = Field(None, description="Tokens of the prompt.")
    prompt_eval_duration: int | None = None
    eval_count: int | None = Field(None, description="Tokens of the answer.")
    eval_duration: int | None = None


class ChatLine(Line):
    """That of a conversation."""

    message: ToldMessage


class PromptLine(Line):
    """That of a prompt."""

    response: str


class Details(BaseModel):
    """What kind of model it is, as far as a client may want to know."""

    parent_model: str = ""
    format: str = "safetensors"
    family: str = ""
    families: list[str] = []
    parameter_size: str = ""
    quantization_level: str = ""


class Tag(BaseModel):
    """A model that is served."""

    name: str
    model: str
    modified_at: str
    size: int = 0
    digest: str = Field(description="Of its name.")
    details: Details = Details()


class Tags(BaseModel):
    """All models."""

    models: list[Tag]


class Shown(BaseModel):
    """What is told of a model."""

    modelfile: str = ""
    parameters: str = ""
    template: str
    details: Details = Details()
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(BaseModel):
    """Which pagedkv this is."""

    version: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": OllamaError, "description": "The request is at fault, or there is no room."},
    "5XX": {"model": OllamaError, "description": "The server is at fault, or it took too long."},
}
router = APIRouter(prefix="/api", tags=["ollama"], route_class=SizedRoute, responses=_ERRORS)


@router.post("/chat", summary="Answer a conversation", response_model=ChatLine, responses=answers_with_lines(ChatLine))
async def chat(body: OllamaChat, request: Request, server: Server, caller: AnyCaller) -> Response:
    """Write an answer, as Ollama's endpoint does."""
    told = _Telling(server, lambda text, calls: {"message": _message(text, calls)})
    if not body.messages:
        return told.loaded(body)
    return await _answer_chat(body, chat_messages(body.messages), told, request, caller)


@router.post(
    "/generate", summary="Answer a prompt", response_model=PromptLine, responses=answers_with_lines(PromptLine)
)
async def generate(body: OllamaPrompt, request: Request, server: Server, caller: AnyCaller) -> Response:
    """Write an answer, as Ollama's endpoint does; a model without a chat template goes on from the prompt."""
    told = _Telling(server, lambda text, calls: {"response": text})
    if not body.prompt:
        return told.loaded(body)
    if body.raw or (body.system is None and server.model.template() is None):
        return await _go_on(body, told, request, caller)
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    return await _answer_chat(body, [*system, {"role": "user", "content": body.prompt}], told, request, caller)


async def _answer_chat(
    body: OllamaRequest, messages: list[Fields], told: _Telling, request: Request, caller: Caller
) -> Response:
    given = body.given()
    more = {**body.more(), "max_tokens": given.pop("max_tokens", None)}
    with in_words_of(NAMES if isinstance(body, OllamaChat) else {**NAMES, "messages": "prompt"}):
        asked = chat_request(validated(GenerationFields, given), messages, more)
        generation, answer = await begin_chat(asked, request, told.server, caller)
    return await told.response(generation, answer.chunks, lambda: answer.choices(_output(generation)))


async def _go_on(body: OllamaPrompt, told: _Telling, request: Request, caller: Caller) -> Response:
    model, given = told.server.model, body.given()
    with in_words_of(NAMES):
        if "max_tokens" not in given:  # as many as fit
            ids = await while_there(request, model.encode(body.prompt, caller.name))
            given["max_tokens"] = max(1, model.max_model_len - len(ids))
        asked = validated(CompletionRequest, {**given, **body.more(), "prompt": body.prompt})
        generation, answer = await begin_completion(asked, request, told.server, caller)
    return await told.response(generation, answer.chunks, lambda: answer.choices([_output(generation)]))


def _output(generation: Generation) -> RequestOutput:
    output = generation.latest[0]
    if output is None:
        raise RuntimeError("an answer that has not begun has no outputs")
    return output


@router.get("/tags", summary="List the models", dependencies=[Client])
async def tags(server: Server) -> Tags:
    """Return the model that is served."""
    name = f"{server.model.name}:latest"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Tags(models=[Tag(name=name, model=name, modified_at=_time(server.model.created), digest=digest)])


@router.post("/show", summary="Describe a model")
async def show(body: ShowRequest, server: Server, caller: AnyCaller) -> Shown:
    """Return what is known of the model; 404 for any other."""
    name = body.model or body.name
    server.model.check_name(None if name is None else name.removesuffix(":latest"))
    template = server.model.template()
    return Shown(
        template=template or "",
        model_info={
            "general.architecture": "pagedkv",
            "general.basename": server.model.name,
            "pagedkv.context_length": server.model.max_model_len,
            "pagedkv.vocab_size": server.model.vocab_size,
        },
        capabilities=["completion", *(["tools"] if form_of(template, server.config.tool_parser) else [])],
        modified_at=_time(server.model.created),
    )


@router.get("/version", summary="The version")
async def version() -> OllamaVersion:
    """Return the version of pagedkv."""
    return OllamaVersion(version=__version__)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _message(text: str, calls: list[Fields]) -> Fields:
    return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


@dataclass(eq=False)
class _Telling:
    """An answer as lines: takes the choices of a chat or of a completion."""

    server: ServerState
    form: Callable[[str, list[Fields]], Fields]
    started: float = field(default_factory=time.monotonic)
    reason: str | None = None
    calls: list[Fields] = field(default_factory=list)

    def loaded(self, body: OllamaRequest) -> Response:
        """Return the answer to an empty request: the model is there."""
        self.server.model.check_name(body.given()["model"])
        line = {**self._line("", []), "done": True, "done_reason": "load"}
        media_type = LINES if body.streams else "application/json"
        return Response(encode(line) + b"\n", media_type=media_type)

    async def response(self, generation: Generation, chunks: Any, choices: Callable[[], list[Fields]]) -> Response:
        """Run a generation, whose stream has some chunks, and its end these choices; returns the answer."""
        if generation.body.stream:
            return await stream_steps(generation, chunks, partial(self._lines, generation), LINES)
        async with generation:
            await generation.finished()
            text = self._take(choices()[0])
            line = {**self._line(text, self._called()), **self._end(generation)}
        return Response(encode(line), media_type="application/json")

    async def _lines(self, generation: Generation, steps: Steps) -> AsyncGenerator[bytes, None]:
        # Calls are told whole, before the last line.
        try:
            async for choices in steps:
                if text := "".join(map(self._take, choices)):
                    yield encode(self._line(text, [])) + b"\n"
            if self.calls:
                yield encode(self._line("", self._called())) + b"\n"
            yield encode({**self._line("", []), **self._end(generation)}) + b"\n"
        except (ClientLeft, GeneratorExit):
            raise
        except Exception as error:
            yield encode(ollama_error(api_error_of(error))) + b"\n"

    def _take(self, choice: Fields) -> str:
        """Note calls and the end; returns the text."""
        delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        for place, call in enumerate(delta.get("tool_calls") or []):
            function = call.get("function") or {}
            if call.get("index", place) >= len(self.calls):
                self.calls.append({"name": function.get("name") or "", "arguments": ""})
            self.calls[-1]["arguments"] += function.get("arguments") or ""
        self.reason = choice["finish_reason"] or self.reason
        return delta.get("content") or ""

    def _line(self, text: str, calls: list[Fields]) -> Fields:
        told = {"model": self.server.model.name, "created_at": _time(time.time())}
        return {**told, **self.form(text, calls), "done": False}

    def _called(self) -> list[Fields]:
        return [{"function": {"name": call["name"], "arguments": _object(call["arguments"])}} for call in self.calls]

    def _end(self, generation: Generation) -> Fields:
        usage, metrics = generation.usage(), _output(generation).metrics
        now = time.monotonic()
        begun, first = metrics.first_scheduled or now, metrics.first_token or now
        return {
            "done": True,
            "done_reason": "length" if self.reason == "length" else "stop",
            "total_duration": _nanoseconds(now - self.started),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - begun),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds((metrics.finished or now) - first),
        }


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _object(arguments: str) -> Fields:
    """Return the arguments of a call; empty if the model was cut off in them, or wrote something else."""
    try:
        found = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
