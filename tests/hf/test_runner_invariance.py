"""Hit or miss, alone or in company, at once or in chunks: the same bits."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from tests.hf.serving import WHOLE, Request, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from pagedkv.hf import ModelRunner, load_runner
from pagedkv.models import shipped_model_path

NEW = 12


@functools.cache
def prompts() -> list[list[int]]:
    """Four Python texts of 3 to 300 tokens with one beginning, and one of two tokens."""
    ids = AutoTokenizer.from_pretrained(shipped_model_path())(inspect.getsource(inspect)).input_ids
    ends = (500, 700), (800, 803), (900, 957), (0, 0)
    return [ids[:100] + ids[start:stop] for start, stop in ends] + [ids[7:9]]


@pytest.fixture(
    scope="module",
    params=[(mode, dtype) for mode in ("compiled", "ragged") for dtype in ("float32", "bfloat16")],
    ids="-".join,
)
def runner(request) -> ModelRunner:
    mode, dtype = request.param
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=getattr(torch, dtype))
    return load_runner(model, num_blocks=600, mode=mode)


@pytest.fixture(scope="module")
def alone(runner) -> list[Request]:
    """Each prompt on its own, nothing reused, at once."""
    return [serve(runner, [prompt], NEW, reuse=False)[0] for prompt in prompts()]


def assert_same_bits(got: list[Request], expected: list[Request]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.text == other.text
        assert len(one.logits) == NEW
        assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))


@pytest.mark.parametrize("threads", [1, 2])
def test_hits_have_the_bits_of_misses(runner, alone, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        runner.cache.clear_prefix_cache()
        misses = serve(runner, prompts(), NEW)
        hits = serve(runner, prompts(), NEW)
    finally:
        torch.set_num_threads(before)
    assert [request.num_cached for request in hits] == [len(prompt) - 1 for prompt in prompts()][:-1] + [0]
    assert_same_bits(misses, alone)
    assert_same_bits(hits, alone)


@pytest.mark.parametrize(("chunk", "drafts"), [(1, 0), (7, 0), (64, 2), (WHOLE, 5)])
def test_chunks_drafts_and_company_change_no_bit(runner, alone, chunk, drafts):
    assert_same_bits(serve(runner, prompts(), NEW, chunk=chunk, drafts=drafts, reuse=False), alone)


def test_without_invariance_tokens_are_the_same():
    model = AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32)
    fast, sure = (load_runner(model, num_blocks=600, mode="ragged", batch_invariant=on) for on in (False, True))
    got, expected = serve(fast, prompts(), NEW), serve(sure, prompts(), NEW)
    for one, other in zip(got, expected, strict=True):
        assert one.text == other.text
        torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=1e-4, atol=1e-4)
