"""KvCacheSpec: shapes, byte arithmetic, and what it refuses."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pagedkv import InvalidOperation, KvCacheSpec, LayerSpec

dims = st.integers(1, 300)
layer_specs = st.builds(LayerSpec, dims, dims, dims)


def test_the_block_of_the_seed_takes_262144_bytes():
    assert KvCacheSpec(100, 16, 32, 128).block_memory_bytes == 262_144
    assert KvCacheSpec(100, 16, 32, 128, num_layers=3).block_memory_bytes == 3 * 262_144


def test_defaults():
    spec = KvCacheSpec(7)
    assert (spec.block_size, spec.num_kv_heads, spec.head_dim, spec.v_head_dim) == (16, 8, 64, 64)
    assert (spec.num_layers, spec.dtype, spec.layout, spec.layers) == (1, "float16", "NHD", None)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_dtypes_by_name_and_as_torch_writes_them(dtype, size):
    spec = KvCacheSpec(2, dtype=dtype)
    assert spec.dtype_bytes == size
    assert spec == KvCacheSpec(2, dtype=getattr(torch, dtype))
    assert spec.dtype == dtype


@pytest.mark.parametrize(("given", "dtype"), [(torch.int8, "int8"), (torch.float8_e4m3fn, "fp8"), ("fp8", "fp8")])
def test_quantised_dtypes_have_scales(given, dtype):
    spec = KvCacheSpec(2, 16, 8, 128, dtype=given)
    assert (spec.dtype, spec.dtype_bytes, spec.is_quantised) == (dtype, 1, True)
    assert spec.block_memory_bytes == 16 * 8 * 2 * (128 + 4)
    assert not KvCacheSpec(2).is_quantised


@given(
    num_blocks=st.integers(0, 10**6),
    block_size=dims,
    layers=st.lists(layer_specs, max_size=5),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "int8", "fp8"]),
)
def test_bytes_add_up_over_layers(num_blocks, block_size, layers, dtype):
    spec = KvCacheSpec(num_blocks, block_size, layers=tuple(layers), dtype=dtype)
    elements = sum(layer.num_kv_heads * (layer.head_dim + layer.v_head_dim) for layer in layers)
    assert spec.layer_specs == tuple(layers)
    assert spec.num_layers == len(layers)
    scales = sum(2 * layer.num_kv_heads for layer in layers) if dtype in ("int8", "fp8") else 0
    assert spec.bytes_per_token == elements * spec.dtype_bytes + 4 * scales
    assert spec.block_memory_bytes == block_size * spec.bytes_per_token
    assert spec.total_memory_bytes == spec.memory_bytes(num_blocks) == num_blocks * spec.block_memory_bytes


def test_an_empty_pool_takes_nothing():
    spec = KvCacheSpec(0)
    assert spec.total_memory_bytes == spec.used_memory_bytes == 0
    assert spec.block_memory_bytes > 0


def test_equal_layers_are_the_same_as_a_layer_count():
    spec = KvCacheSpec(4, layers=(LayerSpec(2, 8), LayerSpec(2, 8)))
    assert spec == KvCacheSpec(4, num_kv_heads=2, head_dim=8, num_layers=2)
    assert spec.layers is None


def test_layers_that_differ_are_kept_and_the_first_is_shown():
    spec = KvCacheSpec(4, layers=[LayerSpec(2, 8), LayerSpec(1, 24, 16)])
    assert spec.layers == (LayerSpec(2, 8, 8), LayerSpec(1, 24, 16))
    assert (spec.num_kv_heads, spec.head_dim, spec.v_head_dim) == (2, 8, 8)
    assert dataclasses.replace(spec, num_blocks=9).layers == spec.layers


def test_block_shape_follows_layer_and_layout():
    layers = (LayerSpec(2, 8), LayerSpec(1, 24, 16))
    nhd, hnd = (KvCacheSpec(4, 16, layers=layers, layout=layout) for layout in ("NHD", "HND"))
    assert nhd.block_shape(0) == (16, 2, 8)
    assert nhd.block_shape(1) == (16, 1, 24)
    assert nhd.block_shape(1, values=True) == (16, 1, 16)
    assert hnd.block_shape(1, values=True) == (1, 16, 16)
    for wrong in (2, -1, True, "0"):
        with pytest.raises(InvalidOperation, match="layer: expected an int"):
            nhd.block_shape(wrong)


def test_it_is_frozen_hashable_and_travels():
    spec = KvCacheSpec(4, layers=(LayerSpec(2, 8), LayerSpec(1, 24, 16)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.num_blocks = 5
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert len({spec, pickle.loads(pickle.dumps(spec))}) == 1


def test_integers_of_numpy_become_ints():
    spec = KvCacheSpec(np.int64(4), np.int32(2))
    assert type(spec.num_blocks) is int
    assert spec == KvCacheSpec(4, 2)


COUNTS = ("num_blocks", "block_size", "num_kv_heads", "head_dim", "v_head_dim", "num_layers")


@pytest.mark.parametrize("value", [True, 1.0, float("nan"), "4", -1, 2**31, 10**30, [4]])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_none_is_refused_by_name(name, value):
    with pytest.raises(InvalidOperation, match=f"{name}: expected an int") as error:
        KvCacheSpec(**{"num_blocks": 4, name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize("name", ["block_size", "num_kv_heads", "head_dim", "v_head_dim"])
def test_zero_is_refused_where_it_makes_no_sense(name):
    with pytest.raises(InvalidOperation, match=rf"{name}: expected an int in 1 … \d+, got 0"):
        KvCacheSpec(**{"num_blocks": 4, name: 0})


@pytest.mark.parametrize("value", ["float64", "int4", "fp4", "", None, 16, torch.float64])
def test_unknown_dtype_is_refused(value):
    with pytest.raises(InvalidOperation, match="dtype: expected one of float16, bfloat16, float32, int8, fp8, got"):
        KvCacheSpec(4, dtype=value)


@pytest.mark.parametrize("value", ["nhd", "NDH", "", None, ["NHD"]])
def test_unknown_layout_is_refused(value):
    with pytest.raises(InvalidOperation, match="layout: expected one of NHD, HND, got"):
        KvCacheSpec(4, layout=value)


@pytest.mark.parametrize("value", [LayerSpec(1, 1), [(2, 8)], 3, "NHD"])
def test_layers_of_another_type_are_refused(value):
    with pytest.raises(InvalidOperation, match="layers: expected a tuple of LayerSpec"):
        KvCacheSpec(4, layers=value)


def test_layers_and_their_count_must_agree():
    with pytest.raises(InvalidOperation, match="num_layers: expected 2, the number of layers given, got 3"):
        KvCacheSpec(4, num_layers=3, layers=(LayerSpec(1, 1), LayerSpec(2, 2)))


@pytest.mark.parametrize("value", [-1, True, 0.5, "1"])
def test_memory_of_no_number_of_blocks_is_refused(value):
    with pytest.raises(InvalidOperation, match="num_blocks: expected an int"):
        KvCacheSpec(4).memory_bytes(value)
