"""Attention over int8 and fp8 blocks: every backend equals the oracle on the very same numbers and scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.attention_cases import Shape, make_case
from tests.contracts.test_attention_contract import EXAMINED, HOLED, MIXED, check, shapes

from pagedkv import InvalidOperation, paged_attention
from pagedkv.data.quantised import GREATEST

QUANTISED = sorted(GREATEST, key=str)
BACKENDS = [name for name in EXAMINED if name != "reference"]  # its arithmetic is the oracle's


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("sequences", [MIXED, HOLED], ids=["mixed", "holed"])
def test_ragged_batch(backend, dtype, block_size, sequences):
    check(make_case(Shape(sequences, block_size=block_size, dtype=dtype)), backend)


@pytest.mark.parametrize("head_dim, v_head_dim", [(128, 128), (80, 80), (20, 20), (48, 33), (1, 7)])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_head_sizes(backend, dtype, head_dim, v_head_dim):
    check(make_case(Shape(MIXED, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)), backend)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_grouped_query_heads(backend, group):
    check(make_case(Shape(MIXED, group=group, num_kv_heads=3, dtype=torch.int8)), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 16},
        {"window": 5, "causal": False},
        {"softcap": 0.7},
        {"softcap": 2.0, "window": 20, "causal": False},
        {"scale": -0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_options(backend, options, sinks, layout, dtype):
    check(make_case(Shape(HOLED, options=options, sinks=sinks, layout=layout, strided=True, dtype=dtype)), backend)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_long_sequences(backend, dtype):
    shape = Shape([(3000, 1, 0, 0), (2500, 40, 4, 33), (1300, 3, 0, 0)], dtype=dtype, head_dim=64, v_head_dim=64)
    check(make_case(shape), backend)
    check(make_case(replace(shape, sinks=True, options={"window": 700, "softcap": 20.0})), backend)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_queries_in_bfloat16(backend, dtype):
    check(make_case(Shape(MIXED, dtype=dtype, query_dtype=torch.bfloat16)), backend)
    # Keys that were rounded to the queries' dtype would show: the logits are large.
    steep = Shape([(69, 34, 0, 0)], block_size=1, num_kv_heads=1, group=1, head_dim=8, v_head_dim=1)
    check(make_case(replace(steep, dtype=dtype, query_dtype=torch.bfloat16, options={"scale": 1.0})), backend)


quantised_shapes = st.builds(
    replace, shapes, dtype=st.sampled_from(QUANTISED), query_dtype=st.sampled_from([None, torch.bfloat16])
)


@pytest.mark.parametrize("backend, examples", [(name, 20 if name == "triton" else 60) for name in BACKENDS])
def test_any_batch_with_any_options(backend, examples):
    @given(quantised_shapes)
    @settings(max_examples=examples)
    def examine(shape):
        check(make_case(shape), backend)

    examine()


def attend(case, **options):
    return paged_attention(case.queries, case.keys, case.values, **{**case.options, **options})


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"key_scales": None}, "key_scales: expected a float32 torch.Tensor for torch.int8 keys, got NoneType"),
        ({"value_scales": None}, "value_scales: expected a float32 torch.Tensor"),
        ({"value_scales": torch.zeros(3, 16, 2).half()}, "value_scales: expected a float32 .*, got torch.float16"),
        ({"key_scales": torch.zeros(3, 16, 3)}, r"key_scales: expected shape \[\d+, \d+, \d+\], got \[3, 16, 3\]"),
    ],
)
def test_scales_that_do_not_fit_are_refused(layout, change, words):
    case = make_case(Shape([(9, 1, 0, 0)], dtype=torch.int8, layout=layout))
    with pytest.raises(InvalidOperation, match=words):
        attend(case, **change)


def test_scales_of_different_strides_are_refused():
    case = make_case(Shape([(9, 1, 0, 0)], dtype=torch.int8))
    shape = case.options["value_scales"].shape
    strided = torch.zeros(shape[0], shape[2], shape[1]).transpose(1, 2)
    with pytest.raises(InvalidOperation, match="value_scales: expected the strides"):
        attend(case, value_scales=strided)


def test_scales_of_what_is_not_quantised_are_refused():
    case = make_case(Shape([(9, 1, 0, 0)]))
    with pytest.raises(InvalidOperation, match="key_scales: expected None for torch.float32 keys"):
        attend(case, key_scales=torch.ones(case.keys.shape[:3]))


def test_quantised_queries_are_refused():
    case = make_case(Shape([(9, 1, 0, 0)], dtype=torch.int8))
    case.queries = case.queries.to(torch.int8)
    with pytest.raises(InvalidOperation, match="queries: expected float32, bfloat16 or float16, got torch.int8"):
        attend(case)
