"""Weights in 8 bits: how near they are to what they were, that tied ones stay one, and what is let go when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.hf.described import tiny

from pagedkv import InvalidOperation
from pagedkv.data.simd_llvm import has_bfloat16_products
from pagedkv.data.simd_products import dot_tile
from pagedkv.data.weights import CHUNK, quantised, quantised_rows
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
def _tile(x, rows, y, columns, count, out):
    dot_tile(x, rows, y, columns, count, out)


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("count", [1, 15, 32, 33, 100, 256])
def test_products_are_those_of_the_numbers(count, is_narrow):
    """All of small integers, so that no sum is rounded: every one of the 255 numbers is widened without error."""
    if is_narrow and not has_bfloat16_products():
        pytest.skip("the processor does not multiply bfloat16")
    rng = np.random.default_rng(count)
    x = rng.integers(-8, 9, (4, count)).astype(np.float32)
    y = rng.integers(-127, 128, (4, count)).astype(np.int8)
    y[:, :] = np.where(rng.random(y.shape) < 0.5, np.resize(np.arange(-127, 128), y.shape), y)
    given = (x.view(np.uint32) >> 16).astype(np.uint16) if is_narrow else x
    places = tuple(i * count for i in range(4))
    for height in (1, 2, 4):
        out = np.zeros(16, np.float32)
        _tile(given.ravel(), places[:height], y.ravel(), places, count, out)
        assert np.array_equal(out[: 4 * height].reshape(height, 4), x[:height] @ y.astype(np.float32).T)
