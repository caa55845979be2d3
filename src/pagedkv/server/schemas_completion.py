"""The bodies of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pagedkv.server.schemas import MOST_LOGPROBS, MOST_TEXTS, GenerationFields, TokenId, Usage

__all__ = ["Completion", "CompletionChoice", "CompletionChunk", "CompletionLogprobs", "CompletionRequest"]

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = (
    Text
    | Tokens
    | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
)


class CompletionRequest(GenerationFields):
    """Go on from prompts."""

    prompt: Prompt = Field(description="A text, texts, token ids, or lists of token ids.")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="16 by default.")
    echo: bool | None = Field(None, description="Return the prompt before the text.")
    best_of: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = Field(
        None, description="Write so many texts and return the n likeliest by token; not in streams."
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: str | None = Field(None, description="Not supported.")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


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
