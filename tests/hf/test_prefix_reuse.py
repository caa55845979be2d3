"""What one generate() leaves in the cache serves the next, and nobody whom it should not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.hf.models import CONFIGS, GREEDY, VOCAB, build, left_padded, prompt
from transformers import LlamaConfig, LlamaForCausalLM

from pagedkv.errors import InvalidOperation, OutOfMemory
from pagedkv.hf import PagedCache, generate


def stock(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=kwargs.pop("attention_mask", torch.ones_like(ids)), **GREEDY, **kwargs)


def paged(model: Any, ids: torch.Tensor, cache: PagedCache, **kwargs: Any) -> torch.Tensor:
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    return generate(model, ids, cache, attention_mask=mask, **GREEDY, **kwargs)


@pytest.fixture(params=[None, "pagedkv"], ids=["gather", "direct"])
def model(request):
    return build("llama", attention=request.param)


@pytest.fixture
def cache(model):
    return PagedCache(model.config, num_blocks=256, block_size=4)


def computed_tokens(model: Any, call: Any) -> int:
    """Count the prompt tokens that the first forward pass of a call is given."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


def test_a_second_turn_reuses_prompt_and_reply(model, cache):
    first = paged(model, prompt(1, 30), cache)
    turn = torch.cat([first, prompt(1, 9, seed=5)], dim=1)
    fresh = build("llama")
    # 30 + 24 tokens, of which the last was never computed: 53, in whole blocks of 4.
    assert computed_tokens(model, lambda: paged(model, turn, cache)) == turn.shape[1] - 52
    assert torch.equal(paged(model, turn, cache), stock(fresh, turn))
    cache.manager.check()
    assert cache.manager.used_block_count == 0


def test_num_cached_tokens_tells_what_was_reused(model, cache):
    ids = prompt(1, 30)
    paged(model, ids, cache, release=False)
    assert cache.num_cached_tokens == 0
    paged(model, ids, cache, release=False)
    assert cache.num_cached_tokens == 29  # the last token is always computed
    cache.reset()
    assert cache.num_cached_tokens == 0


def test_num_cached_tokens_is_known_after_generate_has_released_the_cache(model, cache):
    ids = prompt(1, 30)
    for expected in (0, 29):
        generate(model, ids, cache, max_new_tokens=4, do_sample=False)
        assert cache.seq_ids == [] and cache.num_cached_tokens == expected
    embeddings = model.get_input_embeddings()(ids).detach()
    generate(model, ids, cache, inputs_embeds=embeddings, max_new_tokens=4, do_sample=False)
    assert cache.num_cached_tokens == 0


def test_num_cached_tokens_is_0_after_a_generate_that_was_told_no_ids(model, cache):
    ids = prompt(1, 30)
    for _ in range(2):
        paged(model, ids, cache)
    assert cache.num_cached_tokens == 29
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    assert cache.num_cached_tokens == 0 and cache.report().cached_tokens == 0
    assert cache.report().prompt_tokens == 30


def test_the_report_tells_the_truth_after_generate(model, cache):
    assert cache.report().rows == 0 and str(cache.report()) == "nothing was written yet"
    ids, block = prompt(1, 30), cache.manager
    for cached in (0, 29):
        paged(model, ids, cache)
        report = cache.report()
        assert (report.rows, report.prompt_tokens, report.cached_tokens) == (1, 30, cached)
        assert (
            report.tokens == 30 + 23 and report.blocks_used == 14 and report.blocks_shared == 0
        )  # the last has no K, V
        assert report.paged_bytes == 14 * block.block_memory_bytes
        assert report.contiguous_bytes == 53 * block.block_memory_bytes // 4
        longest = model.config.max_position_embeddings
        assert report.preallocated_bytes == longest * block.block_memory_bytes // 4
    assert "prompts: 30 tokens, 29 of them found and not computed" in str(report)
    batch = torch.cat([ids, ids])
    paged(model, batch, cache, release=False)
    now = cache.report()  # of sequences that are held
    assert now.rows == 2 and now.cached_tokens == 2 * 29 and now.blocks_shared >= 7
    held = [set(block.get_sequence(seq_id).block_ids) for seq_id in cache.seq_ids]
    assert now.blocks_shared == len(held[0] & held[1]) and now.blocks_used == len(held[0] | held[1])
    cache.release()
    assert cache.report() == now


def test_beams_of_a_prompt_are_one_prompt_in_the_report(model, cache):
    ids = prompt(1, 30)
    generate(model, ids, cache, max_new_tokens=6, do_sample=False, num_beams=3, attention_mask=torch.ones_like(ids))
    report = cache.report()
    assert report.rows == 3 and report.prompt_tokens == 30 and report.blocks_shared >= 7


def test_a_second_conversation_reuses_the_system_prompt(model, cache):
    system = prompt(1, 22)
    one, two = (torch.cat([system, prompt(1, 8, seed=s)], dim=1) for s in (11, 12))
    paged(model, one, cache)
    assert torch.equal(paged(model, two, cache, release=False), stock(build("llama"), two))
    assert cache.num_cached_tokens >= 20


def test_a_batch_reuses_what_all_rows_have(model, cache):
    shared, other = prompt(1, 30), prompt(1, 30, seed=3)
    other[:, :10] = shared[:, :10]
    paged(model, shared, cache)
    batch = torch.cat([shared, other])
    assert torch.equal(paged(model, batch, cache, release=False), stock(build("llama"), batch))
    assert 8 <= cache.num_cached_tokens <= 10
    cache.manager.check()


def test_equal_rows_of_one_batch_end_in_the_same_blocks(model, cache):
    batch = prompt(1, 33).repeat(3, 1)
    paged(model, batch, cache, release=False)
    tables = [cache.manager.get_sequence(seq_id).block_ids[:8] for seq_id in cache.seq_ids]
    assert tables[0] == tables[1] == tables[2]


def test_salts_isolate():
    model = build("llama")
    caches = [PagedCache(model.config, 256, 4, cache_salt=salt) for salt in ("a", "b")]
    ids = prompt(1, 30)
    for cache in caches:
        paged(model, ids, cache)
    one = caches[0].manager
    assert one.match_prefix(ids[0].tolist(), "a") == 29
    assert one.match_prefix(ids[0].tolist(), "b") == 0
    assert one.match_prefix(ids[0].tolist()) == 0


def test_padded_rows_are_never_found(model, cache):
    ids, mask = left_padded(2, 30)
    expected = stock(build("llama"), ids, attention_mask=mask)
    assert torch.equal(paged(model, ids, cache, attention_mask=mask), expected)
    assert cache.manager.match_prefix(ids[0].tolist()) == 29
    assert cache.manager.match_prefix(ids[1].tolist()) == 0
    assert cache.manager.match_prefix(ids[1, 5:].tolist()) == 0
    assert torch.equal(paged(model, ids, cache, attention_mask=mask, release=False), expected)
    assert cache.num_cached_tokens == 0


def test_padded_rows_are_never_found_where_beams_have_chosen_them(model, cache):
    ids, mask = left_padded(2, 30)
    expected = stock(build("llama"), ids, attention_mask=mask, num_beams=2)
    assert torch.equal(paged(model, ids, cache, attention_mask=mask, num_beams=2), expected)
    assert [cache.manager.match_prefix(row) for row in (ids[0].tolist(), ids[1].tolist())] == [29, 0]
    assert cache.manager.match_prefix(ids[1, 5:].tolist()) == 0


def test_padding_is_not_found_in_a_text_of_the_same_ids(model, cache):
    ids, mask = left_padded(2, 30)
    paged(model, ids, cache, attention_mask=torch.ones_like(mask))
    assert cache.manager.match_prefix(ids[1].tolist()) == 29
    expected = stock(build("llama"), ids, attention_mask=mask)
    assert torch.equal(paged(model, ids, cache, attention_mask=mask, release=False), expected)
    assert cache.num_cached_tokens == 0


def test_padding_that_generate_infers_is_seen(model, cache):
    """Without a mask transformers takes the padding token for padding, so the ids do not determine K and V."""
    ids, _ = left_padded(2, 30)
    expected = build("llama").generate(ids, **GREEDY)
    assert torch.equal(generate(model, ids, cache, **GREEDY), expected)
    assert cache.manager.match_prefix(ids[0].tolist()) == 29
    assert cache.manager.match_prefix(ids[1].tolist()) == 0


def test_an_eos_token_that_pads_is_text_in_a_prompt(model, cache):
    ids = prompt(1, 30)
    ids[0, 3] = 0
    options = GREEDY | {"eos_token_id": [5, 0]}
    assert torch.equal(generate(model, ids, cache, **options), build("llama").generate(ids, **options))
    assert cache.manager.match_prefix(ids[0].tolist()) >= 28


@pytest.mark.parametrize("untold", [2, 4, 6])
def test_ids_after_tokens_that_nobody_told_are_not_findable(model, cache, untold):
    ids = prompt(1, 40)
    cache.prompt(ids[:, :30])
    with torch.no_grad():
        model(ids[:, : 30 + untold], past_key_values=cache)
        cache.expect(ids[:, 30 + untold :])
        model(ids[:, 30 + untold :], past_key_values=cache)
    cache.release()
    cache.manager.check()
    assert cache.manager.match_prefix([*ids[0].tolist(), 1]) == 28


def test_ids_of_every_forward_in_a_loop_of_ones_own(model, cache):
    ids = prompt(1, 40)
    cache.prompt(ids[:, :30])
    with torch.no_grad():
        for start, end in ((0, 30), (30, 31), (31, 40)):
            cache.expect(ids[:, start:end])
            model(ids[:, start:end], past_key_values=cache)
    cache.release()
    assert cache.manager.match_prefix([*ids[0].tolist(), 1]) == 40


def test_ids_for_another_number_of_rows_are_refused(model, cache):
    cache.prompt(prompt(1, 8))
    cache.expect(prompt(2, 8))
    with pytest.raises(InvalidOperation, match="token ids: expected 1 rows as the keys have, got 2"), torch.no_grad():
        model(prompt(1, 8), past_key_values=cache)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_keys_of_other_frequencies_are_not_reused(rope):
    rope = rope | {"rope_theta": 100.0, "original_max_position_embeddings": 24}
    options = CONFIGS["llama"][1] | {"max_position_embeddings": 48, "rope_parameters": rope}
    model = LlamaForCausalLM(LlamaConfig(**options)).eval()
    model.load_state_dict(build("llama").state_dict())
    twin = copy.deepcopy(model)  # dynamic frequencies remember the longest text that a model has seen
    cache = PagedCache(model.config, num_blocks=256, block_size=4)
    long = prompt(1, 60)
    for ids in (long[:, :12], long, long[:, :12]):
        assert torch.equal(paged(model, ids, cache), stock(twin, ids))


def test_another_model_is_refused(model, cache):
    ids = prompt(1, 30)
    paged(model, ids, cache)
    with pytest.raises(InvalidOperation, match="model: expected the one"):
        paged(build("llama", seed=9), ids, cache)


def test_prompt_alone_serves_prompt_lookup_in_a_cold_cache(model, cache):
    ids = prompt(1, 6).repeat(1, 5)
    options = GREEDY | {"prompt_lookup_num_tokens": 4, "attention_mask": torch.ones_like(ids)}
    cache.prompt(ids)
    out = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(out, build("llama").generate(ids, **options))
    cache.release()
    cache.manager.check()
    assert cache.manager.match_prefix(ids[0].tolist()) == 28


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 7},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_every_mode_gives_stock_tokens_over_a_warm_cache(model, cache, options):
    ids = prompt(1, 6).repeat(1, 5)
    expected = stock(build("llama"), ids, **options)
    assert torch.equal(paged(model, ids, cache, **options), expected)
    assert torch.equal(paged(model, ids, cache, **options, release=False), expected)
    assert cache.num_cached_tokens == 29
    cache.manager.check()
    cache.release()
    cache.manager.check()
    assert cache.manager.used_block_count == 0


def test_parallel_samples_share_the_blocks_of_the_prompt(model, cache):
    ids = prompt(1, 32)
    options = GREEDY | {"do_sample": True, "num_return_sequences": 4, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(3)
    expected = build("llama").generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, cache, release=False, **options), expected)
    prompts = {cache.manager.get_sequence(seq_id).block_ids[:8] for seq_id in cache.seq_ids}
    assert len(cache.seq_ids) == 4
    assert len(prompts) == 1


def test_prompt_alone_serves_the_plain_generate(model, cache):
    ids = prompt(1, 30)
    paged(model, ids, cache)
    assert cache.prompt(ids) == 29
    assert cache.get_seq_length() == 29
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    assert torch.equal(out, stock(build("llama"), ids))
    cache.release()
    cache.manager.check()


def test_a_warm_cache_refuses_the_whole_prompt_again(model, cache):
    """Assisted decoding of transformers would compute the cached tokens twice, at wrong positions."""
    ids = prompt(1, 6).repeat(1, 5)
    paged(model, ids, cache)
    cache.prompt(ids)
    with pytest.raises(InvalidOperation, match=r"pagedkv.hf.generate\(\)"):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, prompt_lookup_num_tokens=4, **GREEDY
        )
    cache.release()
    assert cache.manager.used_block_count == 0


def test_without_ids_nothing_is_findable(model, cache):
    ids = prompt(1, 30)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    cache.release()
    assert cache.manager.match_prefix(ids[0].tolist()) == 0
    assert cache.manager.cached_block_count == 0


def test_prompt_alone_stores_the_prompt_and_never_guesses_the_reply(model, cache):
    ids = prompt(1, 30)
    cache.prompt(ids)
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    cache.release()
    assert cache.manager.match_prefix(reply[0].tolist()) == 28  # whole blocks of the prompt


def test_embeddings_are_not_taken_for_the_ids(model, cache):
    ids = prompt(1, 30)
    embeddings = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    generate(model, ids, cache, inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert cache.manager.match_prefix(ids[0].tolist()) == 0


def test_a_list_of_images_is_not_taken_for_the_ids(model, cache, monkeypatch):
    class Looked(Exception):
        """The model has no eyes: far enough."""

    def look(module, args, inputs):
        assert cache.manager.num_sequences == 0, "no ids were told"
        raise Looked

    ids = prompt(1, 20)
    paged(model, ids, cache)
    monkeypatch.setattr(model, "_validate_model_kwargs", lambda kwargs: None)
    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Looked):
        paged(model, ids, cache, pixel_values=[torch.ones(3, 4, 4)])
    hook.remove()


def test_without_the_use_of_a_cache_it_is_refused(model, cache):
    ids = prompt(1, 20)
    with pytest.raises(InvalidOperation, match="use_cache: expected True with a PagedCache, got False"):
        generate(model, ids, cache, use_cache=False, **GREEDY)
    assert cache.manager.used_block_count == 0 and cache.manager.match_prefix(ids[0].tolist()) == 0


def test_rejected_drafts_leave_true_blocks_only(model, cache):
    ids = prompt(1, 6).repeat(1, 5)
    out = paged(model, ids, cache, prompt_lookup_num_tokens=6)
    again = paged(model, torch.cat([out, prompt(1, 5, seed=8)], dim=1), cache, release=False)
    assert cache.num_cached_tokens >= 48
    assert torch.equal(again, stock(build("llama"), torch.cat([out, prompt(1, 5, seed=8)], dim=1)))


def test_a_pool_too_small_says_how_many_blocks_it_takes(model):
    cache = PagedCache(model.config, num_blocks=9, block_size=4)
    with pytest.raises(OutOfMemory, match="1 sequences of 40 tokens take 10 blocks of 4 tokens") as caught:
        paged(model, prompt(1, 40), cache)
    assert (caught.value.requested, caught.value.available) == (10, 9)
    assert cache.manager.used_block_count == 0
    short = prompt(1, 10)
    assert torch.equal(paged(model, short, cache), stock(build("llama"), short))


def test_a_pool_that_fills_up_while_generating_is_usable_after_release(model):
    cache = PagedCache(model.config, num_blocks=10, block_size=4)
    ids = prompt(1, 36)
    with pytest.raises(OutOfMemory):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    cache.manager.check()
    assert cache.get_seq_length() == 40
    cache.release()
    assert cache.manager.used_block_count == 0
    short = prompt(1, 10)
    assert torch.equal(paged(model, short, cache), stock(build("llama"), short))


def test_cached_blocks_are_reclaimed_for_new_prompts(model):
    cache = PagedCache(model.config, num_blocks=16, block_size=4)
    for seed in range(5):
        ids = prompt(1, 30, seed=seed)
        assert torch.equal(paged(model, ids, cache), stock(build("llama"), ids))
        cache.manager.check()
    assert cache.manager.stats.blocks_reclaimed > 0


def test_an_error_inside_frees_the_sequences(model, cache):
    def fail(*args: Any) -> Any:
        raise RuntimeError("stop here")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    ids = prompt(1, 30)
    try:
        with pytest.raises(RuntimeError, match="stop here"):
            paged(model, ids, cache, release=False)
    finally:
        hook.remove()
    cache.manager.check()
    assert cache.manager.used_block_count == 0
    assert cache.manager.match_prefix(ids[0].tolist()) == 0  # not all layers were written
    assert torch.equal(paged(model, ids, cache), stock(build("llama"), ids))


def test_the_hook_is_gone_afterwards(model, cache):
    paged(model, prompt(1, 5), cache)
    assert not model._forward_pre_hooks


def test_bad_arguments_are_named(model, cache):
    ids = prompt(1, 5)
    with pytest.raises(InvalidOperation, match="cache: expected a PagedCache, got dict"):
        generate(model, ids, {})
    with pytest.raises(InvalidOperation, match="input_ids: expected at least one token"):
        generate(model, ids[:, :0], cache)
    with pytest.raises(InvalidOperation, match="past_key_values"):
        generate(model, ids, cache, past_key_values=cache)
    for wrong in (ids[0], ids.float(), ids - VOCAB):
        with pytest.raises(InvalidOperation, match="input_ids"):
            cache.prompt(wrong)
    with pytest.raises(InvalidOperation, match="attention_mask"):
        cache.prompt(ids, torch.ones(1, 4))
    assert cache.manager.num_sequences == 0
