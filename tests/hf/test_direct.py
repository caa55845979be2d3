"""Direct mode: nothing is gathered, and nothing that would change the result passes unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.models import GREEDY, build, left_padded, prompt
from transformers import AttentionInterface, DynamicCache

from pagedkv.data.storage import KvStorage
from pagedkv.errors import InvalidOperation
from pagedkv.hf import PagedCache
from pagedkv.hf.direct import DIRECT, PagedMask, PagedStates, attend_blocks, paged_mask


@pytest.fixture
def model():
    return build("mistral", attention=DIRECT)


@pytest.fixture
def cache(model):
    return PagedCache(model.config, num_blocks=64, block_size=4)


def handles(model: Any, tokens: int = 9) -> dict[str, Any]:
    """Return the arguments that the last layer gives to attention in a decode step after `tokens`."""
    seen: dict[str, Any] = {}

    def keep(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen.update(module=module, query=query, key=key, value=value, attention_mask=attention_mask, **kwargs)
        return attend_blocks(module, query, key, value, attention_mask, **kwargs)

    cache = PagedCache(model.config, num_blocks=64, block_size=4)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        model(prompt(1, tokens), past_key_values=cache)
        patch.setitem(AttentionInterface._global_mapping, DIRECT, keep)
        model(prompt(1, 1), past_key_values=cache)
    return seen


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_nothing_is_gathered(name, monkeypatch):
    model = build(name, attention=DIRECT)
    cache = PagedCache(model.config, num_blocks=64, block_size=4)

    def refuse(*args: Any) -> Any:
        raise AssertionError("gathered")

    monkeypatch.setattr(KvStorage, "gather", refuse)
    ids, mask = left_padded(2, 21)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(out, build(name).generate(ids, attention_mask=mask, **GREEDY))


def test_padding_reads_as_zeros_and_text_as_dense_attention(model):
    """Rows of 0, 3 and 5 paddings in one prefill, against attention written out."""
    generator = torch.Generator().manual_seed(0)
    cache = PagedCache(model.config, num_blocks=64, block_size=4)
    pads, tokens, dim = torch.tensor([0, 3, 5]), 9, 16
    query = torch.randn(3, 4, tokens, dim, generator=generator)
    key, value = (torch.randn(3, 2, tokens, dim, generator=generator) for _ in range(2))
    paged_key, paged_value = cache.update(key, value, 0)
    assert isinstance(paged_key, PagedStates)
    assert paged_key.shape == key.shape
    visible = torch.arange(tokens) >= pads[:, None]
    mask = PagedMask.of((3, 1, tokens, tokens), 4, pads.numpy())
    out, _ = attend_blocks(torch.nn.Module(), query, paged_key, paged_value, mask)
    place = torch.arange(tokens)
    near = (place[:, None] >= place) & (place[:, None] - place < 4)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * dim**-0.5
    scores = scores.masked_fill(~(near & visible[:, None, None, :]), float("-inf"))
    dense = (scores.softmax(-1).nan_to_num() @ value.repeat_interleave(2, 1)).transpose(1, 2)
    dense = dense * visible[:, :, None, None]
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_a_handle_is_no_tensor_to_compute_with(model):
    seen = handles(model)
    for wrong in (lambda: seen["key"] + 1, lambda: seen["attention_mask"].float(), lambda: seen["value"][0]):
        with pytest.raises(InvalidOperation, match="gather mode"):
            wrong()
    assert "PagedStates" in repr(seen["key"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cu_seq_lens_q": torch.zeros(1)}, "cu_seq_lens_q"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"sliding_window": 5}, "sliding_window"),
        ({"attention_mask": None}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 1, 1, 10)}, "attention_mask"),
        ({"key": torch.zeros(1, 2, 10, 16)}, "PagedCache"),
        ({"value": torch.zeros(1, 2, 10, 16)}, "PagedCache"),
    ],
    ids=lambda given: given if isinstance(given, str) else next(iter(given)),
)
def test_what_would_change_the_result_is_refused(model, change, words):
    arguments = handles(model)
    attend_blocks(**arguments)
    with pytest.raises(InvalidOperation, match=words):
        attend_blocks(**{**arguments, **change})


def test_arguments_that_are_unset_pass(model):
    arguments = handles(model)
    expected, _ = attend_blocks(**arguments)
    got, _ = attend_blocks(**arguments, position_bias=None, output_attentions=False)
    assert torch.equal(got, expected)


def test_padding_elsewhere_than_on_the_left_is_refused(model, cache):
    ids, mask = prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 4] = 0
    with pytest.raises(InvalidOperation, match="zeros on the left"), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)


def test_a_mask_of_ones_own_is_refused(model, cache):
    mask = torch.ones(1, 1, 9, 9).tril()
    with pytest.raises(InvalidOperation, match="attention_mask"), torch.no_grad():
        model(prompt(1, 9), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("other", [None, DynamicCache])
def test_another_cache_or_none_is_refused(model, other):
    given = {"past_key_values": other()} if other else {"use_cache": False}
    with pytest.raises(InvalidOperation, match="past_key_values=PagedCache"), torch.no_grad():
        model(prompt(1, 9), **given)


def test_a_mask_function_that_is_not_causal_is_refused():
    with pytest.raises(InvalidOperation, match="causal"):
        paged_mask(1, 4, 4, mask_function=lambda b, h, q, k: q >= k)


def test_keys_that_the_mask_does_not_speak_of_are_refused(model):
    arguments = handles(model)
    with pytest.raises(InvalidOperation, match=r"expected \[1, 1, 1, 10\], got \[1, 1, 1, 9\]"):
        attend_blocks(**{**arguments, "attention_mask": PagedMask.of((1, 1, 1, 9), 12, torch.zeros(1).numpy())})


def test_switching_the_implementation_of_a_model_switches_the_mode():
    model, ids = build("llama", seed=4), prompt(1, 9)
    expected = model.generate(ids, **GREEDY)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(DIRECT)
        cache = PagedCache(model.config, num_blocks=64, block_size=4)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    finally:
        model.set_attn_implementation(before)
    cache.release()
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
