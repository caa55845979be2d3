"""Tiles of dot products: right for every kind of weights and every length, and of the same bits in every tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedkv.data.simd_llvm import has_bfloat16_products
from pagedkv.data.simd_products import WIDENED, add_dots, dot_stream, dot_tile, scores_of, totals, turn, widen
from pagedkv.data.team import torch_alone
from pagedkv.jit import compiled


@compiled
def tile_of_four(x, y, count, out):
    dot_tile(x, (0 * count, count, 2 * count, 3 * count), y, (0 * count, count, 2 * count, 3 * count), count, out)


@compiled
def stream_of_four(x, y, count, out):
    dot_stream(x, (0 * count, count, 2 * count, 3 * count), y, (0 * count, count, 2 * count, 3 * count), count, out)


@compiled
def tile_of_two(x, y, count, out):
    dot_tile(x, (count, 3 * count), y, (0 * count, count, 2 * count, 3 * count), count, out)


@compiled
def tile_of_one(x, y, count, out):
    dot_tile(x, (2 * count,), y, (3 * count, 0 * count), count, out)


@compiled
def tile_in_parts(x, y, count, part, sums, out):
    for begin in range(0, count, part):
        runs = (begin, count + begin, 2 * count + begin, 3 * count + begin)
        add_dots(x, runs, y, runs, min(part, count - begin), sums, 16)
    totals(sums, 16, out)


@compiled
def scores_of_keys(rows, width, keys, places, dim, step, tile, scale, out):
    for group in range(2):
        for d in range(0, dim, step):
            turn(rows, keys, places, 16 * group, 3 + d, dim - d, tile, (group * width + d) * 256 // step)
    apart, count = width * 256 // step, width * 16 // step
    scores_of(rows, 0 * dim, width, tile, (0 * dim, apart), count, scale, out, 16 + 0 * dim)
    scores_of(rows, 0 * dim, width, tile, (apart,), count, scale, out, 144 + 0 * dim)


@compiled
def widened_at(numbers, index, target, to):
    widen(numbers, index, target, to)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_int8_are_widened_without_error_and_nothing_else_is_written(dtype):
    numbers = torch.arange(-127, 128, dtype=torch.int8)
    for index in (0, 1, 64, 127, 255 - WIDENED):
        target = torch.full((WIDENED + 5,), 3.0, dtype=dtype)
        widened_at(numbers.numpy(), index, bits(target), 3)
        expected = torch.full((WIDENED + 5,), 3.0)
        expected[3 : 3 + WIDENED] = numbers[index : index + WIDENED]
        assert target.float().equal(expected)


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
    whole, stream, two, one = (np.zeros(16, np.float32) for _ in range(4))
    tile_of_four(bits(x), bits(y), count, whole)
    stream_of_four(bits(x), bits(y), count, stream)
    assert (stream == whole).all()
    tile_of_two(bits(x), bits(y), count, two)
    tile_of_one(bits(x), bits(y), count, one)
    whole = whole.reshape(4, 4)
    size = (x.double().abs() @ y.double().abs().T).numpy()
    assert (np.abs(whole - exact) <= 1e-6 * size).all()
    assert (two[:8].reshape(2, 4) == whole[[1, 3]]).all()
    assert (one[:2] == whole[2, [3, 0]]).all()


@pytest.mark.skipif(not has_bfloat16_products(), reason="this processor does not multiply bfloat16")
def test_every_number_of_int8_becomes_the_same_as_bfloat16():
    numbers = torch.arange(-127, 128, dtype=torch.int8)
    for at, number in enumerate(numbers.tolist()):
        one, out = torch.zeros(4, len(numbers), dtype=torch.bfloat16), np.zeros(16, np.float32)
        one[0, at] = 1
        tile_of_four(bits(one), bits(numbers.repeat(4, 1)), len(numbers), out)
        assert out[0] == number


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


@pytest.mark.parametrize(("count", "part"), [(7, 32), (64, 32), (100, 64), (576, 288), (600, 96)])
@pytest.mark.parametrize(("left", "right"), KINDS)
def test_products_of_parts_have_the_bits_of_whole_runs(left, right, count, part):
    x, y = random(left, count, 1), random(right, count, 2)
    whole, got = np.zeros(16, np.float32), np.zeros(16, np.float32)
    tile_of_four(bits(x), bits(y), count, whole)
    sums = np.zeros(16 + 256 + 16, np.float32)
    tile_in_parts(bits(x), bits(y), count, part, sums, got)
    assert (got == whole).all()
    assert not sums[:16].any() and not sums[-16:].any()


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 100])
@pytest.mark.parametrize(("left", "right"), [kind for kind in KINDS if kind == ("bfloat16", "bfloat16")])
def test_scores_are_right_and_the_same_for_few_keys_and_many(left, right, dim):
    step = 32 if left == "bfloat16" else 16
    width = -(-dim // step) * step
    queries, pool = torch.zeros(4, width), torch.cat([random(right, 3 + dim, seed) for seed in range(10)])
    queries[:, :dim] = random("float32", dim, 99)
    queries = queries.to(getattr(torch, left))
    order = np.random.default_rng(dim).permutation(40)[:32]
    tile, out = np.full(512 * 256 // step, np.nan, np.float32), np.zeros(16 + 128 + 64 + 16, np.float32)
    places = order * (3 + dim)
    scores_of_keys(bits(queries), width, bits(pool), places, dim, step, tile, np.float32(0.5), out)
    keys = pool[torch.from_numpy(order), 3:].double()
    exact = (keys @ queries[:, :dim].double().T).numpy() * 0.5
    size = (keys.abs() @ queries[:, :dim].double().abs().T).numpy()
    got = out[16:144].reshape(32, 4)
    assert (np.abs(got - exact) <= 1e-6 * size).all()
    assert (out[144:208].reshape(16, 4) == got[16:]).all()
    assert not out[:16].any() and not out[-16:].any()
