"""What completions and chat have in common: how to sample, and what it cost."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pagedkv.engine import SamplingParams
from pagedkv.server.errors import ApiError

__all__ = ["Body", "GenerationFields", "PromptTokensDetails", "StreamOptions", "Text", "Usage"]

MOST_TEXTS = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16
INT64 = 2**63


# With a constraint of any kind halves of surrogate pairs, which no tokenizer takes, are refused.
Text = Annotated[str, StringConstraints(min_length=0)]


class Body(BaseModel):
    """A JSON object of a client: wrong types are refused, fields that nobody knows are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds the usage.")


StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class GenerationFields(Body):
    """How to write, and for whom; ``null`` means the default everywhere."""

    model: str | None = Field(None, description="The name of the model; the one that is served by default.")
    n: Annotated[int, Field(ge=1, le=MOST_TEXTS)] | None = Field(None, description="Texts for each prompt; 1.")
    stream: bool | None = Field(None, description="Send server-sent events.")
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="0 is greedy; 1 by default.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None, description="The same seed gives the same text, whatever else is computed beside it."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = Field(
        None, description="Token ids (as strings) to what is added to their logits."
    )
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="Extension; 0 or -1 means all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = Field(None, description="Extension.")
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="Extension.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = Field(
        None, description="Extension."
    )
    ignore_eos: bool | None = Field(None, description="Extension: go on after the end of the text.")
    skip_special_tokens: bool | None = Field(None, description="Extension; true.")
    include_stop_str_in_output: bool | None = Field(None, description="Extension.")
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        None, description="Extension: requests of different salts share no prefixes."
    )
    priority: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="Extension: higher goes first; 0 by default."
    )
    session_id: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        None, description="Extension: what belongs together; the header x-session-id says it, too."
    )
    prompt_cache_key: str | None = Field(None, description="Accepted and ignored: prefixes are found by themselves.")

    @property
    def texts(self) -> int:
        """How many texts are returned for a prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self, **more: Any) -> SamplingParams:
        """Return what the engine is asked; `more` wins.

        Raises
        ------
        ApiError
            400: fields that do not go together.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAME if getattr(self, name) is not None}
        given.setdefault("temperature", 1.0)
        if self.logit_bias:
            given["logit_bias"] = _token_biases(self.logit_bias)
        return SamplingParams(**{**given, **more})


_SAME = (
    "n",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def _token_biases(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            message = f"logit_bias: expected token ids as keys, got {name[:40]!r}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        biases[int(name)] = bias
    return biases


class PromptTokensDetails(BaseModel):
    """Where the tokens of the prompts came from."""

    cached_tokens: int = Field(description="Tokens whose keys and values came from the cache.")


class Usage(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
