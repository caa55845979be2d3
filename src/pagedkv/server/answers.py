"""Bodies of the answers of the API, whole and in pieces."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from pagedkv.server.schemas import ToolCall


class PromptLogprob(BaseModel):
    """How likely a token of a prompt was."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token: ids to the token itself and the likeliest ones in its place; null for the first."""


def _is_none(value: object) -> bool:
    return value is None


class PromptTokensDetails(BaseModel):
    """Where the tokens of the prompts came from."""

    cached_tokens: int = Field(description="Tokens whose keys and values came from the cache.")


class Usage(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


# Of ``/v1/chat/completions``.


class TokenLogprob(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """The log probabilities of the tokens of a text."""

    content: list[ChosenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the model answers."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null where tools are called and nothing is said beside it.")
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None = Field(None, description="Extension: the stop token or string that ended it.")
    token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class ChatCompletion(BaseModel):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class FunctionDelta(BaseModel):
    """What is new in a call: the name with its first piece, then more of the arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new in a call; id and type come with its first piece."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What is new in one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """A piece of a stream: the data of one event. The last event is ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = Field(None, description="With the first piece of each answer.")


# Of ``/v1/completions``.


class CompletionLogprobs(BaseModel):
    """The log probabilities of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in the text, in characters.")


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = Field(None, description="Extension: the stop token or string that ended it.")
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=_is_none)
    token_ids: list[int] | None = Field(None, exclude_if=_is_none)


class Completion(BaseModel):
    """All texts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(BaseModel):
    """A piece of a stream: the data of one event. The last event is ``[DONE]``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
