"""The bodies of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from pagedkv.server.schemas import MOST_LOGPROBS, Body, GenerationFields, Text, Usage

__all__ = ["ChatChoice", "ChatChunk", "ChatChunkChoice", "ChatCompletion", "ChatLogprobs", "ChatMessage", "ChatRequest"]


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="A text, or parts of type text; only an assistant may have said nothing."
    )
    name: str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(Body):
    """What the answer looks like; only text is supported."""

    type: str = "text"


class ChatRequest(GenerationFields):
    """Answer a conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="As many as fit by default.")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="The newer name of max_tokens; it wins."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = Field(None, description="Extension: open the answer; true.")
    response_format: ResponseFormat | None = Field(None, description='Only {"type": "text"}.')
    tools: list[Any] | None = Field(None, description="Not supported.")
    tool_choice: Any = Field(None, description='Not supported, except "none" and "auto".')
    functions: list[Any] | None = Field(None, description="Not supported.")
    modalities: list[str] | None = Field(None, description='Only ["text"].')

    @property
    def limit(self) -> int | None:
        """The most tokens to write."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


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
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(None, description="Extension: the stop token or string that ended it.")


class ChatCompletion(BaseModel):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What is new in one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class ChatChunk(BaseModel):
    """A piece of a stream: the data of one event. The last event is ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
