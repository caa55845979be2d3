"""Chat completions: ``/v1/chat/completions`` and chat templates."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagedkv.engine import CompletionOutput, RequestOutput
from pagedkv.errors import InvalidOperation, bad_argument
from pagedkv.server.answers import ChatChunk, ChatCompletion
from pagedkv.server.auth import AnyCaller, Caller
from pagedkv.server.errors import ApiError
from pagedkv.server.generation import BESIDE, Generation, Job, stream, while_there
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.logs import request_id_of
from pagedkv.server.model import ServedModel
from pagedkv.server.openapi import answers_with_events
from pagedkv.server.schemas import ChatMessage, ChatRequest, TokenizeRequest
from pagedkv.server.state import Server, ServerState
from pagedkv.server.structure import asked_structure
from pagedkv.server.tools import (
    MessageReader,
    ToolUse,
    chat_dicts,
    form_of,
    in_plain_words,
    knows_tools,
    structure_beside,
    told_delta,
    tool_use,
)

PLAIN_STOPS = ("\nuser:", "\nsystem:")
"""Where an answer ends in the plain form: the model begins to speak for another role."""


def plain_chat(messages: Sequence[ChatMessage], *, open_answer: bool = True, continues: bool = False) -> str:
    """Return a chat in the plain form, for models without a template: ``role: text`` and an empty line, each."""
    said = [f"{told['role']}: {told['content']}\n\n" for told in chat_dicts(messages)]
    text = "".join(said)
    if continues:
        return text.removesuffix("\n\n")
    return text + ("assistant:" if open_answer else "")


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """How a chat is written out.

    Attributes
    ----------
    open_answer : bool
        Whether it ends where the answer begins.
    continues : bool
        Whether it ends within its last message, which is gone on with.
    special_tokens : bool, optional
        Whether the tokenizer adds those that open a text; by default where there is no template that writes them.
    told : dict
        What a template is told beside the messages.
    tools : ToolUse, optional
    template : str, optional
        Instead of the model's own.
    """

    open_answer: bool = True
    continues: bool = False
    special_tokens: bool | None = None
    told: dict[str, Any] = field(default_factory=dict)
    tools: ToolUse | None = None
    template: str | None = None

    @classmethod
    def of(cls, body: ChatRequest | TokenizeRequest, server: ServerState) -> ChatForm:
        """Return the form that a request asks for.

        Raises
        ------
        ApiError, InvalidOperation
            What it says does not go together, or is not for clients to say.
        """
        continues = body.continue_final_message is True
        if continues and body.add_generation_prompt:
            raise bad_argument("add_generation_prompt", "false beside continue_final_message", "true")
        if body.chat_template is not None and not server.config.trust_request_chat_template:
            message = (
                "chat_template: only the operator says it; pagedkv serve --trust-request-chat-template lets clients"
            )
            raise ApiError(400, message, param="chat_template", code="unsupported_parameter")
        use = tool_use(
            body.tools,
            body.tool_choice,
            parallel=body.parallel_tool_calls,
            template=server.model.template(body.chat_template, with_tools=bool(body.tools)),
            asked=server.config.tool_parser,
        )
        return cls(
            open_answer=body.add_generation_prompt is not False and not continues,
            continues=continues,
            special_tokens=body.add_special_tokens,
            told=body.chat_template_kwargs or {},
            tools=use,
            template=body.chat_template,
        )

    def render(self, messages: Sequence[ChatMessage], template: str, tokenizer: Any) -> str:
        """Return the text of a chat as a template writes it."""
        try:
            return self._render(messages, template, tokenizer, as_text=False)
        except Exception as error:
            if any(message.tool_calls for message in messages):
                # A few templates want the arguments of calls as the text that they are in JSON.
                with suppress(Exception):
                    return self._render(messages, template, tokenizer, as_text=True)
            raise error

    def _render(self, messages: Sequence[ChatMessage], template: str, tokenizer: Any, *, as_text: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            chat_dicts(messages, form_of(template), as_text=as_text),
            tools=None if self.tools is None or not knows_tools(template) else self.tools.told,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=self.open_answer,
            continue_final_message=self.continues,
            **self.told,
        )
        return text


async def encode_chat(
    model: ServedModel, messages: Sequence[ChatMessage], form: ChatForm, tenant: str, *, cuts: bool = False
) -> list[int]:
    """Return the tokens of a chat; an error if a message is empty, or the template does not take them.

    With `cuts` so much of a long chat is left out at its beginning that it can be tokenized.
    """
    for place, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            name = f"messages.{place}.content"
            raise bad_argument(name, "a text or parts of type text", "none")
    if form.continues and (not messages[-1].text or messages[-1].tool_calls):
        raise bad_argument("continue_final_message", "a last message with a text and no calls")
    template = model.template(form.template, with_tools=form.tools is not None)
    if not knows_tools(template):
        messages = in_plain_words(messages, form.tools)
    if template is None:
        if form.told:
            raise bad_argument("chat_template_kwargs", "none, as this model has no chat template", "some")
        text = plain_chat(messages, open_answer=form.open_answer, continues=form.continues)
        special = form.special_tokens is not False
        return await model.encode(text, tenant, special_tokens=special, param="messages", cuts=cuts)
    _check_told(form.told, model.tokenizer)
    characters = sum(map(_size, messages)) + (0 if form.tools is None else len(json.dumps(form.tools.told)))
    if not cuts:
        model.check_text(characters, "messages")
    try:
        text = await model.render_chat(partial(form.render, messages, template), tenant, characters)
        text.encode()  # escapes in JSON can bring halves of characters
    except (ApiError, InvalidOperation):
        raise
    except Exception as error:
        # Templates refuse by raising, an unusual order of roles for instance. What they say may quote the messages,
        # which is fine towards the client who sent them.
        raise ApiError(
            400, f"messages: the chat template refuses them: {error}", param="messages", code="chat_template"
        ) from error
    return await model.encode(text, tenant, special_tokens=form.special_tokens is True, param="messages", cuts=cuts)


def _size(message: ChatMessage) -> int:
    """Return how many characters a message has."""
    return len(message.text) + sum(len(call.function.arguments) for call in message.tool_calls or ())


def _check_told(told: dict[str, Any], tokenizer: Any) -> None:
    """See that what a client tells a template is no argument of the tokenizer's, such as another template."""
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    if taken := sorted(told.keys() & reserved):
        raise bad_argument("chat_template_kwargs", "names that are free for the template", f"{taken[0]!r}")


router = APIRouter(tags=["chat"], route_class=SizedRoute)


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=ChatCompletion,
    responses=answers_with_events(ChatChunk),
)
async def chat(body: ChatRequest, request: Request, server: Server, caller: AnyCaller) -> ChatCompletion | Response:
    """Write answers to a conversation, as OpenAI's endpoint does."""
    generation, answer = await begin_chat(body, request, server, caller)
    if body.stream:
        return await stream(generation, answer.frame, answer.chunks, generation.usage)
    async with generation:
        (output,) = await generation.finished()
        usage = generation.usage()
    return ChatCompletion.model_validate(
        {**answer.frame, **answer.beside(output), "choices": answer.choices(output), "usage": usage}
    )


async def begin_chat(
    body: ChatRequest, request: Request, server: ServerState, caller: Caller
) -> tuple[Generation, ChatAnswer]:
    """Return what will answer a conversation, not yet started, and what makes the answer of its outputs.

    The other APIs that hold conversations translate theirs to a `ChatRequest` and the choices back.
    """
    server.model.check_name(body.model)
    if body.top_logprobs and not body.logprobs:
        raise bad_argument("top_logprobs", "logprobs = true beside it")
    prepared = await while_there(request, prepare(body, server, caller))
    answer = ChatAnswer(body, server, prepared, request_id_of(request.scope))
    return Generation(body, request, server, caller, [prepared.job], answer.frame["id"]), answer


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat as the engine takes it.

    Attributes
    ----------
    job : Job
    tools : ToolUse, optional
        Its ``reader()`` reads an answer; where there is none, the answer is a text.
    """

    job: Job
    tools: ToolUse | None

    def reader(self) -> MessageReader:
        """Return what reads one answer."""
        return MessageReader() if self.tools is None else self.tools.reader()


async def prepare(body: ChatRequest, server: ServerState, caller: Caller) -> PreparedChat:
    """Write a chat out and settle how to answer it.

    Raises
    ------
    ApiError, InvalidOperation
        Something does not go together, is not supported, or does not fit.
    """
    body.check_prompt_logprobs()
    form = ChatForm.of(body, server)
    more: dict[str, Any] = {"max_tokens": body.limit, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    structure = structure_beside(form.tools, asked_structure(body), server.model.special_tokens)
    more["structured"] = await server.model.structured(structure, caller.name)
    has_template = server.model.template(form.template, with_tools=form.tools is not None) is not None
    if not has_template and more["structured"] is None:
        own = [body.stop] if isinstance(body.stop, str) else body.stop or []
        more["stop"] = [*own, *PLAIN_STOPS]
    if form.tools is not None and form.tools.shows_marks(server.model.special_tokens):
        more["skip_special_tokens"] = False
    params = body.sampling_params(**more)
    params.require_vocab(server.model.vocab_size)
    ids = await chat_tokens(body, server, caller, form)
    server.model.check_length(len(ids), body.limit, "messages")
    return PreparedChat(Job(ids, params), form.tools)


async def chat_tokens(
    body: ChatRequest, server: ServerState, caller: Caller, form: ChatForm | None = None
) -> list[int]:
    """Return the prompt that a request's conversation makes."""
    last, form = body.truncate_prompt_tokens, form or ChatForm.of(body, server)
    ids = await encode_chat(server.model, body.messages, form, caller.name, cuts=last is not None)
    return server.model.last_tokens(ids, last, body.limit)


class ChatAnswer:
    """Makes the objects of an answer out of the engine's outputs."""

    def __init__(self, body: ChatRequest, server: ServerState, chat: PreparedChat, request_id: str) -> None:
        self._body, self._tokens, self._chat = body, server.tokens, chat
        self._readers: dict[int, MessageReader] = {}
        self.frame: dict[str, Any] = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": server.model.name,
        }

    def beside(self, output: RequestOutput) -> dict[str, Any]:
        """Return what is told of the prompt beside the answers, in a stream with the first piece of each."""
        ids, count = output.prompt_token_ids, self._body.prompt_logprobs
        told: dict[str, Any] = {"prompt_token_ids": ids} if self._body.return_token_ids else {}
        if count is not None:
            told["prompt_logprobs"] = self._tokens.prompt_entries(output.prompt_logprobs, ids, count)
        return told

    def choices(self, output: RequestOutput) -> list[dict[str, Any]]:
        """Return all answers."""
        return [self._choice(choice) for choice in output.outputs]

    def chunks(self, place: int, output: RequestOutput, delta: CompletionOutput, first: bool) -> list[dict[str, Any]]:
        """Return the choices of a stream that hold a delta: one for each piece of a text or a call."""
        reader = self._reader(delta.index)
        if reader.parser is None:
            told: list[dict[str, Any]] = [{"content": delta.text}]
        else:
            told = [told_delta(each) for each in reader.read(delta.text, is_last=delta.finished)]
            has_tokens = delta.token_ids if self._body.return_token_ids else delta.logprobs
            if not (told or first or delta.finished or has_tokens):
                return []
            told = told or [{}]
        if first:
            told[0] = {"role": "assistant", "content": None, **told[0]}
        choices = [{"index": delta.index, "delta": each, "finish_reason": None} for each in told]
        choices[-1] |= self._rest(delta, reader)
        if first and (beside := self.beside(output)):
            choices[0][BESIDE] = beside
        return choices

    def _choice(self, choice: CompletionOutput) -> dict[str, Any]:
        reader = self._reader(choice.index)
        reader.read(choice.text, is_last=True)
        calls = {"tool_calls": [call.told for call in reader.calls]} if reader.calls else {}
        message = {"role": "assistant", "content": reader.content, **calls}
        return {**self._rest(choice, reader), "message": message}

    def _reader(self, index: int) -> MessageReader:
        if index not in self._readers:
            self._readers[index] = self._chat.reader()
        return self._readers[index]

    def _rest(self, delta: CompletionOutput, reader: MessageReader) -> dict[str, Any]:
        return {
            "index": delta.index,
            "logprobs": self._logprobs(delta) if self._body.logprobs else None,
            "finish_reason": reader.finish_reason(delta.finish_reason),
            "stop_reason": delta.stop_reason,
            **({"token_ids": delta.token_ids} if self._body.return_token_ids else {}),
        }

    def _logprobs(self, delta: CompletionOutput) -> dict[str, Any]:
        count = self._body.top_logprobs or 0
        entries = zip(delta.token_ids, delta.logprobs or [], strict=False)
        return {"content": [self._tokens.chat_entry(token, likely, count) for token, likely in entries]}
