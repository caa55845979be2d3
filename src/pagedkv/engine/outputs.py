"""What the engine hands out: frozen, cumulative, free of references into the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pagedkv.engine.logprobs import Logprob

__all__ = ["CompletionOutput", "FinishReason", "RequestMetrics", "RequestOutput"]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds of ``time.monotonic``; None for what has not happened yet.

    Attributes
    ----------
    arrived, first_scheduled, first_token, finished : float
    num_preemptions : int
        How often its blocks were taken for others and its tokens computed again.
    """

    arrived: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One text of a request, as far as it is written.

    Attributes
    ----------
    index : int
        Which of the ``n`` texts.
    text : str
        Empty without a tokenizer.
    token_ids : tuple of int
        The generated tokens.
    finish_reason : {"stop", "length", "abort"}, optional
        None while it goes on.
    stop_reason : int or str, optional
        The stop token or stop string that ended it.
    logprobs : list of dict, optional
        One dict a token, token id to its log probability, where they were asked for.
    cumulative_logprob : float, optional
        Sum of the log probabilities of the tokens, where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None

    @property
    def finished(self) -> bool:
        """Whether this text is complete."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request, as far as it is done. Outputs are cumulative: the last one holds everything.

    Attributes
    ----------
    request_id : str
    prompt : str, optional
        None if token ids were given.
    prompt_token_ids : tuple of int
    outputs : list of CompletionOutput
        ``n`` of them, in the order of their indices.
    finished : bool
    num_cached_tokens : int
        Tokens of the prompt whose K and V came from the cache when the request was first scheduled.
    metrics : RequestMetrics
    prompt_logprobs : list of dict, optional
        One entry a prompt token, the first is None, where they were asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrived=0.0))
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
