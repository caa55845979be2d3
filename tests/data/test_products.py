"""Tiles of dot products: right for every kind of weights and every length, and of the same bits in every tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv.data.simd_llvm import has_bfloat16_products
from pagedkv.data.simd_products import dot_tile
from pagedkv.data.team import torch_alone
from pagedkv.jit import compiled


@compiled
def tile_of_four(x, y, count, out):
    dot_tile(x, (0 * count, count, 2 * count, 3 * count), y, (0 * count, count, 2 * count, 3 * count), count, out)


@compiled
def tile_of_two(x, y, count, out):
    dot_tile(x, (count, 3 * count), y, (0 * count, count, 2 * count, 3 * count), count, out)


@compiled
def tile_of_one(x, y, count, out):
    dot_tile(x, (2 * count,), y, (3 * count, 0 * count), count, out)


KINDS = [("float32", kind) for kind in ("float32", "float16", "bfloat16", "int8")]
if has_bfloat16_products():
    KINDS += [("bfloat16", "bfloat16"), ("bfloat16", "int8")]


def bits(numbers: torch.Tensor) -> np.ndarray:
    shown = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(numbers.dtype, numbers.dtype)
    return numbers.view(shown).numpy().ravel()


def random(kind: str, count: int, seed: int) -> torch.Tensor:
    numbers = torch.randn(4, count, generator=torch.Generator().manual_seed(seed))
    return (40 * numbers).clamp(-127, 127).to(torch.int8) if kind == "int8" else numbers.to(getattr(torch, kind))


@pytest.mark.parametrize("count", [1, 7, 16, 33, 64, 100, 576])
@pytest.mark.parametrize(("left", "right"), KINDS)
def test_products_are_right_and_the_same_in_every_tile(left, right, count):
    x, y = random(left, count, 1), random(right, count, 2)
    exact = (x.double() @ y.double().T).numpy()
    whole, two, one = (np.zeros(16, np.float32) for _ in range(3))
    tile_of_four(bits(x), bits(y), count, whole)
    tile_of_two(bits(x), bits(y), count, two)
    tile_of_one(bits(x), bits(y), count, one)
    whole = whole.reshape(4, 4)
    size = (x.double().abs() @ y.double().abs().T).numpy()
    assert (np.abs(whole - exact) <= 1e-6 * size).all()
    assert (two[:8].reshape(2, 4) == whole[[1, 3]]).all()
    assert (one[:2] == whole[2, [3, 0]]).all()


def test_torch_alone_gives_its_threads_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyError), torch_alone():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
