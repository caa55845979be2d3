"""What the CPU backend promises beyond the exam that every backend sits."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.contracts.attention_cases import Case, Shape, make_case

from pagedkv import paged_attention
from pagedkv.data import cpu, simd, team
from pagedkv.jit import compiled

# Decodes long enough to be split, a guess of four tokens, and a prompt.
SEQUENCES = [(1700, 1, 0, 0), (40, 1, 3, 9), (600, 4, 0, 0), (90, 60, 0, 0), (2300, 1, 0, 0)]
SHAPE = Shape(SEQUENCES, num_kv_heads=3, group=4, head_dim=64, v_head_dim=48, sinks=True, options={"window": 2000})


@pytest.fixture
def case() -> Case:
    return make_case(SHAPE)


@pytest.fixture
def torch_threads(monkeypatch):
    monkeypatch.setattr(team, "usable_cores", lambda: 64)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attend(case: Case, rows: slice | None = None) -> torch.Tensor:
    options, queries = dict(case.options), case.queries
    if rows is not None:
        cu_seqlens = options["cu_seqlens_q"]
        queries = queries[cu_seqlens[rows.start] : cu_seqlens[rows.stop]]
        options["cu_seqlens_q"] = cu_seqlens[rows.start : rows.stop + 1] - cu_seqlens[rows.start]
        for name in ("block_tables", "seq_lens", "holes"):
            options[name] = options[name][rows]
    return paged_attention(queries, case.keys, case.values, **options, backend="cpu")


def test_a_sequence_alone_gives_the_same_bits_as_in_a_batch(case, torch_threads):
    together, cu_seqlens = attend(case), case.options["cu_seqlens_q"]
    for i in range(len(SEQUENCES)):
        assert attend(case, slice(i, i + 1)).equal(together[cu_seqlens[i] : cu_seqlens[i + 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, torch_threads):
    shape = Shape(SEQUENCES, num_kv_heads=5, dtype=dtype, head_dim=128)
    case = make_case(shape)
    results = []
    for count in (1, 2, 3):
        torch_threads(count)
        results.append(attend(case))
    assert results[0].equal(results[1]) and results[0].equal(results[2])


def test_the_split_by_heads_changes_no_bit(torch_threads):
    case = make_case(Shape([(300, 1, 0, 0)], num_kv_heads=5, head_dim=128, v_head_dim=128))
    torch_threads(1)
    alone = attend(case)
    torch_threads(4)
    assert attend(case).equal(alone)


def test_many_python_threads_at_once(case):
    expected = attend(case)
    with ThreadPoolExecutor(4) as pool:
        assert all(result.equal(expected) for result in pool.map(lambda _: attend(case), range(24)))


@compiled
def _each(function, numbers, result):
    for i in range(0, len(numbers), simd.LANES):
        if function == 0:
            simd.store(result, i, simd.exp2(simd.load(numbers, i)))
        elif function == 2:
            simd.store(result, i, simd.exp2_to_bfloat16(simd.load(numbers, i)))
        else:
            simd.store(result, i, simd.tanh(simd.load(numbers, i)))


def on_lanes(function: int, numbers: np.ndarray) -> np.ndarray:
    result = np.empty_like(numbers)
    _each(function, numbers, result)
    return result


def test_exp2_is_right_to_float32():
    numbers = -np.geomspace(1e-9, 125.9, 1 << 14).astype(np.float32)
    np.testing.assert_allclose(on_lanes(0, numbers), np.exp2(numbers.astype(np.float64)), rtol=3e-7)
    np.testing.assert_allclose(on_lanes(0, -numbers), np.exp2(-numbers.astype(np.float64)), rtol=3e-7)
    edges = np.array([0.0, -0.0, -126.0, 126.0, -1e30, -np.inf, np.nan, -1.0] * 2, np.float32)
    expected = [1, 1, 2.0**-126, 2.0**126, 0, 0, np.nan, 0.5] * 2
    np.testing.assert_array_equal(on_lanes(0, edges), np.array(expected, np.float32))
    tiny = on_lanes(0, np.linspace(-149, -126, 16, dtype=np.float32))
    assert ((tiny == 0) | np.isclose(tiny, np.exp2(np.linspace(-149, -126, 16)), rtol=0, atol=2e-45)).all()


def test_exp2_is_right_to_a_tenth_of_what_bfloat16_rounds_off():
    numbers = -np.geomspace(1e-9, 125.9, 1 << 14).astype(np.float32)
    np.testing.assert_allclose(on_lanes(2, numbers), np.exp2(numbers.astype(np.float64)), rtol=2.1e-4)
    edges = np.array([0.0, -0.0, -126.0, -7.0, -1e30, -np.inf, np.nan, -1.0] * 2, np.float32)
    expected = [1, 1, 2.0**-126, 2.0**-7, 0, 0, np.nan, 0.5] * 2
    np.testing.assert_array_equal(on_lanes(2, edges), np.array(expected, np.float32))


def test_tanh_is_right_to_float32():
    size = np.geomspace(1e-9, 30, 1 << 14).astype(np.float32)
    for numbers in (size, -size):
        np.testing.assert_allclose(on_lanes(1, numbers), np.tanh(numbers.astype(np.float64)), rtol=3e-7)
    edges = np.array([0.0, np.inf, -np.inf, np.nan] * 4, np.float32)
    np.testing.assert_array_equal(on_lanes(1, edges), np.tanh(edges))


@compiled
def _narrow_all(numbers, result):
    for i in range(len(numbers)):
        result[i] = simd.narrowed(numbers[i], result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_as_torch_rounds(dtype):
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1 + 2**-9, 1 + 3 * 2**-9, 65504, 65520, 1e-8], np.float32)
    numbers = np.concatenate([bits.view(np.float32), special])
    numbers = numbers[~np.isnan(numbers)]
    result = torch.empty(len(numbers), dtype=dtype)
    _narrow_all(numbers, result.view(cpu._BITS[dtype]).numpy())
    assert result.equal(torch.from_numpy(numbers).to(dtype))
    nan = torch.empty(1, dtype=dtype)
    _narrow_all(np.array([np.nan], np.float32), nan.view(cpu._BITS[dtype]).numpy())
    assert nan.isnan().all()


PLAIN = """
import torch
from tests.contracts.attention_cases import Shape, make_case
from tests.contracts.test_attention_contract import check
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn):
    sequences = [(9, 2, 2, 3), (5, 1, 0, 0), (0, 0, 0, 0)]
    shape = Shape(sequences, block_size=3, head_dim=20, v_head_dim=17, group=3, dtype=dtype, sinks=True)
    shape.options = {"softcap": 3.0, "window": 6}
    check(make_case(shape), "cpu")
    shape.options = {}
    check(make_case(shape), "cpu")
"""


def test_plain_python_does_the_same():
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", PLAIN],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_a_scale_that_vanishes_in_float32_is_a_scale_of_zero() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(40, 1, 8), torch.randn(10, 4, 1, 8), torch.randn(10, 4, 1, 8)
    places = {"block_tables": np.arange(10, dtype=np.int32)[None], "seq_lens": [40], "cu_seqlens_q": [0, 40]}
    places = {name: np.asarray(array, np.int32) for name, array in places.items()}
    tiny, zero = (paged_attention(queries, keys, values, scale=scale, **places) for scale in (1e-129, 0.0))
    torch.testing.assert_close(tiny, zero)
    mean = values.reshape(40, 8).cumsum(0) / torch.arange(1, 41)[:, None]
    torch.testing.assert_close(tiny[:, 0], mean, rtol=1e-5, atol=1e-6)
