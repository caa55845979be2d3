"""Weights in 8 bits: how near they are to what they were, that tied ones stay one, what is let go when; and panels."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.hf.described import tiny

from pagedkv import InvalidOperation
from pagedkv.data.decoder import Linear
from pagedkv.data.simd_llvm import has_bfloat16_products
from pagedkv.data.simd_products import PANEL, add_panels, unit_of, unpacked
from pagedkv.data.weights import CHUNK, _pack, packed, quantised, quantised_rows
from pagedkv.hf.description import describe, tensors_of
from pagedkv.jit import compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_element_is_off_by_half_a_step_at_most(dtype):
    weight = torch.randn(300, 77).mul_(torch.logspace(-3, 3, 300)[:, None]).to(dtype)
    weight[7] = 0
    numbers, scales = quantised_rows(weight)
    assert numbers.dtype == torch.int8 and numbers.is_contiguous() and scales.dtype == torch.float32
    error = (numbers.float() * scales[:, None] - weight.float()).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    assert (numbers.abs().amax(1) == torch.where(torch.arange(300) == 7, 0, 127)).all()
    assert scales[7] == 0


def test_rows_are_the_same_whatever_is_quantised_beside_them():
    wide = torch.randn(5, CHUNK // 2)
    numbers, scales = quantised_rows(wide)
    for i in range(5):
        alone, scale = quantised_rows(wide[i : i + 1])
        assert torch.equal(alone[0], numbers[i]) and scale[0] == scales[i]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_no_number_is_refused(wrong):
    weight = torch.ones(3, 4)
    weight[1, 2] = wrong
    with pytest.raises(InvalidOperation, match="weights: expected None for a model with NaN"):
        quantised_rows(weight)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "qwen3_moe", "gemma3"])
def test_every_matrix_becomes_int8_and_tied_ones_stay_one(name):
    decoder = describe(tiny(name))
    is_tied = decoder.head.weight.data_ptr() == decoder.embedding.data_ptr()
    got = quantised(decoder)
    assert all(each.dtype == torch.int8 for each in tensors_of(got.layers) if each.dim() == 2)
    assert got.embedding.dtype == got.head.weight.dtype == torch.int8
    assert (got.head.weight is got.embedding) == is_tied
    assert got.embedding_row_scale is not None and len(got.embedding_row_scale) == len(got.embedding)


def test_layers_are_let_go_one_by_one():
    decoder = describe(tiny("llama"))
    count, steps = len(decoder.layers), []
    quantised(decoder, lambda done: steps.append((len(decoder.layers), len(done))))
    assert steps == [*((count - 1 - i, 7) for i in range(count)), (0, 2)]


@compiled
def _products(x, rows, panel, count, sums):
    add_panels(x, rows, panel, (0 * count,), count, sums)


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("count", [4, 16, 32, 36, 100, 256])
def test_products_are_those_of_the_numbers(count, is_narrow):
    """All of small integers, so that no sum is rounded: every one of the 255 numbers is widened without error."""
    if is_narrow and not has_bfloat16_products():
        pytest.skip("the processor does not multiply bfloat16")
    rng = np.random.default_rng(count)
    x = rng.integers(-8, 9, (4, count)).astype(np.float32)
    y = rng.integers(-127, 128, (PANEL, count)).astype(np.int8)
    y[:, :] = np.where(rng.random(y.shape) < 0.5, np.resize(np.arange(-127, 128), y.shape), y)
    given = (x.view(np.uint32) >> 16).astype(np.uint16) if is_narrow else x
    panel = y.copy()
    _pack(torch.from_numpy(panel), unit_of(given.itemsize, True))
    for height in (1, 2, 4):
        sums = np.zeros(height * PANEL, np.float32)
        _products(given.ravel(), tuple(i * count for i in range(height)), panel.ravel(), count, sums)
        assert np.array_equal(sums.reshape(height, PANEL), x[:height] @ y.astype(np.float32).T)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.int8, 4)], ids=str)
def test_whole_panels_are_packed_in_place_and_the_last_rows_stay(dtype, unit):
    weight = torch.randint(-100, 100, (3 * PANEL + 5, 48)).to(dtype)
    before, place = weight.clone(), weight.data_ptr()
    _pack(weight, unit)
    assert weight.data_ptr() == place and torch.equal(weight[3 * PANEL :], before[3 * PANEL :])
    for i in range(0, 3 * PANEL, PANEL):
        rows = unpacked(weight[i : i + PANEL].float().numpy().ravel(), unit)
        assert np.array_equal(rows, before[i : i + PANEL].float().numpy())


def linear(weight):
    return Linear(weight)


def test_matrices_that_share_a_part_of_their_memory_are_left_as_they_are():
    decoder = describe(copy.deepcopy(tiny("llama")))
    shared = torch.randn(100, decoder.embedding.shape[1])
    alone = torch.randn(64, decoder.embedding.shape[1])
    apart = torch.randn(64, 2 * decoder.embedding.shape[1])[:, ::2].t().contiguous().t()
    layer = decoder.layers[0]
    attention = replace(layer.attention, query=linear(shared[:64]), key=linear(shared[32:96]), value=linear(alone))
    attention = replace(attention, output=linear(apart))
    before = [each.clone() for each in (shared, alone, apart)]
    got = packed(replace(decoder, layers=[replace(layer, attention=attention)]), torch.float32).layers[0].attention
    assert [each.is_packed for each in (got.query, got.key, got.value, got.output)] == [False, False, True, False]
    assert torch.equal(shared, before[0]) and not torch.equal(alone, before[1]) and torch.equal(apart, before[2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "qwen3_moe", "gemma3"])
def test_tied_matrices_are_packed_once(name):
    decoder = describe(copy.deepcopy(tiny(name)))
    is_tied = decoder.head.weight.data_ptr() == decoder.embedding.data_ptr()
    before, table = decoder.head.weight.clone(), decoder.embedding.clone()
    got = packed(decoder, torch.float32)
    assert got.embedding_is_packed == is_tied and got.head.is_packed
    assert np.array_equal(unpacked(got.head.weight[:PANEL].numpy().ravel(), 1), before[:PANEL].numpy())
    assert torch.equal(got.embedding, table) != is_tied
