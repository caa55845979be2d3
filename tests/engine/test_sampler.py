from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagedkv.engine.sampler import Sampler, SampleRow, random_seed, token_logprobs
from pagedkv.engine.sampling_kernels import draw, nucleus, uniforms, weigh
from pagedkv.engine.sampling_params import SamplingParams
from pagedkv.errors import InvalidLogits, InvalidOperation

VOCAB = 101  # no multiple of a vector's width


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def row_of(prompt: Any = (), said: Any = (), *, seed: int = 0, choice: int = 0, end_ids: Any = (), **params: Any):
    row = SampleRow("r", SamplingParams(**params), prompt, seed=seed, choice=choice, end_ids=end_ids)
    for token in said:
        row.accept(token)
    return row


def shaped(row: SampleRow, logits: Tensor) -> Tensor:
    array = logits.numpy().copy()
    row.shape(array)
    return torch.from_numpy(array)


def sample(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return Sampler().sample(logits, rows).token_ids.tolist()


# --- what changes logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.7, 5.0])
def test_repetition_penalty_is_transformers(penalty):
    prompt, said = [5, 5, 17, 3], [3, 90, 90, 41]
    logits = logits_of(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + said]), logits.clone())
    assert torch.equal(shaped(row_of(prompt, said, repetition_penalty=penalty), logits[0]), expected[0])


def test_logit_bias_is_transformers():
    bias = {5: 1.5, 17: -100.0, 100: 100.0}
    logits = logits_of(1)
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = processor(torch.tensor([[1]]), logits.clone())
    assert torch.equal(shaped(row_of(logit_bias=bias), logits[0]), expected[0])


@pytest.mark.parametrize("said", [0, 2, 3, 4])
def test_the_ban_of_min_tokens_is_transformers(said):
    logits, ends = logits_of(1), [7, 30]
    processor = MinNewTokensLengthLogitsProcessor(2, 3, torch.tensor(ends))
    expected = processor(torch.zeros(1, 2 + said, dtype=torch.int64), logits.clone())
    row = row_of([1, 2], [9] * said, min_tokens=3, end_ids=[30], stop_token_ids=[7])
    assert torch.equal(shaped(row, logits[0]), expected[0])


def test_frequency_and_presence_penalty_are_openais():
    """OpenAI's API reference: mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c of the sampled tokens."""
    prompt, said = [5, 60, 60], [5, 5, 5, 17]
    logits = logits_of(1)[0]
    expected = logits.clone()
    for token in set(said):
        expected[token] -= said.count(token) * 0.5 + 0.25
    found = shaped(row_of(prompt, said, frequency_penalty=0.5, presence_penalty=0.25), logits)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found[60], logits[60])


def test_all_together_in_the_order_of_vllm():
    """Bias, repetition, frequency, presence: a bias is penalised as part of the logit."""
    prompt, said = [5], [5, 9]
    row = row_of(
        prompt,
        said,
        logit_bias={5: 10.0},
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=1.0,
    )
    logits = torch.zeros(VOCAB)
    expected = torch.zeros(VOCAB)
    expected[5], expected[9] = 10 / 2 - 0.5 - 1, -0.5 - 1
    assert torch.equal(shaped(row, logits), expected)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=200), st.lists(st.integers(0, VOCAB - 1), max_size=20))
@settings(max_examples=50, deadline=None)
def test_counts_that_grow_are_the_counts_of_the_whole(said, prompt):
    settings_ = dict(repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.5)
    grown = row_of(prompt, said, **settings_)
    split = row_of(prompt, said[: len(said) // 2], **settings_).ahead(said[len(said) // 2 :])
    logits = logits_of(1)[0]
    expected = logits.clone()
    for token in {*prompt, *said}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
        if token in said:
            expected[token] -= 0.25 * said.count(token) + 0.5
    assert torch.allclose(shaped(grown, logits), expected, atol=1e-5)
    assert torch.equal(shaped(grown, logits), shaped(split, logits))


def test_a_row_ahead_leaves_the_row_alone():
    row = row_of([1], [2], frequency_penalty=1.0, seed=3)
    before = shaped(row, torch.zeros(VOCAB))
    ahead = row.ahead([2, 4], choice=5)
    assert (row.position, row.choice, ahead.position, ahead.choice) == (1, 0, 3, 5)
    assert torch.equal(shaped(row, torch.zeros(VOCAB)), before)
    assert shaped(ahead, torch.zeros(VOCAB))[[2, 4]].tolist() == [-2.0, -1.0]


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The tokens that the kernels may draw."""
    array = logits.numpy()
    masses, scratch = np.empty(len(array), np.float32), np.empty(len(array), np.int32)
    weigh(array, array.max(), np.float32(temperature), min_p, masses, masses.view(np.int32), scratch)
    extremes = array.max(), array.min()
    floor, last = nucleus(array, array.view(np.int32), masses, *extremes, top_k, top_p, scratch)
    ids = np.arange(len(array))
    return torch.from_numpy((masses > 0) & ((array > floor) | ((array == floor) & (ids <= last))))


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 25.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(1, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.05, 0.0), (0, 0.999, 0.0), (0, 1.0, 0.1), (30, 0.8, 0.02)],
)
def test_what_is_kept_is_what_transformers_keeps(scale, temperature, top_k, top_p, min_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    logits = logits_of(8, 1009, seed=1, scale=scale)
    expected = warpers(torch.zeros(8, 1, dtype=torch.int64), logits.clone()) > -torch.inf
    possible = torch.softmax(logits.double() / temperature, dim=-1) / 1 > 1e-38
    for row in range(8):
        found = kept(logits[row], temperature, top_k, top_p, min_p)
        assert torch.equal(found, expected[row] & possible[row]), row


@given(st.lists(st.sampled_from([-np.inf, -90.0, -2.5, -1.0, -0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=30), st.data())
@settings(max_examples=200, deadline=None)
def test_with_equals_exactly_the_first_ones_are_kept(values, data):
    """Many equal logits, as half-precision models have them: the order is by logit, then by id."""
    logits = torch.tensor(values, dtype=torch.float32)
    if torch.isinf(logits).all():
        logits[0] = 0.0
    top_k, top_p = data.draw(st.integers(0, 10)), data.draw(st.sampled_from([0.1, 0.5, 0.75, 1.0]))
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    masses = torch.exp(logits.double() - logits.max())
    order = [token for token in order if masses[token] > 2.0**-125][: top_k or None]
    total, reached, expected = sum(masses[token] for token in order), 0.0, []
    for token in order:
        if reached < top_p * total * (1 - 1e-7):
            expected.append(token)
        reached += masses[token]
    assert kept(logits, 1.0, top_k, top_p, 0.0).nonzero()[:, 0].tolist() == sorted(expected)


def test_masses_are_exponentials():
    logits = np.linspace(-300, 0, 100_001, dtype=np.float32)
    masses, scratch = np.empty_like(logits), np.empty(len(logits), np.int32)
    weigh(logits, np.float32(0), np.float32(1.5), 0.0, masses, masses.view(np.int32), scratch)
    exact = np.exp(logits.astype(np.float64) / np.float64(1.5))
    normal = exact > 2.0**-124
    assert np.all(np.abs(masses[normal] / exact[normal] - 1) < 1e-5)  # of which x / 1.5 rounds away up to 83 * 2**-24
    assert np.all(masses[exact < 2.0**-126] == 0) and masses[-1] == 1


# --- chance ----------------------------------------------------------------------------------------------------------


def test_random_numbers_are_even_and_depend_on_all_three():
    many = 100_000
    zeros, counter = np.zeros(many, np.int64), np.arange(many)
    for numbers in (
        uniforms(zeros.astype(np.uint64), zeros, counter),
        uniforms(zeros.astype(np.uint64), counter, zeros),
        uniforms(counter.astype(np.uint64), zeros, zeros),
    ):
        assert numbers.min() >= 0 and numbers.max() < 1
        assert len(np.unique(numbers)) == many
        counts = np.bincount((numbers * 100).astype(int), minlength=100)
        assert ((counts - many / 100) ** 2 / (many / 100)).sum() < 99 + 4 * np.sqrt(2 * 99)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / np.sqrt(many)
    assert uniforms(np.array([1], np.uint64), zeros[:1], zeros[:1]) != uniforms(
        np.array([0], np.uint64), zeros[:1] + 1, zeros[:1]
    )


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 25, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
def test_draws_follow_the_distribution(settings_):
    """Chi-square of 10,000 draws with fixed seeds, within four standard deviations of its mean."""
    draws, prompt, logits = 10_000, [3, 8, 30], logits_of(1, 43, scale=1.5)
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(settings_.get("repetition_penalty", 1.0))])
    warpers.append(TemperatureLogitsWarper(settings_["temperature"]))
    for name, warper in (("min_p", MinPLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)):
        if name in settings_:
            warpers.append(warper(settings_[name]))
    chances = torch.softmax(warpers(torch.tensor([prompt]), logits.clone())[0].double(), dim=-1).numpy()
    counts = np.zeros(43)
    for seed in range(20):
        rows = []
        for position in range(draws // 20):
            row = row_of(prompt, seed=seed, **settings_)
            row.position = position
            rows.append(row)
        counts += np.bincount(sample(logits.expand(len(rows), -1), rows), minlength=43)
    assert counts[chances == 0].sum() == 0
    often = chances * draws >= 5
    expected = np.append(chances[often], chances[~often].sum()) * draws
    found = np.append(counts[often], counts[~often].sum())
    expected, found = expected[expected > 0], found[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 3
    assert ((found - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def mixed_rows(count: int) -> list[SampleRow]:
    choices = [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_p": 0.95},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.0, "min_p": 0.02, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.5},
        {"logit_bias": {4: 5.0}, "temperature": 1.3},
        {"min_tokens": 50, "temperature": 0.9, "stop_token_ids": [1]},
    ]
    chance = random.Random(0)
    return [
        row_of(
            [chance.randrange(VOCAB) for _ in range(9)],
            [chance.randrange(VOCAB) for _ in range(i % 5)],
            seed=i,
            choice=i % 3,
            **choices[i % len(choices)],
        )
        for i in range(count)
    ]


def test_a_row_gets_the_same_token_in_any_batch():
    rows, logits = mixed_rows(64), logits_of(64, seed=5)
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)] == together
    chance = random.Random(1)
    for _ in range(20):
        order = chance.sample(range(64), chance.randint(1, 64))
        assert sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides_give_what_float32_gives(dtype):
    rows, logits = mixed_rows(16), logits_of(16, seed=5).to(dtype)
    expected = sample(logits.float(), rows)
    assert sample(logits, rows) == expected
    wide = torch.zeros(16, 2 * VOCAB, dtype=dtype)
    wide[:, ::2] = logits
    assert sample(wide[:, ::2], rows) == expected


def draws(count: int = 300, **options: Any) -> list[int]:
    """Draw one text of four tokens, whose probabilities stay the same at every position."""
    rows = []
    for position in range(count):
        rows.append(row_of(**({"temperature": 1.0} | options)))
        rows[-1].position = position
    return sample(torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1]])).expand(count, 4), rows)


def test_temperature_zero_takes_the_likeliest():
    assert set(draws(temperature=0)) == {1}


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    assert draws(seed=1) == draws(seed=1) != draws(seed=2)


@pytest.mark.parametrize(("top_p", "drawn"), [(0.4, {1}), (0.5, {1}), (0.6, {1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, drawn):
    assert set(draws(top_p=top_p)) == drawn


def test_a_low_temperature_sharpens():
    assert draws(temperature=0.3).count(1) > draws(temperature=1.0).count(1) > draws(temperature=10.0).count(1)


def test_seed_choice_and_position_each_make_another_stream():
    logits = torch.zeros(64, VOCAB)

    def text(**changes: Any) -> list[int]:
        rows = []
        for position in range(64):
            row = row_of(temperature=1.0, **({"seed": 1, "choice": 0} | changes))
            row.position = position
            rows.append(row)
        return sample(logits, rows)

    first = text()
    assert text() == first and len(set(first)) > 30
    assert text(seed=2) != first and text(choice=1) != first
    assert text(seed=2**64 - 1) == text(seed=-1)


def test_random_seeds_differ():
    assert len({random_seed() for _ in range(10)}) == 10


def test_sampling_changes_neither_logits_nor_rows():
    rows, logits = mixed_rows(16), logits_of(16)
    before = logits.clone()
    positions = [row.position for row in rows]
    first = sample(logits, rows)
    assert sample(logits, rows) == first
    assert torch.equal(logits, before) and [row.position for row in rows] == positions


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1000])
def test_greedy_takes_the_lowest_of_the_highest(vocab):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (50, vocab), generator=generator).float()
    expected = [row.tolist().index(row.max().item()) for row in logits]
    assert sample(logits, [row_of()] * 50) == expected
    assert sample(logits, [row_of(temperature=1.0, top_k=1)] * 50) == expected
    assert sample(logits, [row_of(logit_bias={0: 0.0})] * 50) == expected


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "nothing"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_name_their_requests(bad, temperature):
    logits = logits_of(3)
    if bad == "nothing":
        logits[1] = -torch.inf
    else:
        logits[1, 77] = bad
    params = SamplingParams(temperature=temperature)
    rows = [SampleRow(name, params, (), seed=0) for name in ("a", "b", "c")]
    with pytest.raises(InvalidLogits, match="request b$") as caught:
        Sampler().sample(logits, rows)
    assert caught.value.request_ids == ("b",)
    assert pickle.loads(pickle.dumps(caught.value)).request_ids == ("b",)


FLOATS = [0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, np.inf, -np.inf, np.nan]


@given(st.lists(st.sampled_from(FLOATS), min_size=1, max_size=12), st.integers(0, 300), st.booleans())
def test_the_highest_of_any_floats_is_found(values, before, negative_nan):
    row = np.full(before + len(values), -np.inf, np.float32)
    row[before:] = values
    if negative_nan:
        row.view(np.uint32)[np.isnan(row)] |= 1 << 31
    logits, rows = torch.from_numpy(row[None]), [row_of(temperature=0)]
    if np.isfinite(row.max()):  # NaN comes through
        assert sample(logits, rows) == [row.argmax()]
    else:
        with pytest.raises(InvalidLogits):
            sample(logits, rows)


def test_tokens_that_the_model_rules_out_are_never_drawn():
    logits = torch.full((200, VOCAB), -torch.inf)
    logits[:, [4, 90]] = torch.tensor([-1e30, -1e30])
    rows = [row_of(temperature=5.0, seed=i, top_p=p, top_k=k) for i in range(50) for p in (0.99, 1.0) for k in (0, 50)]
    assert set(sample(logits, rows)) == {4, 90}


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 3e38])
def test_logits_of_any_size(scale):
    logits = torch.linspace(-1, 1, VOCAB)[None] * scale
    for temperature in (1e-5, 1.0, 1e30):
        for extra in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
            (token,) = sample(logits, [row_of(temperature=temperature, seed=1, **extra)])
            assert 0 <= token < VOCAB
            if scale >= 1e6 and temperature <= 1:
                assert token == VOCAB - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_if_everything_is_banned_the_likeliest_raw_token_is_taken(temperature):
    logits = logits_of(2)
    rows = [row_of(min_tokens=5, temperature=temperature, stop_token_ids=range(VOCAB)), row_of(temperature=1.0)]
    assert sample(logits, rows)[0] == logits[0].argmax()


def test_top_p_that_keeps_all_but_nothing_is_one_token():
    logits = logits_of(32)
    rows = [row_of(temperature=1.0, top_p=1e-9, seed=i) for i in range(32)]
    assert sample(logits, rows) == logits.argmax(dim=-1).tolist()


def test_the_last_of_the_uniform_numbers_still_hits_a_token():
    logits = logits_of(1, 1003)
    array, tokens = logits.numpy(), np.empty(1, np.int64)
    for number in (0.0, 0.5, 1 - 2.0**-53):
        args = (np.ones(1, np.float32), np.array([5]), np.ones(1), np.zeros(1), np.array([number]), tokens)
        draw(array, array.view(np.int32), np.array([[array.max(), array.min()]]), *args)
        assert tokens[0] in logits[0].topk(5)[1]


def test_wrong_shapes_and_no_rows():
    with pytest.raises(InvalidOperation, match=r"logits: expected \[2, vocab\], got \[1, 101\]"):
        sample(logits_of(1), [row_of(), row_of()])
    assert sample(torch.empty(0, VOCAB), []) == []


# --- log probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution_and_only_for_rows_that_ask():
    logits = logits_of(3)
    rows = [row_of(logit_bias={9: 100.0}, logprobs=4), row_of(), row_of(logprobs=0, temperature=0.5)]
    result = Sampler().sample(logits, rows)
    exact = torch.log_softmax(logits.double(), dim=-1)
    first, none, last = result.logprobs
    assert none is None and result.token_ids[0] == 9
    assert list(first) == [9, *[t for t in exact[0].topk(4)[1].tolist() if t != 9]]
    for found, row in ((first, 0), (last, 2)):
        for token, entry in found.items():
            assert entry.logprob == pytest.approx(exact[row, token].item(), abs=1e-5)
            assert entry.rank == 1 + (exact[row] > exact[row, token]).sum()
    assert list(last) == [result.token_ids[2]]


def test_nobody_asks_nobody_pays():
    assert Sampler().sample(logits_of(2), [row_of(), row_of()]).logprobs is None


def test_of_equals_the_lowest_ids_are_the_likeliest():
    logits = torch.zeros(2, 600)
    logits[1, 300] = 1.0
    flat, peaked = token_logprobs(logits, [5, 300], [3, 3])
    assert list(flat) == [5, 0, 1, 2] and list(peaked) == [300, 0, 1]
    assert flat[5].logprob == pytest.approx(-np.log(600), abs=1e-5)


def test_more_logprobs_than_tokens():
    (found,) = token_logprobs(logits_of(1, 5), [2], [9])
    assert sorted(found) == [0, 1, 2, 3, 4]
