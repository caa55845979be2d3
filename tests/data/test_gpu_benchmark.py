"""benchmarks/gpu.py as far as it goes without a GPU: all ways attend to the same, and it says that there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pagedkv import InvalidOperation

pytest.importorskip("triton")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("gpu", "gpu_batch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu
    import gpu_batch

    return gpu, gpu_batch


@pytest.mark.parametrize("shape", [(3, 1, 64), (2, 20, 64), (2, 40, 40)], ids=["decode", "chunk", "prefill"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_all_ways_give_the_same(benchmarks, shape, layout):
    gpu, gpu_batch = benchmarks
    batch = gpu_batch.Batch(*shape, "cpu", torch.float32, layout)
    expected = batch.ours("reference")
    ways = {name: make() for name, make in gpu_batch.ways_of(batch, "cpu").items()}
    if not torch.cuda.is_available():  # Triton's interpreter takes what is on the CPU
        ways["planned"] = batch.planned()
    assert {"pagedkv", "SDPA, contiguous", "gather + SDPA", "FlexAttention, paged mask"} <= ways.keys()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-5)


def test_its_checks_find_a_wrong_result(benchmarks, monkeypatch):
    gpu, gpu_batch = benchmarks
    batch = gpu_batch.Batch(2, 1, 50, "cpu", torch.float32)
    inputs = batch.queries, batch.keys, batch.values
    gpu.compare(inputs, batch.options, "cpu", 2e-5, "a case")
    real = gpu.paged_attention
    wrong = lambda *args, backend, **options: real(*args, backend=backend, **options) + (backend == "cpu")  # noqa: E731
    monkeypatch.setattr(gpu, "paged_attention", wrong)
    with pytest.raises(AssertionError, match="a case"):
        gpu.compare(inputs, batch.options, "cpu", 2e-5, "a case")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert benchmarks[0].main() == 0
    assert "no CUDA device here; nothing was checked and nothing was measured" in capsys.readouterr().out


def test_the_engine_writes_as_much_as_it_was_asked_for(benchmarks, monkeypatch):
    gpu, _ = benchmarks
    moments = iter(range(100))
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    row = gpu.engine_rate(False, "cpu", prompts=1, new_tokens=2)
    assert row == {"graphs": 0, "tokens_per_second": 2.0}
    assert gpu.line_of_engine(row) == "engine, shipped model, without CUDA graphs: 2 tokens/s"
    assert "with 5 CUDA graphs: 2 " in gpu.line_of_engine(row | {"graphs": 5})
    with pytest.raises(InvalidOperation, match="cuda_graphs: expected a model on a CUDA device"):
        gpu.engine_rate(True, "cpu")
