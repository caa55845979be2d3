"""Calls of the compiled runner: which rows, which plans, which threads; blocks and models of odd sizes."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.hf.described import FAMILIES, right_logits, tiny
from tests.hf.models import VOCAB
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pagedkv import InvalidOperation, SequenceNotFound
from pagedkv.data import forward
from pagedkv.engine import SamplingParams
from pagedkv.engine.core import EngineCore
from pagedkv.engine.request import Request
from pagedkv.engine.sampler import Sampler
from pagedkv.hf import ModelRunner, load_runner
from pagedkv.hf.pool import ModelKvCache

TEXT = torch.arange(30) * 7 % VOCAB


def runner_of(model: Any, block_size: int = 4, **options: Any) -> ModelRunner:
    model = tiny(model) if isinstance(model, str) else model
    return load_runner(model, num_blocks=3000 // block_size, block_size=block_size, mode="compiled", **options)


def planned(runner: ModelRunner, text: torch.Tensor = TEXT, seq_id: int = 1) -> Any:
    runner.cache.allocate(seq_id, len(text))
    return runner.cache.plan([seq_id])


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def contents(runner: ModelRunner) -> list[bytes]:
    storage = runner.cache.storage
    return [side(layer).numpy().tobytes() for layer in range(2) for side in (storage.keys, storage.values)]


# --- rows whose logits are wanted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], [29], [3, 1, 2], [5, 5, 5, 2, 2], [4] * 1000, list(range(29, -1, -1)) * 20])
def test_rows_may_be_wanted_in_any_order_and_often(rows):
    runner = runner_of("llama")
    plan = planned(runner)
    every = runner.forward(plan, TEXT, np.arange(len(TEXT)))
    assert torch.equal(runner.forward(plan, TEXT, np.array(rows, np.int64)), every[rows])


def test_rows_of_a_text_longer_than_a_pass(monkeypatch):
    text = torch.arange(600) % VOCAB
    runner = runner_of("qwen3")
    plan = planned(runner, text)
    rows = [599, 0, 255, 256, 257, 0, 511, 512]
    expected = right_logits(tiny("qwen3"), text)[rows]
    assert distance(runner.forward(plan, text, rows), expected) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_of_rows_that_nobody_wants(name):
    """They write K and V, and those that are wanted are what they are in the company of all."""
    texts = [torch.arange(70) * 7 % VOCAB, torch.tensor([5]), torch.arange(33) * 5 % VOCAB]
    ends = [69, 70, 103]
    every = None
    for rows in (range(104), ends, [70], [69, 103], [5, 70, 71], []):
        runner = runner_of(name)
        for seq_id, text in enumerate(texts):
            runner.cache.allocate(seq_id, len(text))
        plan = runner.cache.plan([0, 1, 2])
        logits = runner.forward(plan, torch.cat(texts), list(rows))
        runner.cache.commit(plan)
        plan = runner.cache.append_batch([0, 1, 2], [3, 4, 5])
        next_ones = runner.forward(plan, [3, 4, 5], [0, 1, 2])
        every = (logits, next_ones) if every is None else every
        assert torch.equal(logits, every[0][list(rows)])
        assert torch.equal(next_ones, every[1])


@pytest.mark.parametrize("rows", [[], [29], [3, 5], [3, 1, 2], [5, 5]])
@pytest.mark.parametrize("mode", ["compiled", "ragged"])
def test_logits_in_place_are_the_same(rows, mode, monkeypatch):
    monkeypatch.setattr(forward, "KEPT_LOGITS", 2 * VOCAB)
    runner = load_runner(tiny("llama"), num_blocks=100, block_size=4, mode=mode)
    plan = planned(runner)
    expected = runner.forward(plan, TEXT, np.array(rows, np.int64))
    got = runner.forward_in_place(plan, TEXT, np.array(rows, np.int64))
    assert torch.equal(torch.as_tensor(got), expected)
    runner.forward(plan, TEXT, [0])
    assert torch.equal(torch.as_tensor(got), expected)  # what has a tensor of its own leaves them alone


@pytest.mark.parametrize(("given", "kind"), [(None, np.ndarray), (Sampler(), torch.Tensor)])
def test_a_sampler_of_ones_own_is_given_tensors(given, kind, monkeypatch):
    kinds, sample = set(), Sampler.sample

    def noted(self: Sampler, logits: Any, rows: Any) -> Any:
        kinds.add(isinstance(logits, kind))
        return sample(self, logits, rows)

    monkeypatch.setattr(Sampler, "sample", noted)
    core = EngineCore(runner_of("llama"), sampler=given)
    params = SamplingParams(temperature=0.0, max_tokens=5)
    core.add(Request(request_id="a", prompt_token_ids=TEXT.numpy(), params=params))
    while core.has_work:
        core.step()
    assert kinds == {True}


def test_an_empty_batch_has_no_logits():
    runner = runner_of("llama")
    runner.cache.allocate(1, 0)
    for seq_ids in ([], [1]):
        assert runner.forward(runner.cache.plan(seq_ids), [], []).shape == (0, VOCAB)


# --- plans ---------------------------------------------------------------------------------------------------------

TAMPERED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "negative positions": lambda plan: {"positions": plan.positions - 1},
    "huge positions": lambda plan: {"positions": plan.positions + 2**40},
    "positions behind the text": lambda plan: {"positions": plan.positions + 1},
    "fewer positions": lambda plan: {"positions": plan.positions[1:]},
    "positions of another dtype": lambda plan: {"positions": plan.positions.astype(np.float64)},
    "blocks outside": lambda plan: {"block_tables": plan.block_tables + 10**6},
    "slots outside": lambda plan: {"slot_mapping": plan.slot_mapping + 10**6},
    "lengths": lambda plan: {"seq_lens": plan.seq_lens * 0},
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_arrays_that_were_tampered_with_are_refused(change, name):
    runner = runner_of(name)
    plan = planned(runner)
    before = contents(runner)
    with pytest.raises(InvalidOperation):
        runner.forward(replace(plan, **change(plan)), TEXT, [0])
    assert contents(runner) == before
    runner.forward(plan, TEXT, [0])
    runner.cache.commit(plan)


def test_stale_plans_and_those_of_others_are_refused():
    runner, other = runner_of("llama"), runner_of("llama")
    plan, foreign = planned(runner), planned(other, seq_id=2)
    before = contents(runner)
    with pytest.raises(SequenceNotFound):
        runner.forward(foreign, TEXT, [0])
    runner.cache.truncate(1, 9)
    runner.cache.append(1, 21)
    with pytest.raises(InvalidOperation, match="stale"):
        runner.forward(plan, TEXT, [0])
    assert contents(runner) == before


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_text_longer_than_the_learned_positions_is_refused_before_anything_is_written(name):
    runner, text = runner_of(name), torch.arange(129) % VOCAB
    whole = planned(runner, text)
    before = contents(runner)
    with pytest.raises(InvalidOperation, match="positions: expected 0 … 127, as the model has, got 128"):
        runner.forward(whole, text, [0])
    assert contents(runner) == before
    runner.cache.free(1)
    expected = right_logits(tiny(name), text[:128])
    assert distance(runner.forward(planned(runner, text[:128]), text[:128], np.arange(128)), expected) < 1e-4


def test_rotary_positions_go_on_beyond_the_first_tables():
    runner, text = runner_of("llama"), torch.arange(2100) % VOCAB
    got = runner.forward(planned(runner, text), text, [2047, 2048, 2099])
    assert distance(got, right_logits(tiny("llama"), text)[[2047, 2048, 2099]]) < 1e-4


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_the_number_of_threads_may_change_between_steps(threads):
    runner = runner_of("gemma3")
    plan, seen = planned(runner), []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        seen.append(runner.forward(plan, TEXT, np.arange(len(TEXT))))
    assert all(torch.equal(each, seen[0]) for each in seen)


def test_two_runners_in_two_threads(threads):
    torch.set_num_threads(2)
    runners = [runner_of("llama"), runner_of("qwen3_moe")]
    plans = [planned(runner) for runner in runners]
    alone = [runner.forward(plan, TEXT, [29]) for runner, plan in zip(runners, plans, strict=True)]
    same: list[list[bool]] = [[], []]

    def run(i: int) -> None:
        for _ in range(50):
            same[i].append(torch.equal(runners[i].forward(plans[i], TEXT, [29]), alone[i]))

    both = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert same == [[True] * 50] * 2


def test_a_thread_that_comes_when_all_is_done_changes_nothing(monkeypatch):
    runner, calls = runner_of("qwen3_moe"), []

    def run_and_keep(kernel: Any, arguments: tuple[Any, ...], threads: int, joins: bool) -> None:
        kernel(*arguments)
        calls.append(dict(zip(inspect.signature(kernel).parameters, arguments, strict=True)))

    monkeypatch.setattr(forward, "run_in_threads", run_and_keep)
    logits = runner.forward(planned(runner, TEXT[:1]), TEXT[:1], np.zeros(1, np.int64))
    call, num_experts = calls[0], runner.model.config.num_experts
    call["routes"][: num_experts + 1] = np.arange(num_experts + 1)  # those of another layer, with more experts
    before = [each.copy() for each in (logits.numpy(), call["floats"], call["acts"])] + contents(runner)
    forward.run_program(*call.values())
    after = [logits.numpy(), call["floats"], call["acts"], *contents(runner)]
    assert all(np.array_equal(*each) for each in zip(before, after, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_goes_on(threads):
    torch.set_num_threads(2)
    runner = runner_of("llama")
    plan = planned(runner)
    expected = runner.forward(plan, TEXT, [29])
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(runner.forward(plan, TEXT, [29]), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(runner.forward(plan, TEXT, [29]), expected)


def test_an_interrupted_pass_leaves_nothing_behind(monkeypatch):
    runner = runner_of("llama")
    plan = planned(runner)
    expected = runner.forward(plan, TEXT, [29])
    run = forward.run_in_threads

    def interrupted(*call: Any, **options: Any) -> None:
        run(*call, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(forward, "run_in_threads", interrupted)
        runner.forward(plan, TEXT, [29])
    assert torch.equal(runner.forward(plan, TEXT, [29]), expected)
    runner.cache.commit(plan)
    runner.cache.check()


# --- blocks and models of odd sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_blocks_of_other_sizes_and_dtypes(block_size, kv_dtype):
    runner = runner_of("mistral", block_size, kv_dtype=kv_dtype)
    first, tolerance = planned(runner, TEXT[:11]), 1e-4 if kv_dtype == "float32" else 2e-2
    runner.forward(first, TEXT[:11], [])
    runner.cache.commit(first)
    rest = runner.cache.append_batch([1], counts=19)
    assert (
        distance(runner.forward(rest, TEXT[11:], np.arange(19)), right_logits(tiny("mistral"), TEXT)[11:]) < tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_other_layout_of_blocks(dtype):
    model = tiny("qwen3", dtype)
    runner = ModelRunner(model, ModelKvCache(40, 4, num_layers=0, layout="HND"), "compiled")
    twin = ModelRunner(model, ModelKvCache(40, 4, num_layers=0), "compiled")
    assert torch.equal(*(each.forward(planned(each), TEXT, np.arange(30)) for each in (runner, twin)))


def odd(
    vocab_size: int = 97, hidden: int = 64, heads: int = 4, kv_heads: int = 2, dim: int = 16, inner: int = 96
) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        intermediate_size=inner,
        num_hidden_layers=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


SIZES: list[dict[str, int]] = [
    {"vocab_size": 33, "hidden": 24, "heads": 3, "kv_heads": 1, "dim": 8, "inner": 36},
    {"vocab_size": 101, "hidden": 40, "dim": 20, "inner": 50},
    {"vocab_size": 98, "hidden": 72, "dim": 80},
    {"vocab_size": 35, "heads": 2, "kv_heads": 1, "dim": 256},
    {"heads": 6, "kv_heads": 2, "dim": 10, "hidden": 30, "inner": 18},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_of_odd_sizes(sizes, dtype):
    model = odd(**sizes).to(dtype)
    runner = ModelRunner(model, ModelKvCache(40, 4, num_layers=0), "compiled")
    text = TEXT % runner.vocab_size
    expected = right_logits(model.float(), text)
    model.to(dtype)
    got = runner.forward(planned(runner, text), text, np.arange(30))
    assert distance(got, expected) < (1e-4 if dtype == torch.float32 else 3e-2)
    assert torch.equal(runner.forward(runner.cache.plan([1]), text, [29]), got[29:])


def test_a_hidden_size_of_no_whole_vector_with_learned_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=51, n_embd=36, n_head=3, n_layer=2, n_positions=40)).eval()
    runner = runner_of(model)
    assert (
        distance(runner.forward(planned(runner, TEXT % 51), TEXT % 51, np.arange(30)), right_logits(model, TEXT % 51))
        < 1e-4
    )
