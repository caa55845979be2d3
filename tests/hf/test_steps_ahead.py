"""Decode steps that one compiled call computes ahead: the same bits as step by step, and nothing out of date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.hf.described import FAMILIES, tiny
from tests.hf.models import VOCAB
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pagedkv import SequenceNotFound
from pagedkv.data import forward
from pagedkv.engine import LLM, SamplingParams
from pagedkv.engine import llm as llms
from pagedkv.engine.core import EngineCore
from pagedkv.engine.request import Request
from pagedkv.hf import ModelRunner, load_runner
from pagedkv.hf import runner as runners

TEXTS = [torch.arange(57) * 7 % VOCAB, torch.arange(40) * 5 % VOCAB]
PLENTY = 100


@pytest.fixture(autouse=True)
def passes(monkeypatch) -> list[int]:
    """The counts of passes that calls were made for, as many as there is room for, however long they take."""
    counts, compute = [], forward.Forward.passes

    def noted(self: Any, *arguments: Any) -> Any:
        counts.append(arguments[4])
        return compute(self, *arguments)

    monkeypatch.setattr(forward.Forward, "passes", noted)
    monkeypatch.setattr(runners, "LONGEST_CALL", 1e9)
    return counts


def runner_of(model: Any, block_size: int = 16, **options: Any) -> ModelRunner:
    model = tiny(model) if isinstance(model, str) else model
    return load_runner(model, num_blocks=64 + 1200 // block_size, block_size=block_size, mode="compiled", **options)


def read(runner: ModelRunner, texts: list[torch.Tensor]) -> np.ndarray:
    """Compute texts as the sequences 0, 1, …; return what follows them."""
    for seq_id, text in enumerate(texts):
        runner.cache.allocate(seq_id, text.tolist())
    plan = runner.cache.plan(list(range(len(texts))))
    ends = plan.cu_seqlens_q[1:] - 1
    logits = runner.forward(plan, torch.cat(texts), ends)
    runner.cache.commit(plan)
    return logits.argmax(-1).numpy()


def step(runner: ModelRunner, tokens: Any, ahead: int = PLENTY, seq_ids: tuple[int, ...] | None = None) -> np.ndarray:
    """Append a token to each sequence and return the logits behind it."""
    ids = np.array(tokens, np.int64)
    plan = runner.cache.append_batch(list(range(len(ids)) if seq_ids is None else seq_ids), ids)
    logits = np.array(runner.forward_in_place(plan, ids, np.arange(len(ids)), ahead))
    runner.cache.commit(plan)
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_have_the_same_bits(name, passes):
    ahead, plain = runner_of(name), runner_of(name)
    tokens = read(ahead, TEXTS)
    assert np.array_equal(read(plain, TEXTS), tokens)
    for _ in range(60):
        logits = step(ahead, tokens)
        assert np.array_equal(logits, step(plain, tokens, 0))
        tokens = logits.argmax(-1)
    assert 0 < len(passes) < 40


@pytest.mark.parametrize("block_size", [1, 4, 16, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_other_sizes(block_size, dtype, passes):
    model = tiny("mistral").to(dtype)
    ahead, plain = (runner_of(model, block_size) for _ in range(2))
    tokens = read(ahead, TEXTS[:1])
    read(plain, TEXTS[:1])
    for _ in range(70):
        logits = step(ahead, tokens)
        assert np.array_equal(logits, step(plain, tokens, 0))
        tokens = logits.argmax(-1)
    tiny("mistral").float()
    assert (not passes) == (block_size == 1)


def another_token(runner: ModelRunner, tokens: np.ndarray) -> np.ndarray:
    return (tokens + 1) % VOCAB


def keys_written(runner: ModelRunner, tokens: np.ndarray) -> np.ndarray:
    slots = 16 * runner.cache.plan([0]).block_tables[0, 0] + np.arange(3)
    runner.cache.storage.write_keys(1, torch.ones(3, *runner.cache.storage.keys(1).shape[2:]), slots)
    return tokens


def weights_changed(runner: ModelRunner, tokens: np.ndarray) -> np.ndarray:
    runner.model.lm_head.weight = torch.nn.Parameter(runner.model.lm_head.weight * 2)
    runner.cache.clear_prefix_cache()
    return tokens


def weights_quantised(runner: ModelRunner, tokens: np.ndarray) -> np.ndarray:
    runner.quantise_weights()
    return tokens


def truncated_and_appended(runner: ModelRunner, tokens: np.ndarray) -> np.ndarray:
    length = runner.cache.get_sequence(0).num_tokens
    runner.cache.truncate(0, length - 1)
    step(runner, [3, 3], 0, (0, 1))
    return tokens


def another_sequence(runner: ModelRunner, tokens: np.ndarray) -> np.ndarray:
    runner.cache.allocate(7, TEXTS[0].tolist()[::-1])
    plan = runner.cache.plan([7])
    runner.forward(plan, TEXTS[0].flip(0), [0])
    runner.cache.commit(plan)
    return tokens


@pytest.mark.parametrize(
    "change",
    [another_token, keys_written, weights_changed, weights_quantised, truncated_and_appended, another_sequence],
)
@pytest.mark.parametrize("after", [1, 2])
def test_what_is_out_of_date_is_computed_again(change: Callable[..., np.ndarray], after, passes):
    model = tiny("llama")
    untied = type(model)(model.config)
    untied.load_state_dict(model.state_dict())
    runner = runner_of(untied)
    tokens = read(runner, TEXTS)
    step(runner, tokens)
    tokens = step(runner, tokens).argmax(-1)
    for _ in range(after):
        tokens = step(runner, tokens).argmax(-1)
    tokens = change(runner, tokens)
    plan = runner.cache.append_batch([0, 1], tokens)
    got = np.array(runner.forward_in_place(plan, tokens, np.arange(2), PLENTY))
    assert np.array_equal(got, runner.forward(plan, tokens, np.arange(2)).numpy())
    assert len(passes) >= 2


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("rows", [[0, 1], [1, 0], [1], [], [1, 1]])
def test_rows_are_those_that_are_wanted(order, rows):
    runner = runner_of("llama")
    tokens = read(runner, TEXTS)
    for _ in range(2):
        tokens = step(runner, tokens).argmax(-1)
    plan = runner.cache.append_batch(order, tokens[order])
    got = np.array(runner.forward_in_place(plan, tokens[order], np.array(rows, np.int64), PLENTY))
    assert np.array_equal(got, runner.forward(plan, tokens[order], rows).numpy())


def test_a_sequence_that_gets_two_tokens_while_another_gets_none():
    runner = runner_of("llama")
    tokens = read(runner, TEXTS)
    for _ in range(2):
        tokens = step(runner, tokens).argmax(-1)
    plan = runner.cache.append_batch([0, 1], [[1, 2], []])
    got = np.array(runner.forward_in_place(plan, [1, 2], [0, 1], PLENTY))
    assert np.array_equal(got, runner.forward(plan, [1, 2], [0, 1]).numpy())


def test_a_stale_plan_is_refused_though_its_step_is_known():
    runner = runner_of("llama")
    tokens = read(runner, TEXTS)
    for _ in range(2):
        tokens = step(runner, tokens).argmax(-1)
    plan = runner.cache.append_batch([0, 1], tokens)
    runner.cache.free(1)
    with pytest.raises(SequenceNotFound):
        runner.forward_in_place(plan, tokens, np.arange(2), PLENTY)


def test_forks_that_share_a_block_see_nothing_of_it():
    runner, plain = runner_of("llama"), runner_of("llama")
    tokens = read(runner, TEXTS[:1])
    read(plain, TEXTS[:1])
    for each in (runner, plain):
        each.fork(0, 1)
        each.cache.fork(0, 1)
    ahead = step(runner, tokens)
    assert np.array_equal(ahead, step(plain, tokens, 0))
    for _ in range(6):
        assert np.array_equal(step(runner, [9], PLENTY, (1,)), step(plain, [9], 0, (1,)))
        tokens = ahead.argmax(-1)
        ahead = step(runner, tokens)
        assert np.array_equal(ahead, step(plain, tokens, 0))


def test_nothing_is_computed_after_an_end(monkeypatch):
    plain, ahead = runner_of("llama"), runner_of("llama")
    tokens = read(plain, TEXTS[:1]).tolist()
    for _ in range(7):
        tokens.append(int(step(plain, tokens[-1:], 0).argmax()))
    step(ahead, read(ahead, TEXTS[:1]))
    plan = ahead.cache.append_batch([0], tokens[1:2])
    monkeypatch.setattr(runners.time, "perf_counter", iter([10.0, 11.0]).__next__)
    ahead.forward_in_place(plan, np.array(tokens[1:2]), np.arange(1), PLENTY, np.array([VOCAB - 1, tokens[4]]))
    known = ahead._compiled._ahead.tokens[:, 0].tolist()
    end = tokens.index(tokens[4], 2) - 1
    assert known == tokens[1 : 1 + end] + [-1] * (len(known) - end)
    assert end < len(known)
    assert ahead._compiled._pass_seconds == 1 / end


# --- through the engine --------------------------------------------------------------------------------------------


def written(model: Any, params: list[SamplingParams], drops: set[int]) -> tuple[list[Any], int]:
    """Return what requests that come one after the other get, some of which are dropped, and the number of steps."""
    core = EngineCore(runner_of(model), eos_token_ids=[5], max_batch_tokens=64)
    outputs: dict[str, Any] = {}
    prompts = [text.tolist() for text in TEXTS]
    for number, each in enumerate(params):
        core.add(Request(request_id=str(number), prompt_token_ids=prompts[number % 2], params=each))
        for _ in range(7):
            outputs |= {output.request_id: output for output in core.step()}
        if number in drops:
            core.abort(str(number - 1))
    while core.has_work:
        outputs |= {output.request_id: output for output in core.step()}
    return [[each.token_ids for each in outputs[key].outputs] for key in sorted(outputs)], core.stats().steps


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_texts_are_the_same(name, passes, monkeypatch):
    params = [
        SamplingParams(temperature=0.0, max_tokens=30),
        SamplingParams(temperature=0.0, max_tokens=40, n=2),
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=30, prompt_lookup=3),
        SamplingParams(temperature=0.0, max_tokens=25, logprobs=1),
        SamplingParams(temperature=0.9, max_tokens=9, seed=1),
        SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=[9]),
    ]
    got = written(name, params, {3})
    assert passes
    monkeypatch.setattr(runners, "MOST_PASSES", 1)
    assert written(name, params, {3}) == got


def test_a_request_that_waits_is_not_kept_waiting(passes):
    llm = LLM(runner_of("llama"), max_num_seqs=1)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    llm.generate([text.tolist() for text in TEXTS], params)
    assert len(passes) <= 4  # those of the second request: while it waited the first one had its steps alone


def test_calls_are_long_only_where_nobody_waits_for_a_token(passes, monkeypatch):
    monkeypatch.setattr(runners, "LONGEST_CALL", 0.0)
    monkeypatch.setattr(llms, "LONGEST_CALL", 1e9)
    llm = LLM(runner_of("llama"))
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompt, streamed = TEXTS[0].tolist(), []
    llm.core.add(llm.request(prompt, params))
    while llm.core.has_work:
        streamed += llm.core.step()
    assert not passes
    (output,) = llm.generate([prompt], params)
    assert passes == [8, 16, 16]  # of the prompt all but the last token were found
    assert output.outputs[0].token_ids == streamed[-1].outputs[0].token_ids


@pytest.mark.parametrize("stops", [{"stop": ["no text"]}, {"stop_token_ids": [VOCAB - 1]}])
def test_few_steps_are_computed_where_a_stop_may_make_them_vain(stops, passes, monkeypatch):
    monkeypatch.setattr(llms, "LONGEST_CALL", 1e9)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, "0"))
    llm = LLM(runner_of("llama"), PreTrainedTokenizerFast(tokenizer_object=words))
    llm.generate([TEXTS[0].tolist()], SamplingParams(temperature=0.0, max_tokens=40, **stops))
    assert passes
    assert max(passes) == 4
