"""The runner, in every mode: whatever is in a batch and however it is cut, each text goes on as it would alone."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from tests.hf.models import CONFIGS, FURTHER, VOCAB, build, prompt
from tests.hf.serving import WHOLE, Request, generated, serve, step

from pagedkv.hf import ModelRunner, load_runner
from pagedkv.hf.runner import OneDnnLinears

GATHERED = {"deepseek_v3", "falcon", "bloom", "llama4", "lfm2"}
COMPILED = {"llama", "qwen3", "gpt2", "mistral", "gemma2", "gemma3", "gpt_oss"}
BEST = {
    name: "gather" if name in GATHERED else "compiled" if name in COMPILED else "ragged"
    for name in [*CONFIGS, *FURTHER]
}
WAYS = [*BEST.items(), *((name, "ragged") for name in sorted(COMPILED))]
"""Families and modes."""
BLOCK, NEW = 5, 10


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "transformers")


@functools.cache
def texts() -> list[list[int]]:
    """Eight prompts of 1 to 90 tokens; most begin alike, two are equal."""
    shared = prompt(1, 23, seed=5)[0].tolist()
    ends = [prompt(1, n, seed=n)[0].tolist() for n in (3, 12, 40, 67)]
    return [*(shared + end for end in ends), ends[2], ends[0][:1], shared + ends[1], shared]


@functools.cache
def expected(name: str) -> list[list[int]]:
    return [generated(build(name), text, NEW) for text in texts()]


def runner_of(name: str, mode: str, **options: Any) -> ModelRunner:
    return load_runner(build(name), mode=mode, **{"num_blocks": 400, "block_size": BLOCK, **options})


def tokens(requests: list[Request]) -> list[list[int]]:
    return [request.text for request in requests]


def assert_all_free(runner: ModelRunner) -> None:
    runner.cache.check()
    assert runner.cache.used_block_count == 0


@pytest.mark.parametrize("name", BEST)
def test_a_family_is_run_in_its_best_mode(name):
    assert runner_of(name, "auto").mode == BEST[name]


@pytest.mark.parametrize("chunk", [1, 7, 64, WHOLE])
@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_every_family_gives_the_tokens_of_generate(name, mode, chunk):
    runner = runner_of(name, mode, num_states=200)
    for reuse in (False, True, True):
        served = serve(runner, texts(), NEW, chunk=chunk, reuse=reuse)
        assert tokens(served) == expected(name)
    longest = max(served, key=lambda request: request.num_cached)
    most = len(longest.text) - NEW - 1
    if runner.has_states:  # a prefix is reused up to a block boundary at which a chunk ended
        most = most // BLOCK * BLOCK if chunk == 1 else most // (7 * BLOCK) * 7 * BLOCK if chunk == 7 else 0
    assert longest.num_cached == most
    assert_all_free(runner)


@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_what_speculation_takes_back_leaves_no_trace(name, mode):
    runner = runner_of(name, mode)
    assert tokens(serve(runner, texts(), NEW, chunk=30, drafts=3)) == expected(name)
    assert_all_free(runner)


@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_forks_go_on_apart(name, mode):
    model, runner, start = build(name), runner_of(name, mode), texts()[1]
    step(runner, {0: start[:-1]})
    runner.fork(0, 1)
    runner.cache.fork(0, 1)
    others = [start[-1], (start[-1] + 1) % VOCAB]
    ends: dict[int, list[int]] = {0: others[:1], 1: others[1:]}
    for _ in range(NEW):
        rows = step(runner, {seq_id: end[-1:] for seq_id, end in ends.items()})
        for seq_id, row in rows.items():
            ends[seq_id].append(int(row.argmax()))
    for end in ends.values():
        assert start[:-1] + end == generated(model, start[:-1] + end[:1], NEW)


# ---------------------------------------------------------------- products by oneDNN


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(192, 80)


class OnCpu(torch.nn.Sequential):
    device = torch.device("cpu")


def test_within_rounding_of_torch(layer):
    x = torch.randn(1, 24, 192)
    expected = layer(x)
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_row_has_the_same_bits_in_every_batch(layer):
    x = torch.randn(64, 192)
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        whole = layer(x)
        for first, last in ((0, 4), (4, 12), (24, 60), (60, 64)):
            assert torch.equal(layer(x[first:last]), whole[first:last])


def test_the_layers_are_torchs_again_afterwards():
    model = build("llama")
    with pytest.raises(KeyError), OneDnnLinears(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_somebody_replaced_is_left_alone(layer):
    layer.forward = lambda x: x + 1
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        assert torch.equal(layer(torch.zeros(2)), torch.ones(2))
    assert "forward" in vars(layer)


def test_other_types_go_to_torch(layer):
    layer = layer.bfloat16()
    x = torch.randn(8, 192).bfloat16()
    expected = layer(x)
    with torch.no_grad(), OneDnnLinears(OnCpu(layer)):
        assert torch.equal(layer(x), expected)
