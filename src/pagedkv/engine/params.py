"""SamplingParams: what a caller asks of the text that the engine writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagedkv.errors import InvalidOperation

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop."""

    n: int = 1
    max_tokens: int | None = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    prompt_lookup: int = 0
    streaming: tuple[int, int] | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidOperation(f"n expects at least 1, got {self.n}")
