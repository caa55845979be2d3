"""Chat completions: ``/v1/chat/completions`` and chat templates."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from pagedkv.engine import CompletionOutput, RequestOutput
from pagedkv.errors import bad_argument
from pagedkv.server.auth import Caller, caller_of
from pagedkv.server.errors import ApiError
from pagedkv.server.generation import Generation, Job, stream, while_there
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.logs import request_id_of
from pagedkv.server.model import ServedModel
from pagedkv.server.openapi import answers_with_events
from pagedkv.server.schemas import ChatChunk, ChatCompletion, ChatMessage, ChatRequest
from pagedkv.server.state import Server, ServerState
from pagedkv.server.structure import asked_structure

PLAIN_STOPS = ("\nuser:", "\nsystem:")
"""Where an answer ends in the plain form: the model begins to speak for another role."""


def has_template(model: ServedModel) -> bool:
    """Whether the model, or its operator, says how a chat is written."""
    return bool(model.chat_template or getattr(model.tokenizer, "chat_template", None))


def plain_chat(messages: Sequence[ChatMessage], *, open_answer: bool = True) -> str:
    """Return a chat in the plain form, for models without a template: ``role: text`` and an empty line, each."""
    said = [f"{_role(message)}: {message.text}\n\n" for message in messages]
    return "".join(said) + ("assistant:" if open_answer else "")


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """How a chat is written out.

    Attributes
    ----------
    open_answer : bool
        Whether it ends where the answer begins.
    special_tokens : bool, optional
        Whether the tokenizer adds those that open a text; by default where there is no template that writes them.
    told : dict
        What a template is told beside the messages.
    """

    open_answer: bool = True
    special_tokens: bool | None = None
    told: dict[str, Any] = field(default_factory=dict)

    def render(self, model: ServedModel, messages: Sequence[ChatMessage], tokenizer: Any) -> str:
        """Return the text of a chat as the template of the model writes it."""
        said = [{"role": _role(message), "content": message.text} for message in messages]
        text: str = tokenizer.apply_chat_template(
            said,
            chat_template=model.chat_template,
            tokenize=False,
            add_generation_prompt=self.open_answer,
            **self.told,
        )
        return text


async def encode_chat(model: ServedModel, messages: Sequence[ChatMessage], form: ChatForm, tenant: str) -> list[int]:
    """Return the tokens of a chat; an error if a message is empty, or the template does not take them."""
    for place, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            name = f"messages.{place}.content"
            raise bad_argument(name, "a text or parts of type text", "none")
    if not has_template(model):
        if form.told:
            raise bad_argument("chat_template_kwargs", "none, as this model has no chat template", "some")
        text = plain_chat(messages, open_answer=form.open_answer)
        special = form.special_tokens is not False
        return await model.encode(text, tenant, special_tokens=special, param="messages")
    _check_told(form.told, model.tokenizer)
    characters = sum(len(message.text) for message in messages)
    model.check_text(characters, "messages")
    try:
        text = await model.render_chat(partial(form.render, model, messages), tenant, characters)
    except ApiError:
        raise
    except Exception as error:
        # Templates refuse by raising, an unusual order of roles for instance. What they say may quote the messages,
        # which is fine towards the client who sent them.
        raise ApiError(
            400, f"messages: the chat template refuses them: {error}", param="messages", code="chat_template"
        ) from error
    return await model.encode(text, tenant, special_tokens=form.special_tokens is True, param="messages")


def _check_told(told: dict[str, Any], tokenizer: Any) -> None:
    """See that what a client tells a template is no argument of the tokenizer's, such as another template."""
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    if taken := sorted(told.keys() & reserved):
        raise bad_argument("chat_template_kwargs", "names that are free for the template", f"{taken[0]!r}")


def _role(message: ChatMessage) -> str:
    # The newer name of the system's role, which templates do not know.
    return "system" if message.role == "developer" else message.role


router = APIRouter(tags=["chat"], route_class=SizedRoute)


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=ChatCompletion,
    responses=answers_with_events(ChatChunk),
)
async def chat(
    body: ChatRequest, request: Request, server: Server, caller: Annotated[Caller, Depends(caller_of)]
) -> ChatCompletion | Response:
    """Write answers to a conversation, as OpenAI's endpoint does."""
    server.model.check_name(body.model)
    if body.top_logprobs and not body.logprobs:
        raise bad_argument("top_logprobs", "logprobs = true beside it")
    answer = _Answer(body, server, request_id_of(request.scope))
    job = await while_there(request, _job(body, server, caller))
    generation = Generation(body, request, server, caller, [job], answer.frame["id"])
    if body.stream:
        return await stream(generation, answer.frame, answer.chunk, generation.usage)
    async with generation:
        (output,) = await generation.finished()
        usage = generation.usage()
    return ChatCompletion.model_validate({**answer.frame, "choices": answer.choices(output), "usage": usage})


async def _job(body: ChatRequest, server: ServerState, caller: Caller) -> Job:
    more: dict[str, Any] = {"max_tokens": body.limit, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    more["structured"] = await server.model.structured(asked_structure(body), caller.name)
    if not has_template(server.model) and more["structured"] is None:
        own = [body.stop] if isinstance(body.stop, str) else body.stop or []
        more["stop"] = [*own, *PLAIN_STOPS]
    params = body.sampling_params(**more)
    params.require_vocab(server.model.vocab_size)
    form = ChatForm(
        open_answer=body.add_generation_prompt is not False,
        special_tokens=body.add_special_tokens,
        told=body.chat_template_kwargs or {},
    )
    ids = await encode_chat(server.model, body.messages, form, caller.name)
    server.model.check_length(len(ids), body.limit, "messages")
    return Job(ids, params)


class _Answer:
    """Makes the objects of an answer out of the engine's outputs."""

    def __init__(self, body: ChatRequest, server: ServerState, request_id: str) -> None:
        self._body, self._tokens = body, server.tokens
        self.frame: dict[str, Any] = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": server.model.name,
        }

    def choices(self, output: RequestOutput) -> list[dict[str, Any]]:
        """Return all answers."""
        return [
            {**self._rest(choice), "message": {"role": "assistant", "content": choice.text}}
            for choice in output.outputs
        ]

    def chunk(self, place: int, output: RequestOutput, delta: CompletionOutput, first: bool) -> dict[str, Any]:
        """Return the choice of a stream that holds a delta."""
        role = {"role": "assistant"} if first else {}
        return {**self._rest(delta), "delta": {**role, "content": delta.text}}

    def _rest(self, delta: CompletionOutput) -> dict[str, Any]:
        return {
            "index": delta.index,
            "logprobs": self._logprobs(delta) if self._body.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, delta: CompletionOutput) -> dict[str, Any]:
        count = self._body.top_logprobs or 0
        entries = zip(delta.token_ids, delta.logprobs or [], strict=False)
        return {"content": [self._tokens.chat_entry(token, likely, count) for token, likely in entries]}
