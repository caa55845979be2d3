"""What a replica tells is put together again, whatever comes between two of its outputs."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.engine import CompletionOutput, Logprob, RequestOutput, SamplingParams
from pagedkv.engine.request import RequestMetrics
from pagedkv.errors import InvalidOperation, ReplicaLost
from pagedkv.replicas.messages import Asked, Told, news_of, output_of, with_seed
from pagedkv.replicas.sending import Sent

PROMPT = (5, 6, 7)
WORDS = ["a", "bc", "d e", "ü", ""]


def output(tokens: list[list[int]], *, finished: bool = False, logprobs: bool = False, at: float = 1.0) -> Any:
    """An output of which each text has these tokens."""
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=PROMPT,
        outputs=[
            CompletionOutput(
                index=place,
                text="".join(WORDS[token] for token in ids),
                token_ids=tuple(ids),
                finish_reason="stop" if finished else None,
                logprobs=[{token: Logprob(-float(token), 1)} for token in ids] if logprobs else None,
                cumulative_logprob=-float(sum(ids)) if logprobs else None,
            )
            for place, ids in enumerate(tokens)
        ],
        finished=finished,
        num_cached_tokens=len(tokens),
        metrics=RequestMetrics(arrived=100.0, first_scheduled=100.5, first_token=100.0 + at),
    )


texts = st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=3)


@given(st.lists(texts, min_size=1, max_size=6), st.booleans())
def test_outputs_are_put_together_again_whether_they_grow_or_take_back(outputs: Any, logprobs: bool) -> None:
    made = [output(each, logprobs=logprobs) for each in outputs]
    before = told_before = None
    for each in made:
        told = pickle.loads(pickle.dumps(news_of(each, before)))
        told_before = output_of(told, told_before, "r", PROMPT, 100.0, 100.0)
        assert told_before == each
        before = each


def test_what_was_told_is_not_told_again() -> None:
    first, second = output([[1, 2]], logprobs=True), output([[1, 2, 3]], logprobs=True)
    (news,) = news_of(second, first).texts
    assert (news.kept_text, news.text, news.kept_tokens, news.token_ids) == (5, "ü", 2, (3,))
    assert news.logprobs == [{3: Logprob(-3.0, 1)}]


def test_logprobs_of_a_prompt_are_told_once_they_are_complete() -> None:
    part, whole = [None, {6: Logprob(-1.0, 2)}], [None, {6: Logprob(-1.0, 2)}, {7: Logprob(-2.0, 1)}]
    first = replace(output([[1]]), prompt_logprobs=part)
    second, third = (
        replace(output([[1, 2]]), prompt_logprobs=whole),
        replace(output([[1, 2, 3]]), prompt_logprobs=whole),
    )
    told = [news_of(first, None), news_of(second, first), news_of(third, second)]
    assert [each.prompt_logprobs for each in told] == [None, whole, None]
    before = None
    for each in told:
        before = output_of(each, before, "r", PROMPT, 100.0, 100.0)
    assert before is not None and before.prompt_logprobs == whole


def test_times_are_those_of_the_door() -> None:
    """The clock of a replica may say anything; a request that is sent a second time arrived at the first."""
    got = output_of(news_of(output([[1]]), None), None, "r", PROMPT, 7.0, 9.0)
    assert (got.metrics.arrived, got.metrics.first_scheduled, got.metrics.first_token) == (7.0, 9.5, 10.0)
    assert got.metrics.finished is None


def test_a_seed_is_drawn_where_there_is_chance_and_none() -> None:
    assert with_seed(SamplingParams()).seed is None
    assert with_seed(SamplingParams(temperature=1.0, seed=3)).seed == 3
    drawn = {with_seed(SamplingParams(temperature=1.0)).seed for _ in range(20)}
    assert len(drawn) == 20 and None not in drawn


def test_a_replica_gets_of_a_request_what_was_asked_alone() -> None:
    asked = Asked(request_id="r", token_ids=np.arange(4), params=SamplingParams(stop=["x"]), tenant="t")
    sent = pickle.loads(pickle.dumps(Sent(asked, ("a",), "b")))
    assert (sent.avoid, sent.replica, sent.asked.tenant, sent.asked.params) == ((), "", "t", asked.params)
    assert sent.asked.token_ids.tolist() == [0, 1, 2, 3]


def test_errors_keep_what_they_say() -> None:
    for error in (InvalidOperation("no", "prompt", "say more"), ReplicaLost("a", "it was killed")):
        again = pickle.loads(pickle.dumps(Told(error=error))).error
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
