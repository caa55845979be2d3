from __future__ import annotations

import pickle

import numpy as np
import pytest

from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidOperation


def test_defaults_are_greedy_and_penalise_nothing():
    params = SamplingParams()
    assert params.greedy and not params.penalises
    assert (params.n, params.max_tokens, params.stop, params.stop_token_ids) == (1, 64, (), ())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("n", 0, "an int in 1"),
        ("n", 1.0, "an int, got 1.0"),
        ("n", True, "an int, got True"),
        ("max_tokens", 0, "an int in 1"),
        ("min_tokens", -1, "an int in 0"),
        ("min_tokens", None, "an int, got None"),
        ("min_tokens", 65, "at most max_tokens = 64, got 65"),
        ("temperature", -0.1, "a number in 0"),
        ("temperature", float("nan"), "got nan"),
        ("temperature", float("inf"), "got inf"),
        ("temperature", "1", "a number, got '1'"),
        ("temperature", None, "a number, got None"),
        ("top_k", -2, "an int in -1"),
        ("top_k", 1.5, "an int, got 1.5"),
        ("top_p", 0, "a number above 0"),
        ("top_p", 1.1, "a number in 0 … 1"),
        ("min_p", 1.01, "a number in 0 … 1"),
        ("min_p", -0.01, "a number in 0 … 1"),
        ("repetition_penalty", 0.0, "a number above 0"),
        ("repetition_penalty", -1.0, "a number in 0"),
        ("presence_penalty", 2.1, "a number in -2 … 2"),
        ("frequency_penalty", -2.1, "a number in -2 … 2"),
        ("logit_bias", [1], "a mapping"),
        ("logit_bias", {"1": 1.0}, "an int, got '1'"),
        ("logit_bias", {-1: 1.0}, "an int in 0"),
        ("logit_bias", {1: 101.0}, "a number in -100 … 100, got 101.0"),
        ("logit_bias", {1: float("-inf")}, "got -inf"),
        ("stop", "", "none of them empty"),
        ("stop", ["a", ""], "none of them empty"),
        ("stop", [1], "strings"),
        ("stop", 5, "a string or strings"),
        ("stop_token_ids", 5, "a sequence of ints"),
        ("stop_token_ids", "ab", "a sequence of ints"),
        ("stop_token_ids", [-1], "an int in 0"),
        ("ignore_eos", 1, "a bool, got 1"),
        ("include_stop_str_in_output", None, "a bool"),
        ("skip_special_tokens", "no", "a bool"),
        ("logprobs", -1, "an int in 0"),
        ("logprobs", True, "an int, got True"),
        ("prompt_logprobs", 0.5, "an int, got 0.5"),
        ("seed", 2**64, "an int in"),
        ("seed", "x", "an int, got 'x'"),
        ("beam_width", 0, "an int in 1"),
        ("length_penalty", float("nan"), "got nan"),
        ("prompt_lookup", 65, "an int in 0 … 64"),
        ("streaming", 4, "a sequence"),
        ("streaming", (4,), "expected (sink_tokens, window_tokens)"),
        ("streaming", (4, 0), "window_tokens"),
        ("streaming", (-1, 4), "sink_tokens"),
    ],
)
def test_refusals_name_argument_expectation_and_value(name, value, expected):
    with pytest.raises(InvalidOperation) as caught:
        SamplingParams(**{name: value})
    assert f"{name}" in caught.value.reason
    assert expected in caught.value.reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 3),
        ("temperature", 0.5),
        ("prompt_lookup", 4),
        ("streaming", (4, 8)),
        ("logprobs", 0),
        ("stop", "x"),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("logit_bias", {1: 1.0}),
    ],
)
def test_what_does_not_go_with_beams_is_refused(name, value):
    with pytest.raises(InvalidOperation, match=f"^Invalid operation: {name}: "):
        SamplingParams(beam_width=2, **{name: value})


def test_values_are_put_in_one_form():
    params = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_k=-1,
        stop=["b", "a", "b"],
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int32(7): 1},
        streaming=[4, 16],
    )
    assert (params.n, params.temperature, params.top_k) == (2, 0.5, 0)
    assert type(params.n) is int and type(params.temperature) is float
    assert params.stop == ("b", "a") and params.stop_token_ids == (3, 4)
    assert params.logit_bias == {7: 1.0} and params.streaming == (4, 16)
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(max_tokens=None, min_tokens=1000).max_tokens is None


def test_the_callers_bias_is_copied():
    bias = {1: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 99.0
    assert params.logit_bias == {1: 1.0}


def test_ids_are_checked_against_the_vocabulary():
    SamplingParams(logit_bias={96: 1.0}, stop_token_ids=[96], logprobs=97).require_vocab(97)
    for wrong in ({"logit_bias": {97: 1.0}}, {"stop_token_ids": [97]}, {"logprobs": 98}, {"prompt_logprobs": 98}):
        with pytest.raises(InvalidOperation, match=next(iter(wrong))):
            SamplingParams(**wrong).require_vocab(97)


def test_frozen_and_picklable():
    params = SamplingParams(stop=["x"], logit_bias={1: 2.0}, seed=-5)
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(AttributeError):
        params.n = 2


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_tiny_temperatures_are_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy
