"""GPUs by name, and what a replica has on them: sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagedkv.errors import InvalidOperation
from pagedkv.sim import gpus
from pagedkv.sim.gpus import gpu_names, read_gpu, replica_on
from pagedkv.sim.model_shape import read_model

FILE = json.loads((Path(gpus.__file__).parent / "gpus.json").read_text())


def test_every_gpu_of_the_file_is_read_and_has_a_source():
    assert {"h100", "h200", "b200", "a100-40gb", "a100-80gb", "l40s", "l4", "a10", "mi300x", "rtx-4090"} <= set(FILE)
    assert gpu_names() == tuple(FILE)
    for name, facts in FILE.items():
        gpu = read_gpu(name)
        assert facts["source"] and gpu.memory_bytes == facts["memory_gib"] * 2**30
        assert gpu.memory_bytes_per_second == facts["memory_gb_per_second"] * 1e9 > gpu.host_bytes_per_second
        # Half the bits, twice the rate, on everything that has fp8.
        assert gpu.fp8_tflops is None or gpu.fp8_tflops / gpu.bf16_tflops == pytest.approx(2, rel=0.02)


def test_a_name_is_read_as_people_write_it():
    assert read_gpu(" A100_80GB ") == read_gpu("a100 80gb") == read_gpu("a100-80gb")


def test_a_gpu_that_is_not_known_is_answered_with_one_like_it():
    with pytest.raises(
        InvalidOperation, match="gpu: expected one of h100, .*, got 'h100-pci'.*did you mean 'h100-pcie'"
    ):
        read_gpu("h100-pci")


def test_the_pool_is_what_the_weights_leave():
    model = read_model("llama-3.1-70b")
    made = replica_on(read_gpu("h100"), model, count=4)
    weights = 2 * model.parameters.total
    assert made.weight_bytes == weights and made.pool_bytes == round(4 * 80 * 2**30 * 0.9) - weights
    assert made.hardware.tflops == 4 * 989.4 and made.hardware.mfu == 0.5
    assert made.hardware.decode_tokens_per_second == pytest.approx(4 * 3.35e12 * 0.6 / weights)
    assert made.host_bytes_per_second == 4 * 64e9 * 0.8


def test_weights_of_eight_bits_take_half_and_are_computed_at_twice_the_rate():
    model, h100, a100 = read_model("qwen3-8b"), read_gpu("h100"), read_gpu("a100-80gb")
    wide, narrow = replica_on(h100, model), replica_on(h100, model, weight_bits=8)
    assert narrow.weight_bytes * 2 == wide.weight_bytes and narrow.hardware.tflops == h100.fp8_tflops
    assert replica_on(a100, model, weight_bits=8).hardware.tflops == a100.bf16_tflops
    assert replica_on(h100, model, weight_bits=4).hardware.tflops == h100.bf16_tflops


def test_a_mixture_of_experts_decodes_at_the_rate_of_its_active_weights():
    model = read_model("qwen3-30b-a3b")
    made = replica_on(read_gpu("h100"), model)
    assert made.hardware.decode_tokens_per_second == pytest.approx(3.35e12 * 0.6 / (2 * model.parameters.active))


def test_a_model_that_does_not_fit_says_how_many_gpus_do():
    model, h100 = read_model("llama-3.1-405b"), read_gpu("h100")
    with pytest.raises(
        InvalidOperation, match="gpus_per_replica: expected at least 11: 406 B weights of 16 bits"
    ) as told:
        replica_on(h100, model)
    assert "1 × h100 give 72 GiB" in str(told.value)
    assert replica_on(h100, model, count=11).pool_bytes > 0
    with pytest.raises(InvalidOperation, match="at least 11"):
        replica_on(h100, model, count=10)


@pytest.mark.parametrize(
    ("name", "value"), [("count", 0), ("weight_bits", 1), ("memory_share", 0), ("memory_share", 1.5), ("mfu", 0)]
)
def test_what_is_out_of_range_is_refused(name, value):
    with pytest.raises(InvalidOperation):
        replica_on(read_gpu("h100"), read_model("qwen3-8b"), **{name: value})
