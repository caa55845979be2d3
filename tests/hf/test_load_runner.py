"""What a runner is made of, and what it refuses."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from tests.hf.models import VOCAB, build, prompt
from tests.hf.serving import step

from pagedkv import BlockManager, InvalidOperation
from pagedkv.hf import load_runner
from pagedkv.models import shipped_model_path

NONE = np.array([], np.int64)


@pytest.fixture
def runner():
    return load_runner(build("llama"), num_blocks=32, block_size=4)


def test_a_folder_is_loaded_in_its_own_dtype():
    runner = load_runner(shipped_model_path(), num_blocks=4)
    assert (runner.mode, runner.vocab_size, runner.max_positions) == ("compiled", 4096, 4096)
    assert runner.cache.spec.dtype == "bfloat16"
    assert runner.bytes_per_block == 16 * 4 * 2 * 4 * 32 * 2
    assert not runner.model.training


def test_the_pool_may_be_sized_by_the_bytes_of_a_block():
    runner = load_runner(build("mistral"), num_blocks=lambda size: 100_000 // size, block_size=4)
    assert runner.cache.total_blocks == 100_000 // runner.bytes_per_block > 0


def test_kv_dtype_is_what_is_stored():
    runner = load_runner(build("llama"), num_blocks=32, block_size=4, kv_dtype="bfloat16")
    assert runner.cache.spec.dtype == "bfloat16"
    got = step(runner, {0: prompt(1, 20)[0].tolist()})[0]
    torch.testing.assert_close(got, build("llama")(prompt(1, 20)).logits[0, -1].detach(), rtol=0.1, atol=0.1)


def test_gather_mode_is_told_and_ragged_mode_refused(caplog):
    with caplog.at_level(logging.WARNING, "pagedkv"):
        assert load_runner(build("bloom"), num_blocks=8).mode == "gather"
    assert "BloomForCausalLM runs in gather mode" in caplog.text
    with pytest.raises(InvalidOperation, match="'ragged' is not for BloomForCausalLM"):
        load_runner(build("bloom"), num_blocks=8, mode="ragged")


def test_a_model_that_mixes_the_tokens_of_a_row_is_found_out():
    """A model of one's own that looks at the token before, whoever's it is."""
    model = copy.deepcopy(build("llama"))
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + out.roll(1, dims=1))
    with pytest.raises(InvalidOperation, match="logits are off"):
        load_runner(model, num_blocks=8, mode="ragged")


def test_frequencies_that_change_with_the_length_are_not_mixed():
    model = copy.deepcopy(build("llama"))
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    runner = load_runner(model, num_blocks=8)
    assert runner.mode == "gather" and not runner.reuses_prefixes and not runner.cache.prefix_caching


@pytest.mark.parametrize("seq_id", [0, 2**64 - 1])
def test_states_outside_of_blocks_cannot_be_taken_back_far(seq_id):
    runner = load_runner(build("lfm2"), num_blocks=32, block_size=4)
    step(runner, {seq_id: prompt(1, 9)[0].tolist()})
    step(runner, {seq_id: [5]})
    runner.cache.truncate(seq_id, 4)
    with pytest.raises(InvalidOperation, match=f"S{seq_id} to go on after token 10, got 4: .* compute it anew"):
        step(runner, {seq_id: [5]})
    runner.cache.free(seq_id)
    runner.release(seq_id)
    runner.cache.allocate(seq_id, prompt(1, 9)[0].tolist())
    with pytest.raises(InvalidOperation, match="after token 0, got 9"):  # it was released
        step(runner, {seq_id: [5]})


def test_the_own_attention_of_the_model_is_as_before(runner):
    before = runner.model.config._attn_implementation
    step(runner, {0: [1, 2, 3]})
    assert runner.model.config._attn_implementation == before
    with pytest.raises(InvalidOperation):
        runner.forward(runner.cache.append_batch([0], [[4]]), [VOCAB], NONE)
    assert runner.model.config._attn_implementation == before


def test_no_logits_and_no_tokens_are_fine(runner):
    runner.cache.allocate(0, 0)
    assert runner.forward(runner.cache.plan([]), NONE, NONE).shape == (0, VOCAB)
    plan = runner.cache.append_batch([0], [[1, 2, 3]])
    assert runner.forward(plan, [1, 2, 3], NONE).shape == (0, VOCAB)
    rows = runner.forward(plan, [1, 2, 3], [2, 0, 2])
    assert rows.shape == (3, VOCAB)
    assert torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("ids", "wanted", "words"),
    [
        ([1, 2], [0], "token_ids: expected 3"),
        ([1, 2, VOCAB], [0], "token_ids: expected numbers in 0 … 96, got 97"),
        ([1, 2, -1], [0], "got -1"),
        ([[1, 2, 3]], [0], "flat"),
        ([1.0, 2.0, 3.0], [0], "token_ids"),
        ([1, 2, 3], [3], "wanted"),
        ([1, 2, 3], 0, "wanted"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(runner, ids, wanted, words):
    runner.cache.allocate(0, 0)
    plan = runner.cache.append_batch([0], [[1, 2, 3]])
    with pytest.raises(InvalidOperation, match=words):
        runner.forward(plan, ids, wanted)


def test_what_is_no_plan_no_model_and_no_mode_is_refused(runner):
    with pytest.raises(InvalidOperation, match="plan"):
        runner.forward(BlockManager(4), [1], [0])
    with pytest.raises(InvalidOperation, match="model"):
        load_runner(torch.nn.Linear(2, 2), num_blocks=8)
    with pytest.raises(InvalidOperation, match="mode"):
        load_runner(build("llama"), num_blocks=8, mode="fast")
