"""Every backend sits the same exam: equal to the oracle, and blind to what a sequence does not own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.attention_cases import TOLERANCE, Case, Shape, make_case

from pagedkv import paged_attention
from pagedkv.data.attention import BACKENDS
from pagedkv.data.gpu_device import has_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# seq_len, q_len, hole start, hole length: prefill, chunked prefill, decode, a guess of three, empty ones
MIXED = [(37, 37, 0, 0), (90, 25, 0, 0), (61, 1, 0, 0), (33, 3, 0, 0), (0, 0, 0, 0), (17, 0, 0, 0), (1, 1, 0, 0)]
HOLED = [(37, 37, 4, 9), (90, 25, 5, 3), (61, 1, 4, 14), (33, 3, 0, 11), (24, 1, 24, 5), (40, 40, 40, 7)]


# FlashInfer is another project's: see tests/data/test_gpu_flashinfer.py.
EXAMINED = sorted(BACKENDS.keys() - {"flashinfer"} - (set() if has_triton() else {"triton"}))


def device(backend: str) -> str:
    """Triton's kernels are examined on a GPU where there is one, in its interpreter elsewhere."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=EXAMINED)
def backend(request) -> str:
    return request.param


def check(case: Case, backend: str) -> torch.Tensor:
    expected = case.expected()
    on = device(backend)
    out = torch.full(expected.shape, torch.nan, dtype=case.queries.dtype, device=on)
    result = paged_attention(*case.tensors(on), **case.options_on(on), out=out, backend=backend)
    assert result.data_ptr() == out.data_ptr() and result.shape == out.shape
    result = result.cpu()
    tolerance = max(TOLERANCE[case.keys.dtype], TOLERANCE[case.queries.dtype])
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("sequences", [MIXED, HOLED], ids=["mixed", "holed"])
def test_ragged_batch(backend, dtype, block_size, sequences):
    check(make_case(Shape(sequences, block_size=block_size, dtype=dtype)), backend)


@pytest.mark.parametrize("head_dim, v_head_dim", [(32, 32), (64, 64), (80, 80), (128, 128), (20, 20), (48, 33), (1, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(backend, dtype, head_dim, v_head_dim):
    check(make_case(Shape(MIXED, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)), backend)


@pytest.mark.parametrize("group", range(1, 9))
def test_grouped_query_heads(backend, group):
    check(make_case(Shape(MIXED, group=group, num_kv_heads=3)), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 16},
        {"window": 1000},
        {"window": 5, "causal": False},
        {"softcap": 0.7},
        {"softcap": 2.0, "window": 20, "causal": False},
        {"scale": -0.3},
        {"scale": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sequences", [MIXED, HOLED], ids=["mixed", "holed"])
def test_options(backend, options, sinks, layout, sequences):
    check(make_case(Shape(sequences, options=options, sinks=sinks, layout=layout, strided=True)), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
def test_queries_of_another_dtype(backend, dtype, query_dtype):
    check(make_case(Shape(MIXED, dtype=dtype, query_dtype=query_dtype)), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sequences(backend, dtype):
    sequences = [(3000, 1, 0, 0), (2500, 40, 4, 33), (1300, 3, 0, 0)]
    shape = Shape(sequences, dtype=dtype, head_dim=64, v_head_dim=64)
    check(make_case(shape), backend)
    check(make_case(replace(shape, sinks=True, options={"window": 700, "softcap": 20.0})), backend)


@pytest.mark.parametrize("size", [60.0, 3000.0])
def test_huge_scores(backend, size):
    """The running maximum keeps the exponentials finite; with 3000 the softmax takes the greatest score alone."""
    case = make_case(Shape([(700, 1, 0, 0), (90, 90, 0, 0)], head_dim=64, v_head_dim=64))
    case.queries *= size / 8
    on = device(backend)
    result = paged_attention(*case.tensors(on), **case.options_on(on), backend=backend).cpu()
    # Rounding of a score of hundreds is what float32 has: compare weights, not their digits.
    torch.testing.assert_close(result.double(), case.expected(), rtol=0, atol=2e-5 * size)


def test_queries_that_see_no_key_give_zeros(backend):
    """Outside of a window of a sequence with none but later keys there is nothing; empty pools are legal too."""
    case = make_case(Shape([(0, 0, 0, 0), (0, 0, 0, 0)]))
    assert check(case, backend).shape == (0, 4, 32)
    empty = {"block_tables": case.options["block_tables"][:0], "seq_lens": case.options["seq_lens"][:0]}
    case.options.update(empty, cu_seqlens_q=case.options["cu_seqlens_q"][:1], holes=None)
    assert check(case, backend).shape == (0, 4, 32)


@pytest.mark.parametrize("sinks", [-math.inf, -100.0, 0.0, 100.0])
def test_sinks_take_their_share_of_the_sum_only(backend, sinks):
    case = make_case(Shape(MIXED))
    without = check(case, backend)
    case.options["sinks"] = torch.full((4,), sinks)
    if check(case, backend).equal(without):
        assert sinks <= -100.0


@st.composite
def sequences(draw) -> list[tuple[int, int, int, int]]:
    drawn = []
    for _ in range(draw(st.integers(0, 5))):
        seq_len = draw(st.integers(0, 80))
        q_len = draw(st.sampled_from([0, 1, 1, 2, seq_len // 2, seq_len]))
        hole_start = draw(st.integers(0, seq_len))
        drawn.append((seq_len, min(q_len, seq_len), hole_start, draw(st.sampled_from([0, 0, 1, 7, 40]))))
    return drawn


shapes = st.builds(
    Shape,
    sequences=sequences(),
    block_size=st.sampled_from([1, 2, 3, 16, 64]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([1, 8, 20, 32, 64, 80, 128]),
    v_head_dim=st.sampled_from([1, 8, 20, 32, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    query_dtype=st.sampled_from([None, *DTYPES]),
    layout=st.sampled_from(["NHD", "HND"]),
    sinks=st.booleans(),
    strided=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.booleans(),
            "window": st.integers(1, 90),
            "softcap": st.floats(0.1, 50.0),
            "scale": st.floats(-1.0, 1.0),
        },
    ),
    seed=st.integers(0, 2**31 - 1),
)


@pytest.mark.parametrize("backend", EXAMINED)
def test_any_batch_with_any_options(backend):
    @settings(max_examples=40 if backend == "triton" else 150)  # its interpreter is slow
    @given(shapes)
    def examine(shape):
        check(make_case(shape), backend)

    examine()


def test_the_oracle_equals_plain_loops():
    """The oracle of all of the above, against attention spelled out one number at a time."""
    case = make_case(Shape([(7, 3, 2, 2)], block_size=3, head_dim=4, v_head_dim=2, sinks=True))
    case.options.update(window=4, softcap=1.5)
    table, sinks = case.options["block_tables"][0], case.options["sinks"]
    slots = [0, 1, 4, 5, 6, 7, 8]
    expected = torch.zeros(3, 4, 2, dtype=torch.float64)
    for t in range(3):
        for head in range(4):
            weights = {}
            for position, slot in enumerate(slots):
                if position <= 4 + t and 4 + t - position < 4:
                    key = case.keys[table[slot // 3], slot % 3, head // 2].double()
                    score = float(case.queries[t, head].double() @ key) * case.options["scale"]
                    weights[slot] = math.exp(1.5 * math.tanh(score / 1.5))
            total = sum(weights.values()) + math.exp(sinks[head])
            for slot, weight in weights.items():
                expected[t, head] += weight / total * case.values[table[slot // 3], slot % 3, head // 2].double()
    torch.testing.assert_close(case.expected(), expected, rtol=1e-12, atol=1e-12)
