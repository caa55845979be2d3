"""What the door of a fleet and its replicas tell each other: requests, and what is new in their outputs."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pagedkv.engine import CompletionOutput, EngineSizes, Logprob, RequestOutput, SamplingParams
from pagedkv.engine.request import FinishReason, RequestMetrics
from pagedkv.errors import PagedKvError


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Asked:
    """A request as it goes to a replica.

    Attributes
    ----------
    request_id : str
    token_ids : int64 [num_prompt_tokens]
    params : SamplingParams
    priority : int
    cache_salt : str
    session_id : str, optional
    tenant : str
    """

    request_id: str
    token_ids: npt.NDArray[np.int64]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    session_id: str | None = None
    tenant: str = ""


def with_seed(params: SamplingParams) -> SamplingParams:
    """Return parameters by which any replica writes the same text: with a seed, drawn here where none was given."""
    if params.greedy or params.seed is not None:
        return params
    return replace(params, seed=secrets.randbits(63))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextNews:
    """What is new in one text of a request; what was there before is not told again.

    Attributes
    ----------
    kept_text, kept_tokens : int
        How many characters and tokens of the text before still stand.
    text : str
    token_ids : tuple of int
    logprobs : list of dict, optional
        Of the new tokens.
    index, finish_reason, stop_reason, cumulative_logprob
        As of :class:`pagedkv.engine.CompletionOutput`.
    """

    index: int
    kept_text: int
    text: str
    kept_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a replica tells of a request: what is new, or why it ends.

    Attributes
    ----------
    texts : tuple of TextNews
    finished : bool
    num_cached_tokens : int
    times : RequestMetrics, optional
        In seconds since the request arrived at the replica, as the clocks of two machines differ.
    prompt_logprobs : list of dict, optional
        Told once, when they are complete.
    error : PagedKvError, optional
    """

    texts: tuple[TextNews, ...] = ()
    finished: bool = False
    num_cached_tokens: int = 0
    times: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: PagedKvError | None = None


def _shifted(times: RequestMetrics, seconds: float) -> RequestMetrics:
    """Return the same moments on a clock that is ahead by so many seconds."""

    def later(moment: float | None) -> float | None:
        return None if moment is None else moment + seconds

    return replace(
        times,
        arrived=times.arrived + seconds,
        first_scheduled=later(times.first_scheduled),
        first_token=later(times.first_token),
        finished=later(times.finished),
    )


def news_of(output: RequestOutput, before: RequestOutput | None) -> Told:
    """Return what an output brings beyond the one that was told last."""
    pairs = zip(output.outputs, _texts_before(before, len(output.outputs)), strict=True)
    all_tokens = len(output.prompt_token_ids)
    is_whole = output.prompt_logprobs is not None and len(output.prompt_logprobs) == all_tokens
    was_whole = before is not None and before.prompt_logprobs is not None and len(before.prompt_logprobs) == all_tokens
    return Told(
        texts=tuple(_text_news(text, old) for text, old in pairs),
        finished=output.finished,
        num_cached_tokens=output.num_cached_tokens,
        times=_shifted(output.metrics, -output.metrics.arrived),
        prompt_logprobs=output.prompt_logprobs if is_whole and not was_whole else None,
    )


def _texts_before(before: RequestOutput | None, count: int) -> Sequence[CompletionOutput | None]:
    """Return the texts that as many new ones go on from, if they do."""
    return before.outputs if before is not None and len(before.outputs) == count else [None] * count


def _text_news(text: CompletionOutput, before: CompletionOutput | None) -> TextNews:
    kept_text = kept_tokens = 0
    if before is not None and text.index == before.index:
        # Beams, and stops that cut a text, take back what was there.
        kept_text = len(before.text) if text.text.startswith(before.text) else 0
        kept_tokens = len(before.token_ids) if text.token_ids[: len(before.token_ids)] == before.token_ids else 0
    return TextNews(
        index=text.index,
        kept_text=kept_text,
        text=text.text[kept_text:],
        kept_tokens=kept_tokens,
        token_ids=text.token_ids[kept_tokens:],
        finish_reason=text.finish_reason,
        stop_reason=text.stop_reason,
        logprobs=None if text.logprobs is None else text.logprobs[kept_tokens:],
        cumulative_logprob=text.cumulative_logprob,
    )


def output_of(
    told: Told, before: RequestOutput | None, request_id: str, prompt: tuple[int, ...], arrived: float, sent: float
) -> RequestOutput:
    """Return the whole output, of what is new in it and the one before it.

    Parameters
    ----------
    told : Told
        By `news_of`, without an error.
    before : RequestOutput, optional
        What the news before this one became.
    request_id : str
    prompt : tuple of int
    arrived, sent : float
        When the request came, and when it was sent to this replica, in seconds of ``time.monotonic``.
    """
    known = _texts_before(before, len(told.texts))
    prompt_logprobs = told.prompt_logprobs
    if prompt_logprobs is None and before is not None:
        prompt_logprobs = before.prompt_logprobs
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=prompt,
        outputs=[_text_of(news, old) for news, old in zip(told.texts, known, strict=True)],
        finished=told.finished,
        num_cached_tokens=told.num_cached_tokens,
        metrics=replace(_shifted(told.times or RequestMetrics(arrived=0.0), sent), arrived=arrived),
        prompt_logprobs=prompt_logprobs,
    )


def _text_of(news: TextNews, before: CompletionOutput | None) -> CompletionOutput:
    text, token_ids = ("", ()) if before is None else (before.text, before.token_ids)
    logprobs = news.logprobs
    if logprobs is not None and before is not None and before.logprobs is not None:
        logprobs = before.logprobs[: news.kept_tokens] + logprobs
    return CompletionOutput(
        index=news.index,
        text=text[: news.kept_text] + news.text,
        token_ids=token_ids[: news.kept_tokens] + news.token_ids,
        finish_reason=news.finish_reason,
        stop_reason=news.stop_reason,
        logprobs=logprobs,
        cumulative_logprob=news.cumulative_logprob,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a replica is.

    Attributes
    ----------
    replica : str
        Its name.
    sizes : EngineSizes
    media : tuple of str
        Of its tiers, nearest first.
    end_ids : tuple of int
        Tokens that end a text.
    """

    replica: str
    sizes: EngineSizes
    media: tuple[str, ...]
    end_ids: tuple[int, ...]
