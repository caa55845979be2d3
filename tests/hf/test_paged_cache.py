"""PagedCache as a transformers cache: rows are sequences, moving rows moves no K and V."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.hf.models import GREEDY, build, prompt
from transformers import DynamicCache, T5Config

import pagedkv.hf
from pagedkv.control.manager import BlockManager
from pagedkv.errors import InvalidOperation, OutOfMemory
from pagedkv.hf import PagedCache


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def cache(model):
    return PagedCache(model.config, num_blocks=64, block_size=4)


def fill(cache: PagedCache, rows: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Write random K and V into every layer and return those of the last one."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(cache)):
        keys, values = (torch.randn(rows, 2, tokens, 16, generator=generator) for _ in range(2))
        cache.update(keys, values, layer)
    return keys, values


def dense(cache: PagedCache) -> torch.Tensor:
    """Return the keys of the last layer, read from the blocks."""
    rows = [cache.manager.get_sequence(seq_id) for seq_id in cache.seq_ids]
    keys = cache.manager.storage.keys(len(cache) - 1)
    size = cache.manager.block_size
    return torch.stack(
        [torch.stack([keys[row.block_ids[i // size], i % size] for i in range(row.num_tokens)], dim=1) for row in rows]
    )


def test_the_door_is_small():
    assert sorted(pagedkv.hf.__all__) == pagedkv.hf.__all__
    assert {"PagedCache", "generate"} <= set(pagedkv.hf.__all__)


def test_the_manager_is_a_block_manager(cache):
    assert isinstance(cache.manager, BlockManager)
    assert (cache.manager.total_blocks, cache.manager.block_size) == (64, 4)


def test_update_returns_all_tokens_of_all_rows(cache):
    first = [fill(cache, 3, 6)[0]]
    assert cache.get_seq_length() == 6
    keys, _ = fill(cache, 3, 3, seed=1)
    assert torch.equal(dense(cache), torch.cat([first[0], keys], dim=2))
    assert cache.seq_ids == [int(seq_id) for seq_id in cache.manager.sequence_ids]


def test_layers_hold_different_lengths_while_a_forward_is_under_way(cache):
    fill(cache, 1, 6)
    cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [7, 6, 6]
    assert cache.get_mask_sizes(1, 2) == (7, 0)
    assert cache.get_query_offset(1) == 6


def test_the_first_update_sizes_a_layer(model):
    cache = PagedCache(model.config, num_blocks=8, block_size=4)
    keys = torch.randn(1, 1, 5, 24, dtype=torch.bfloat16)
    for layer in range(3):
        got, _ = cache.update(keys, torch.randn(1, 1, 5, 7, dtype=torch.bfloat16), layer)
        assert got.dtype == torch.bfloat16
    assert cache.manager.spec.dtype == "bfloat16"
    assert cache.manager.storage.values(1).shape == (8, 4, 1, 7)


def test_a_stored_dtype_of_ones_own_is_read_back_as_the_model_wants_it(model):
    cache = PagedCache(model.config, num_blocks=8, block_size=4, dtype="float16")
    keys = torch.randn(1, 2, 5, 16)
    got, _ = cache.update(keys, keys, 0)
    assert cache.manager.spec.dtype == "float16"
    assert torch.equal(got, keys.half().float())


def test_reordered_beams_are_forks(cache):
    fill(cache, 3, 10)
    before, used = dense(cache), cache.manager.used_block_count
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    assert torch.equal(dense(cache), before[[2, 0, 2]])
    assert cache.manager.stats.total_forks == 1
    assert cache.manager.stats.blocks_copied == 0
    assert cache.manager.used_block_count < used  # row 1 is gone
    keys, _ = fill(cache, 3, 1, seed=2)
    assert torch.equal(dense(cache), torch.cat([before[[2, 0, 2]], keys], dim=2))
    cache.manager.check()


def test_the_same_order_costs_nothing(cache):
    fill(cache, 3, 10)
    ids = cache.seq_ids
    cache.reorder_cache(torch.tensor([0, 1, 2]))
    assert cache.seq_ids == ids
    assert cache.manager.stats.total_forks == 0


def test_rows_are_repeated_and_selected(cache):
    fill(cache, 2, 10)
    before = dense(cache)
    cache.batch_repeat_interleave(3)
    assert torch.equal(dense(cache), before.repeat_interleave(3, 0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(dense(cache), before[[1, 0]])
    cache.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(dense(cache), before[:1])
    cache.manager.check()


@pytest.mark.parametrize("rows", [[0, 3], [-1], [[0]]])
def test_rows_that_are_not_there_are_refused(cache, rows):
    fill(cache, 3, 5)
    with pytest.raises(InvalidOperation, match="rows"):
        cache.reorder_cache(torch.tensor(rows))
    assert len(cache.seq_ids) == 3


@pytest.mark.parametrize(("argument", "left"), [(-3, 7), (0, 10), (4, 4), (99, 10), (-10, 0)])
def test_crop(cache, argument, left):
    fill(cache, 2, 10)
    before = dense(cache)
    cache.crop(argument)
    assert cache.get_seq_length() == left
    if left:
        assert torch.equal(dense(cache), before[:, :, :left])
    cache.manager.check()


def test_crop_by_more_than_there_is_changes_nothing(cache):
    fill(cache, 2, 10)
    with pytest.raises(InvalidOperation, match="tokens_to_remove: expected at most 10, got 11"):
        cache.crop(-11)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("end", ["release", "reset"])
def test_release_and_reset_free_all(cache, end):
    fill(cache, 2, 10)
    getattr(cache, end)()
    assert cache.get_seq_length() == 0
    assert cache.manager.used_block_count == cache.manager.num_sequences == 0
    getattr(cache, end)()
    fill(cache, 5, 3)
    assert cache.get_seq_length() == 3


def test_release_after_a_sequence_was_evicted(cache):
    fill(cache, 3, 10)
    cache.manager.evict()
    cache.release()
    assert cache.manager.num_sequences == 0
    cache.manager.check()


def test_sequences_of_the_callers_own_are_left_alone(cache):
    cache.manager.allocate(0, 5)
    fill(cache, 2, 10)
    assert 0 not in cache.seq_ids
    cache.release()
    assert cache.manager.sequence_ids == [0]


def test_another_batch_size_is_refused(cache):
    fill(cache, 2, 10)
    for rows in (3, 4):
        with pytest.raises(InvalidOperation, match=f"expected a batch of 2, as this cache holds, got {rows}"):
            fill(cache, rows, 1)
    assert cache.get_seq_length() == 10


def test_a_full_pool_changes_nothing(cache):
    fill(cache, 2, 100)
    before, used = dense(cache), cache.manager.used_block_count
    with pytest.raises(OutOfMemory, match="2 sequences of 150 tokens take 76 blocks of 4 tokens"):
        fill(cache, 2, 50)
    assert cache.get_seq_length() == 100
    assert cache.manager.used_block_count == used
    assert torch.equal(dense(cache), before)
    fill(cache, 2, 20)
    cache.manager.check()


def test_a_forward_that_broke_off_is_taken_back(model, cache):
    ids = prompt(1, 20)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", None)
            with pytest.raises(TypeError):
                model(ids[:, 10:], past_key_values=cache)
        cache.crop(0)
        assert cache.get_seq_length() == 10
        got = model(ids[:, 10:], past_key_values=cache).logits
        expected = model(ids).logits[:, 10:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_refused_not_lost(model, cache):
    with pytest.raises(InvalidOperation, match="no_grad"):
        model(prompt(1, 5), past_key_values=cache)
    assert cache.manager.num_sequences == 0


def test_a_loop_of_ones_own(model, cache):
    ids = prompt(2, 11)
    stock: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        for past_key_values in (stock, cache):
            step, chosen = ids, []
            for _ in range(8):
                step = model(step, past_key_values=past_key_values).logits[:, -1:].argmax(-1)
                chosen.append(step)
            past_key_values.tokens = torch.cat(chosen, 1)
    assert torch.equal(cache.tokens, stock.tokens)


def test_a_second_generate_goes_on_where_the_first_ended(model, cache):
    ids = prompt(1, 11)
    one = model.generate(ids, past_key_values=cache, **GREEDY)
    two = model.generate(one, past_key_values=cache, **GREEDY)
    assert torch.equal(two, model.generate(one, **GREEDY))


def test_a_deep_copy_is_refused_with_what_to_do_instead(cache):
    fill(cache, 1, 5)
    with pytest.raises(InvalidOperation, match=r"cannot be copied or pickled: fork\(\) its sequences"):
        copy.deepcopy(cache)


def test_bad_arguments_are_named(model):
    for options in ({"num_blocks": -1}, {"block_size": 0}, {"strategy": "best"}, {"dtype": "int4"}, {"cache_salt": 3}):
        with pytest.raises(InvalidOperation, match=next(iter(options))):
            PagedCache(model.config, **options)
    for wrong in (None, 3, {"num_hidden_layers": 2}, model):
        with pytest.raises(InvalidOperation, match=f"config: expected a model's config.*, got {type(wrong).__name__}"):
            PagedCache(wrong)
    with pytest.raises(InvalidOperation, match="decoder-only"):
        PagedCache(T5Config())
