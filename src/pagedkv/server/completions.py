"""Text completions: ``/v1/completions``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pagedkv.engine import CompletionOutput, RequestOutput
from pagedkv.errors import bad_argument
from pagedkv.server.answers import Completion, CompletionChunk, Usage
from pagedkv.server.auth import AnyCaller, Caller
from pagedkv.server.errors import ApiError
from pagedkv.server.generation import Generation, Job, stream, while_there
from pagedkv.server.json_body import SizedRoute
from pagedkv.server.logs import request_id_of
from pagedkv.server.model import Infilling
from pagedkv.server.openapi import answers_with_events
from pagedkv.server.schemas import CompletionRequest
from pagedkv.server.state import Server, ServerState
from pagedkv.server.structure import asked_structure

router = APIRouter(tags=["completions"], route_class=SizedRoute)
DEFAULT_MAX_TOKENS = 16


@router.post(
    "/v1/completions",
    summary="Go on from prompts",
    response_model=Completion,
    responses=answers_with_events(CompletionChunk),
)
async def complete(
    body: CompletionRequest, request: Request, server: Server, caller: AnyCaller
) -> Completion | Response:
    """Write texts that continue the prompts, as OpenAI's endpoint does."""
    generation, answer = await begin_completion(body, request, server, caller)
    if body.stream:
        return await stream(generation, answer.frame, answer.chunks, lambda: answer.usage(generation))
    async with generation:
        outputs = await generation.finished()
        return Completion.model_validate(
            {**answer.frame, "choices": answer.choices(outputs), "usage": answer.usage(generation)}
        )


async def begin_completion(
    body: CompletionRequest, request: Request, server: ServerState, caller: Caller
) -> tuple[Generation, CompletionAnswer]:
    """Return what will go on from prompts, not yet started, and what makes the answer of its outputs."""
    server.model.check_name(body.model)
    _refuse_what_does_not_go_together(body)
    answer = await while_there(request, _prepare(body, request, server, caller))
    return Generation(body, request, server, caller, answer.jobs, answer.frame["id"]), answer


def _refuse_what_does_not_go_together(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of < body.texts:
        raise bad_argument("best_of", f"at least n = {body.texts}", f"{body.best_of}")
    if body.stream and body.best_of is not None and body.best_of > body.texts:
        message = "best_of: does not go with stream, as the best are known at the end only"
        raise ApiError(400, message, param="best_of", code="invalid_value")
    if body.suffix and body.echo:
        raise bad_argument("echo", "false beside suffix, as the text stands in the middle", "true")
    body.check_prompt_logprobs()


async def _prepare(body: CompletionRequest, request: Request, server: ServerState, caller: Caller) -> CompletionAnswer:
    prompts = body.prompts
    server.check_prompts(len(prompts))
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    chosen_among = max(body.texts, body.best_of or 1)
    likely = body.logprobs
    if chosen_among > body.texts and likely is None:
        likely = 0  # the best are found by them
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    more: dict[str, Any] = {"prompt_logprobs": max((each for each in wanted if each is not None), default=None)}
    infilling = _infilling(body, server)
    more["structured"] = await server.model.structured(asked_structure(body), caller.name)
    if infilling is not None:
        more["stop_token_ids"] = [*(body.stop_token_ids or ()), *infilling.ends]
    params = body.sampling_params(n=chosen_among, max_tokens=max(1, max_tokens), logprobs=likely, **more)
    params.require_vocab(server.model.vocab_size)
    jobs, texts = [], []
    for prompt in prompts:
        whole = await _encode(prompt, body, server, caller)
        ids = server.model.last_tokens(whole, body.truncate_prompt_tokens, max_tokens)
        server.model.check_length(len(ids), max_tokens, "prompt")
        jobs.append(Job(ids, params))
        if body.echo:
            if not isinstance(prompt, str) or len(ids) < len(whole):
                prompt = await server.model.decode(ids, caller.name, special_tokens=False)
            texts.append(prompt)
    return CompletionAnswer(body, server, jobs, texts, silent=max_tokens == 0, request_id=request_id_of(request.scope))


async def _encode(prompt: str | list[int], body: CompletionRequest, server: ServerState, caller: Caller) -> list[int]:
    """Return the tokens of a prompt, with what follows the text where there is something."""
    model, cuts = server.model, body.truncate_prompt_tokens is not None
    special = body.add_special_tokens is not False
    infilling = _infilling(body, server)
    if not isinstance(prompt, str):
        if not cuts:
            model.check_length(len(prompt), None, "prompt")
        model.check_ids(prompt, "prompt")
        await asyncio.sleep(0)  # so many more may follow
        if infilling is None:
            return prompt
        special = False  # whoever brings tokens brings all of them
    elif infilling is None:
        return await model.encode(prompt, caller.name, special_tokens=special, cuts=cuts)
    first = await model.encode("", caller.name) if special else []
    before = prompt
    if isinstance(before, str):
        before = await model.encode(before, caller.name, special_tokens=False, cuts=cuts)
    after = await _encode_suffix(body.suffix or "", server, caller, has_spaces=infilling.has_spaces)
    return [*first, *infilling.prompt(before, after)]


async def _encode_suffix(text: str, server: ServerState, caller: Caller, *, has_spaces: bool) -> list[int]:
    """Return the tokens of a text without the space that some tokenizers put before it."""
    sign = await server.model.encode("☺", caller.name, special_tokens=False) if has_spaces else []
    ids = await server.model.encode("☺" * has_spaces + text, caller.name, special_tokens=False, param="suffix")
    return ids[len(sign) :]


def _infilling(body: CompletionRequest, server: ServerState) -> Infilling | None:
    """Return how to ask for a text before a suffix; None if there is no suffix, 400 if the model does not know how."""
    if not body.suffix:
        return None
    if server.model.infilling is None:
        message = "suffix: this model was not taught to fill in: its tokenizer has no marks for it"
        raise ApiError(400, message, param="suffix", code="unsupported_parameter")
    return server.model.infilling


@dataclass(eq=False)
class CompletionAnswer:
    """Makes the objects of an answer out of the engine's outputs."""

    body: CompletionRequest
    server: ServerState
    jobs: list[Job]
    prompts: list[str]
    silent: bool
    """Whether no token was asked for: the engine writes one, which is not told."""
    request_id: str
    offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.frame: dict[str, Any] = {
            "id": f"cmpl-{self.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.server.model.name,
        }

    def choices(self, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
        """Return the texts of all prompts, the best ones where there are more than were asked for."""
        texts = self.body.texts
        return [
            self._choice(place * texts + index, choice, output, first=True)
            for place, output in enumerate(outputs)
            for index, choice in enumerate(_best(output.outputs, texts))
        ]

    def chunks(self, place: int, output: RequestOutput, delta: CompletionOutput, first: bool) -> list[dict[str, Any]]:
        """Return the choice of a stream that holds a delta."""
        return [self._choice(place * self.body.texts + delta.index, delta, output, first)]

    def usage(self, generation: Generation) -> Usage:
        """Return what it cost."""
        usage = generation.usage()
        if self.silent:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _choice(self, index: int, delta: CompletionOutput, output: RequestOutput, first: bool) -> dict[str, Any]:
        text = "" if self.silent else delta.text
        if self.body.echo and first:
            text = self.prompts[index // self.body.texts] + text
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(index, delta, output, first),
            "finish_reason": "length" if self.silent and delta.finish_reason else delta.finish_reason,
            "stop_reason": None if self.silent else delta.stop_reason,
        }
        ids, count = output.prompt_token_ids, self.body.prompt_logprobs
        if count is not None:
            choice["prompt_logprobs"] = self.server.tokens.prompt_entries(output.prompt_logprobs, ids, count)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": ids} if first else {}
            choice["token_ids"] = () if self.silent else delta.token_ids
        return choice

    def _logprobs(self, index: int, delta: CompletionOutput, output: RequestOutput, first: bool) -> dict[str, Any]:
        tokens = [] if self.silent else list(delta.token_ids)
        likely: list[Any] = [] if self.silent else list(delta.logprobs or [])
        if self.body.echo and first:
            tokens = [*output.prompt_token_ids, *tokens]
            likely = [*self._prompt_logprobs(output), *likely]
        offset = self.offsets.get(index, 0)
        entries = self.server.tokens.completion_entries(tokens, likely, offset)
        if tokens:
            self.offsets[index] = entries["text_offset"][-1] + self.server.tokens.length(tokens[-1])
        return entries

    def _prompt_logprobs(self, output: RequestOutput) -> list[Any]:
        """Return how likely the tokens of the prompt are, with as many likeliest ones as for the text."""
        ids, likely = output.prompt_token_ids, output.prompt_logprobs or [None] * len(output.prompt_token_ids)
        count = self.body.logprobs or 0
        return [
            found and {other: of for other, of in found.items() if other == token or of.rank <= count}
            for token, found in zip(ids, likely, strict=True)
        ]


def _best(choices: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """Return the texts whose tokens are the likeliest on the average."""
    if len(choices) <= count:
        return choices

    def mean(choice: CompletionOutput) -> float:
        return (choice.cumulative_logprob or 0.0) / max(1, len(choice.token_ids))

    return sorted(choices, key=mean, reverse=True)[:count]
