"""Quantised storage: how far numbers may be off, and that scales go wherever the numbers go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pagedkv import InvalidOperation, KvCacheSpec, KvStorage, LayerSpec, PagedKvCache, paged_attention
from pagedkv.data.quantised import dequantised, quantised

NAMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LAYOUTS = ("NHD", "HND")


def random_tokens(count, heads, dim, seed=0):
    return torch.randn(count, heads, dim, generator=torch.Generator().manual_seed(seed))


def round_trip(tokens, dtype):
    return dequantised(*quantised("keys", tokens, dtype))


# Above, a scale has all of its digits.
elements = st.floats(2.0**-100, 2.0**100, width=32)
elements = st.one_of(elements, elements.map(lambda x: -x), st.just(0.0))
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=elements)


@given(arrays)
def test_int8_is_off_by_half_a_step_at_most(array):
    tokens = torch.from_numpy(array)
    step = tokens.double().abs().amax(2, keepdim=True) / 127
    error = (round_trip(tokens, torch.int8).double() - tokens.double()).abs()
    assert (error <= step * 0.5 * (1 + 1e-4)).all()


@given(arrays)
def test_fp8_is_off_by_a_sixteenth_or_by_half_of_its_smallest_step(array):
    tokens = torch.from_numpy(array)
    smallest = tokens.double().abs().amax(2, keepdim=True) / 448 * 2.0**-10
    error = (round_trip(tokens, torch.float8_e4m3fn).double() - tokens.double()).abs()
    assert (error <= torch.maximum(tokens.double().abs() / 16, smallest) * (1 + 1e-4)).all()


@given(arrays, st.sampled_from(list(NAMES.values())))
def test_the_greatest_element_keeps_its_place_and_zeros_stay_zeros(array, dtype):
    tokens = torch.from_numpy(array)
    numbers, scales = quantised("keys", tokens, dtype)
    result = dequantised(numbers, scales)
    greatest = tokens.abs().amax(2)
    torch.testing.assert_close(result.abs().amax(2), greatest, rtol=1e-6, atol=0)
    assert ((greatest == 0) == (scales == 0)).all()
    assert (result[tokens == 0] == 0).all() and (result * tokens >= 0).all()
    assert numbers.dtype == dtype and scales.dtype == torch.float32 and numbers.is_contiguous()


def test_halves_go_to_even():
    tokens = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]).view(1, 1, 6)
    numbers, scales = quantised("keys", tokens, torch.int8)
    assert scales.item() == 1.0 and numbers.flatten().tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("dtype", NAMES.values(), ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-44, 1e-40, 3e38])
def test_the_ends_of_float32(dtype, size):
    """A scale with few digits left, or none, must not let numbers run over."""
    tokens = torch.tensor([size, -size, 0.0, size / 2]).view(1, 1, 4)
    result = round_trip(tokens, dtype)
    assert result.isfinite().all() and (result * tokens >= 0).all()
    assert (result.abs() <= tokens.abs().max() * 1.5).all()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 1e39])
def test_what_is_not_finite_is_refused_and_nothing_is_written(dtype, side, wrong):
    storage = KvStorage(KvCacheSpec(2, 4, 2, 8, dtype=dtype))
    storage.write(0, *(random_tokens(8, 2, 8, seed) for seed in (1, 2)), np.arange(8))
    before = [tensor.clone() for tensor in storage.gather(0, np.arange(8))]
    tokens = {"keys": random_tokens(2, 2, 8, 3).double(), "values": random_tokens(2, 2, 8, 4).double()}
    tokens[side][1, 1, 3] = wrong
    with pytest.raises(InvalidOperation, match=f"{side}: expected finite numbers"):
        storage.write(0, tokens["keys"], tokens["values"], np.array([3, 5]))
    assert all(a.equal(b) for a, b in zip(storage.gather(0, np.arange(8)), before, strict=True))


def layers_of(shapes):
    return tuple(LayerSpec(*shape) for shape in shapes)


SPECS = {
    "one": layers_of([(2, 16, 16)]),
    "alike": layers_of([(2, 16, 16)] * 3),
    "odd": layers_of([(3, 5, 5)] * 2),
    "two sizes": layers_of([(2, 16, 12)] * 2),
    "mixed": layers_of([(2, 16, 16), (1, 20, 3)]),
}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layers", SPECS)
def test_writes_reads_copies_and_views(dtype, layout, layers):
    spec = KvCacheSpec(5, 4, layers=SPECS[layers], dtype=dtype, layout=layout)
    storage = KvStorage(spec)
    assert storage.dtype == NAMES[dtype] and storage.memory_bytes == spec.total_memory_bytes
    slots = np.random.default_rng(0).permutation(20)
    expected = []
    for number, shape in enumerate(spec.layer_specs):
        keys = random_tokens(20, shape.num_kv_heads, shape.head_dim, number)
        values = random_tokens(20, shape.num_kv_heads, shape.v_head_dim, -number)
        storage.write(number, keys, values, slots)
        in_order = [torch.empty_like(side).index_copy_(0, torch.from_numpy(slots), side) for side in (keys, values)]
        expected.append([round_trip(side, NAMES[dtype]) for side in in_order])
    storage.copy_blocks(np.array([[0, 1], [1, 0], [2, 4]]))
    now = np.concatenate([np.arange(4, 8), np.arange(4), np.arange(8, 16), np.arange(8, 12)])
    for number, sides in enumerate(expected):
        for got, side in zip(storage.gather(number, np.arange(20)), sides, strict=True):
            assert got.dtype == torch.float32 and got.equal(side[now])
        assert [len(got) for got in storage.gather(number, np.zeros(0, np.int64))] == [0, 0]
        for block in range(5):
            for view, side in zip(storage.block(block), sides, strict=True):
                assert view[number].equal(side[now][block * 4 : block * 4 + 4])


@pytest.mark.parametrize("dtype", NAMES)
def test_keys_alone_are_written_over(dtype):
    storage = KvStorage(KvCacheSpec(2, 4, 2, 8, dtype=dtype))
    storage.write(0, random_tokens(8, 2, 8, 1), random_tokens(8, 2, 8, 2), np.arange(8))
    _, values = storage.gather(0, np.arange(8))
    new = random_tokens(2, 2, 8, 3)
    storage.write_keys(0, new, np.array([6, 1]))
    got = storage.gather(0, np.array([6, 1]))[0]
    assert got.equal(round_trip(new, NAMES[dtype])) and storage.gather(0, np.arange(8))[1].equal(values)


def test_half_the_memory_of_float16():
    half, small = (KvCacheSpec(100, 16, 8, 128, num_layers=4, dtype=dtype) for dtype in ("float16", "int8"))
    assert small.total_memory_bytes / half.total_memory_bytes == (128 + 4) / 256


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fork_takes_the_scales_along(dtype, layout):
    """Copy-on-write moves numbers and scales of the shared tail: both texts attend as each would alone."""
    cache = PagedKvCache(8, 4, 2, 16, dtype=dtype, layout=layout)
    texts = {1: random_tokens(7, 2, 16, 1), 2: random_tokens(7, 2, 16, 1)}
    texts[1][6] *= 100  # another scale in the block that is shared before
    texts[2][6] *= 0.01
    cache.allocate(1, 6)
    cache.write(0, texts[1][:6], -texts[1][:6], cache.plan([1]))
    cache.commit(cache.plan([1]))
    cache.fork(1, 2)
    plan = cache.append_batch([1, 2])
    assert cache.stats.blocks_copied == 1
    new = torch.cat([texts[1][6:], texts[2][6:]])
    cache.write(0, new, -new, plan)
    queries = random_tokens(2, 4, 16, 5)
    out = cache.attend(0, queries, plan)
    for i, seq_id in enumerate((1, 2)):
        keys = round_trip(texts[seq_id], NAMES[dtype]).view(7, 1, 2, 16)
        alone = paged_attention(
            queries[i : i + 1],
            keys,
            -keys,
            block_tables=np.arange(7, dtype=np.int32)[None],
            seq_lens=np.array([7], np.int32),
            cu_seqlens_q=np.array([0, 1], np.int32),
            scale=0.25,
            backend="reference",
        )
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert cache.used_memory_bytes == 3 * cache.block_memory_bytes == 3 * 4 * 2 * 2 * (16 + 4)
    keys = cache.block(int(plan.block_tables[0, 0])).keys
    assert keys.dtype == torch.float32 and keys.shape == (1, 4, 2, 16)


@pytest.mark.parametrize("dtype", NAMES)
def test_the_scales_of_a_storage_that_is_not_quantised_are_none(dtype):
    storage = KvStorage(KvCacheSpec(2, 4, 2, 8, dtype=dtype))
    assert storage.key_scales(0).shape == storage.value_scales(0).shape == (2, 4, 2)
    plain = KvStorage(KvCacheSpec(2, 4, 2, 8))
    assert plain.key_scales(0) is None and plain.value_scales(0) is None
